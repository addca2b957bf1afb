#!/usr/bin/env bash
# Sets up .venv-tf220 (launch/setup.sh --tf220) and runs there what of the tests depends most on TensorFlow.
#
# Usage: launch/test_tf220.sh [ARGUMENT OF PYTEST ...]
#   launch/test_tf220.sh                   the core: tables, softmax, bodies, parameters, checkpoints, steps, a short run
#   launch/test_tf220.sh tests/test_xla.py a part
#
# tensorflow-tpu, which runs on TPUs, is at TensorFlow 2.20: this shows that lmscale runs on it, without a TPU.
set -euo pipefail
unset CDPATH
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
cd -- "$root"

case "$*" in
  -h | --help) awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' launch/test_tf220.sh && exit 0 ;;
esac

launch/setup.sh --tf220
export TF_CPP_MIN_LOG_LEVEL=${TF_CPP_MIN_LOG_LEVEL-2} # TensorFlow's own notices of the start.
(($#)) || set -- --numprocesses auto --maxprocesses 4 --dist loadfile \
  tests/tables tests/softmax tests/bodies tests/parameters tests/checkpoints tests/distribution \
  tests/test_trainer.py tests/test_model.py tests/test_micro_batches.py tests/test_untied.py tests/test_evaluation.py \
  tests/test_xla.py tests/test_tpu.py tests/runs/test_resume.py
exec .venv-tf220/bin/python -m pytest "$@"
