#!/usr/bin/env bash
# Runs a command as the N processes of one run on this machine.
#
# Usage: launch/local_workers.sh [--grace_secs=SECONDS] [--print] N -- COMMAND ...
#   launch/local_workers.sh 2 -- .venv/bin/python -m lmscale.train --gin_file=quickstart.gin --workdir=runs/two
#
# Each process finds all of them in TF_CONFIG, at free ports of 127.0.0.1; the command needs no flags for that. Each
# line that a process prints has its number before it: [0], [1], ...
#
# Ctrl-C, SIGTERM, SIGHUP, SIGUSR1 and SIGUSR2 go to every process. When one ends with an exit code other than 0, the
# others get SIGTERM, and after --grace_secs (60), which they have to save, SIGKILL; so they have after a SIGTERM to
# this script. The exit code is that of the first that failed, 128 + n if signal n ended it; 0 if none failed.
# --print only shows the processes' commands.
set -euo pipefail
unset CDPATH
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

fail() { echo "error: $*" >&2 && exit 2; }

grace_secs=60 action=run count=
while (($#)); do
  case $1 in
    -h | --help)
      awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$root/launch/local_workers.sh" && exit 0 ;;
    --print) action=print ;;
    --grace_secs=*) grace_secs=${1#*=} ;;
    --) break ;;
    -*) fail "unknown flag. Received: $1. See launch/local_workers.sh --help" ;;
    *) [[ -z $count ]] || fail "-- must stand between N and the command. Received: $count $1" && count=$1 ;;
  esac
  shift
done
[[ $count =~ ^[1-9][0-9]{0,3}$ ]] || fail "N must be a number of processes, from 1. Received: ${count:-none}"
[[ $grace_secs =~ ^[0-9]{1,6}$ ]] || fail "--grace_secs must be whole seconds. Received: $grace_secs"
[[ ${1-} == -- ]] || fail "-- and a command must follow N. Received: no --"
shift
(($#)) || fail "a command must follow --. Received: none"

exec python3 "$root/launch/shared/workers.py" local "$count" "$grace_secs" "$action" "$@"
