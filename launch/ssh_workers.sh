#!/usr/bin/env bash
# Runs a command as the processes of one run, one on each of several hosts, over ssh.
#
# Usage: launch/ssh_workers.sh [--grace_secs=SECONDS] [--print] HOSTS -- COMMAND ...
#   launch/ssh_workers.sh gpu1,gpu2 -- .venv/bin/python -m lmscale.train --gin_file=quickstart.gin --workdir=runs/two
#
# HOSTS is HOST,HOST,... or @FILE, which has one on each line. A host is [USER@]HOST[:PORT]. PORT is where its process
# listens to the others, 2222 unless given (for ssh's own port there is ~/.ssh/config); a host named twice gets two
# processes. All must reach one another by these names, and the first has process 0.
#
# This directory and the project must be at the same path on every host, and python3 installed; ssh must not have to
# ask. Each process finds all of them in TF_CONFIG. No other variable is passed on: -- env NAME=VALUE COMMAND does.
#
# Output, signals, --grace_secs and exit code are those of local_workers.sh; 255 means that ssh failed. When this
# script dies, or a connection does, the processes get SIGTERM, then SIGKILL. --print only shows the ssh commands.
set -euo pipefail
unset CDPATH
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

fail() { echo "error: $*" >&2 && exit 2; }

grace_secs=60 action=run hosts=
while (($#)); do
  case $1 in
    -h | --help)
      awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$root/launch/ssh_workers.sh" && exit 0 ;;
    --print) action=print ;;
    --grace_secs=*) grace_secs=${1#*=} ;;
    --) break ;;
    -*) fail "unknown flag. Received: $1. See launch/ssh_workers.sh --help" ;;
    *) [[ -z $hosts ]] || fail "-- must stand between HOSTS and the command. Received: $hosts $1" && hosts=$1 ;;
  esac
  shift
done
[[ -n $hosts ]] || fail "HOSTS must be HOST,HOST,... or @FILE. Received: none"
[[ $grace_secs =~ ^[0-9]{1,6}$ ]] || fail "--grace_secs must be whole seconds. Received: $grace_secs"
[[ ${1-} == -- ]] || fail "-- and a command must follow HOSTS. Received: no --"
shift
(($#)) || fail "a command must follow --. Received: none"

exec python3 "$root/launch/shared/workers.py" ssh "$hosts" "$grace_secs" "$action" "$@"
