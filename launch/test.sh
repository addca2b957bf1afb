#!/usr/bin/env bash
# Sets up .venv (launch/setup.sh) and runs the whole test suite.
#
# Usage: launch/test.sh [ARGUMENT OF PYTEST ...]
#   launch/test.sh                                everything, in as many processes as there are cores, at most four
#   launch/test.sh tests/test_launch.py -k quick  a part, in one process
#
# Tests that need the larger corpora are skipped, saying so, where ../shared/data is not there.
set -euo pipefail
unset CDPATH
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
cd -- "$root"

case "$*" in
  -h | --help) awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' launch/test.sh && exit 0 ;;
esac

launch/setup.sh
export TF_CPP_MIN_LOG_LEVEL=${TF_CPP_MIN_LOG_LEVEL-2} # TensorFlow's own notices of the start.
# By file, so that what the tests of a file share is made once; in the order of their names, since files with few tests,
# which would otherwise come last, are the long ones.
(($#)) || set -- --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
exec .venv/bin/python -m pytest "$@"
