#!/usr/bin/env bash
# What a first hour on a machine with NVIDIA GPUs should tell, in one report: runs/gpu_report/report.md and report.json.
#
# Usage: launch/gpu_report.sh [--print] [--cpu] [--output=FOLDER] [--parts=NAME,NAME]
#
# The parts, one after the other; one that fails does not stop the others, and the report says so:
#   machine         nvidia-smi, the driver, the links between GPUs
#   tensorflow      the GPUs that TensorFlow sees, and what it was built with
#   losses          the quickstart's first steps in float32, bfloat16 and float16 on one GPU, beside float32 on the CPU
#   steps_per_call  time of a step, with 1 and with 10 of them in a call of TensorFlow
#   step_time       time of a step against the size of the vocabulary (lmscale.bench)
#   peers           that of other implementations beside it (the extra bench has PyTorch)
#   memory          what a step takes of it (lmscale.bench)
#   profile         a trace of ten steps, for TensorBoard
#   nccl            two GPUs, in one process and in two, against one; left out where there is one GPU
#
# --cpu rehearses it on the CPU, with sizes so small that only "it ran" means anything. --print shows the commands and
# runs none. --output: another folder. Exit code 1 if a part failed. Run launch/setup.sh --gpu first.
set -euo pipefail
unset CDPATH
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
cd -- "$root"

case ${1-} in
  -h | --help) awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' launch/gpu_report.sh && exit 0 ;;
esac

python=$root/.venv/bin/python
[[ -x $python ]] || { echo "error: there must be .venv. Run launch/setup.sh --gpu first" >&2 && exit 2; }
exec "$python" launch/shared/gpu_report.py "$@"
