#!/usr/bin/env bash
# Puts random faults into tiny runs of several processes, hour after hour, and checks what docs/faults.md promises.
#
# Usage: launch/soak.sh [--faults=NUMBER] [--seed=NUMBER] [--processes=N,N] [--folder=FOLDER] [--print]
#   launch/soak.sh --faults=300 --folder=runs/soak
#
# A process is killed, stopped or asked to end at a random step, or killed at a random operation of a save; or the
# newest checkpoint is damaged. The same command is then started again, until the run is finished; its last checkpoint
# must be that of a run that nothing interrupted, bit for bit. Every fault is a line of output and one of
# FOLDER/soak.jsonl (runs/soak); at the end there is a summary in JSON. Exit code 1: something was not as promised.
#
# Interrupted, it goes on with the fault behind the last in that file. --faults is the number of all (300), --seed (0)
# chooses them, --processes (2,4) are the sizes of the runs. --print only shows which faults there will be.
set -euo pipefail
unset CDPATH
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

fail() { echo "error: $*" >&2 && exit 2; }

faults=300 seed=0 processes=2,4 folder=runs/soak action=run
while (($#)); do
  case $1 in
    -h | --help) awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$root/launch/soak.sh" && exit 0 ;;
    --print) action=print ;;
    --faults=*) faults=${1#*=} ;;
    --seed=*) seed=${1#*=} ;;
    --processes=*) processes=${1#*=} ;;
    --folder=*) folder=${1#*=} ;;
    *) fail "unknown argument. Received: $1. See launch/soak.sh --help" ;;
  esac
  shift
done
[[ $faults =~ ^[1-9][0-9]{0,6}$ ]] || fail "--faults must be a number from 1. Received: $faults"
[[ $seed =~ ^[0-9]{1,9}$ ]] || fail "--seed must be a number. Received: $seed"
[[ $processes =~ ^[2-9](,[2-9])*$ ]] || fail "--processes must be numbers from 2 to 9. Received: $processes"
[[ -n $folder ]] || fail "--folder must not be empty"

python=$root/.venv/bin/python
[[ $action == print && ! -x $python ]] && python=python3
[[ $action == print || -x $python ]] || fail "the environment .venv must be there. Run launch/setup.sh first"
PYTHONPATH=$root exec "$python" "$root/launch/shared/soak.py" "$faults" "$seed" "$processes" "$folder" "$action"
