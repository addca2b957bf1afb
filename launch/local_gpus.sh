#!/usr/bin/env bash
# Runs a command on all GPUs of this machine, in one process: MirroredStrategy takes every GPU that it sees.
#
# Usage: launch/local_gpus.sh [--print] [COMMAND ...]
#   launch/local_gpus.sh .venv/bin/python -m lmscale.train --gin_file=quickstart.gin --workdir=runs/gpus
#
# Shows the GPUs first, and stops if there is none: the command itself would go on, on the CPU. Without a command,
# that is all. CUDA_VISIBLE_DEVICES stays as it is. --print shows the GPUs, and the command without running it.
set -euo pipefail
unset CDPATH
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

fail() { echo "error: $*" >&2 && exit 2; }

show() {
  local words
  words=$(printf ' %q' "$@") && echo "${words# }"
}

action=run
case ${1-} in
  -h | --help) awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$root/launch/local_gpus.sh" && exit 0 ;;
  --print) action=print && shift ;;
esac
[[ ${1-} == -- ]] && shift
[[ ${1-} != -* ]] || fail "unknown flag. Received: $1. See launch/local_gpus.sh --help"

gpus=$(nvidia-smi --query-gpu=index,name,memory.total --format=csv,noheader) ||
  fail "nvidia-smi must show the GPUs of this machine. Is NVIDIA's driver installed?"
[[ -n $gpus ]] || fail "this machine must have a GPU. Received: none from nvidia-smi"
echo "$gpus"
if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
  echo "Of these, CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES"
fi

(($#)) || exit 0
if [[ $action == print ]]; then
  show "$@"
else
  exec "$@"
fi
