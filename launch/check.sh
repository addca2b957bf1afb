#!/usr/bin/env bash
# Sets up .venv and checks the source: format and lint (ruff), types (mypy), tests (pytest). Stops at the first failure.
#
# Usage: launch/check.sh [ARGUMENT OF PYTEST ...]
set -euo pipefail
unset CDPATH
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
cd -- "$root"

case "$*" in
  -h | --help) awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' launch/check.sh && exit 0 ;;
esac

launch/setup.sh
.venv/bin/python -m ruff format --check .
.venv/bin/python -m ruff check .
.venv/bin/python -m mypy
exec launch/test.sh "$@"
