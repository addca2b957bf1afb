#!/usr/bin/env bash
# Starts TensorBoard for one or more run directories.
#
# Usage: launch/tensorboard.sh [--print] LOGDIR ... [-- FLAGS OF tensorboard]
#   launch/tensorboard.sh runs/one runs/two -- --port=6007
#
# A directory above several runs shows all of them. --print only shows the command.
set -euo pipefail
unset CDPATH
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

fail() { echo "error: $*" >&2 && exit 2; }

show() {
  local words
  words=$(printf ' %q' "$@") && echo "${words# }"
}

action=run logdirs=()
while (($#)); do
  case $1 in
    -h | --help) awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$root/launch/tensorboard.sh" && exit 0 ;;
    --print) action=print ;;
    --) shift && break ;;
    -*) fail "unknown flag. Received: $1. Flags of tensorboard stand after --" ;;
    *) logdirs+=("$1") ;;
  esac
  shift
done
((${#logdirs[@]})) || fail "a run directory is required. Received: none"
for logdir in "${logdirs[@]}"; do
  [[ -d $logdir ]] || fail "a run directory must be there. Received: $logdir"
done

command=("$root/.venv/bin/tensorboard")
if ((${#logdirs[@]} == 1)); then
  command+=("--logdir=${logdirs[0]}")
else
  # Runs that lie in different places have to be named: each by its path.
  named=
  for logdir in "${logdirs[@]}"; do
    [[ $logdir != *[:,]* ]] || fail "one of several run directories must have no : or , in its path. Received: $logdir"
    named+=,$logdir:$logdir
  done
  command+=("--logdir_spec=${named#,}")
fi
command+=("$@")

if [[ $action == print ]]; then
  show "${command[@]}"
  exit 0
fi
[[ -x ${command[0]} ]] || fail "TensorBoard must be in .venv. Run launch/setup.sh first"
exec "${command[@]}"
