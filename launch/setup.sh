#!/usr/bin/env bash
# Makes .venv with every package at the version pinned in requirements.lock, and lmscale itself.
#
# Usage: launch/setup.sh [--gpu | --tpu | --tf220]
#   --gpu    adds CUDA's libraries, of requirements-gpu.lock, for machines with NVIDIA GPUs (3 GB to download)
#   --tpu    makes .venv-tpu instead, from requirements-tpu.lock: tensorflow-tpu 2.20, for machines with a TPU
#   --tf220  makes .venv-tf220 instead, from the same lock with TensorFlow 2.20, for launch/test_tf220.sh
#
# Needs Linux on x86-64 and a Python 3.10 to 3.13 with venv and pip: the one named by the environment variable PYTHON,
# or the first that fits of python3.12, python3.11, python3.13, python3.10 and python3. (--tpu: 3.10 to 3.12.)
# Does nothing when the environment is up to date; makes it anew when an earlier set-up was interrupted or PYTHON names
# another version; updates it when a lock or pyproject.toml has changed. What --gpu has added stays without it.
set -euo pipefail
unset CDPATH
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
cd -- "$root"

locks=(requirements.lock) name=.venv newest=13
case "$*" in
  '' | --gpu) ;;
  --tpu) locks=(requirements-tpu.lock) name=.venv-tpu newest=12 ;;
  --tf220) locks=(requirements-tpu.lock) name=.venv-tf220 ;;
  -h | --help) awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' launch/setup.sh && exit 0 ;;
  *) echo "error: setup.sh takes --gpu, --tpu, --tf220 or nothing. Received: $*" >&2 && exit 2 ;;
esac

readonly name newest venv=$root/$name
readonly stamp=$venv/lmscale.stamp # Written last: an environment without it was never completed.
if [[ $* == --gpu || -f $stamp && $(<"$stamp") == *requirements-gpu.lock* ]]; then
  locks+=(requirements-gpu.lock)
fi

# A name on PATH proves little: a version manager's shim exists for versions which are not there, and a distribution
# may package Python without the modules that make an environment. So ask.
suitable() {
  "$1" -c 'import ensurepip, sys, venv; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, '"$newest"'))' >/dev/null 2>&1
}

find_python() {
  local python
  if [[ -n ${PYTHON-} ]]; then
    suitable "$PYTHON" && echo "$PYTHON" && return
    echo "error: PYTHON must name a Python 3.10 to 3.$newest with the modules venv and ensurepip. Received:" \
      "PYTHON=$PYTHON. Unset it, or name another." >&2
    return 2
  fi
  for python in python3.12 python3.11 python3.13 python3.10 python3; do
    suitable "$python" && echo "$python" && return
  done
  echo "error: a Python 3.10 to 3.$newest with the modules venv and ensurepip is needed. Tried: python3.12, python3.11," \
    "python3.13, python3.10, python3. Install one (Debian and Ubuntu: apt install python3 python3-venv), or name it:" \
    "PYTHON=/path/to/python3.12 launch/setup.sh" >&2
  return 2
}

version() { "$1" -c 'import sys; print(sys.version)'; }

python=$(find_python)
# The root is part of it because a moved or copied environment points to the old place.
wanted=$(printf '%s\n' "$root" && sha256sum "${locks[@]}" pyproject.toml)

if [[ -f $stamp ]] && suitable "$venv/bin/python" &&
  [[ -z ${PYTHON-} || $(version "$PYTHON") == "$(version "$venv/bin/python")" ]]; then
  if [[ $(<"$stamp") == "$wanted" ]]; then
    exit 0
  fi
  echo "Updating $name: ${locks[*]} or pyproject.toml has changed"
  rm -f -- "$stamp"
else
  echo "Making $name with $("$python" --version)"
  "$python" -m venv --clear "$venv"
fi

pip() { "$venv/bin/python" -m pip --disable-pip-version-check --no-input --quiet "$@"; }

for lock in "${locks[@]}"; do
  requirements=$lock
  if [[ $name == .venv-tf220 ]]; then
    # What --tf220 takes is that of a machine without a TPU.
    requirements=$venv/requirements.txt
    sed 's/^tensorflow-tpu==/tensorflow==/; /^libtpu==/d' "$lock" >"$requirements"
  fi
  echo "Installing the packages pinned in $lock (some minutes)"
  pip install --no-deps --only-binary=:all: -r "$requirements"
done
# The build tools are pinned as well, hence no isolated build.
pip install --no-deps --no-build-isolation --editable .
if [[ $name == .venv-tpu ]]; then
  # tensorflow-tpu is TensorFlow, and pip does not know it.
  missing=$(pip check | grep -v 'requires tensorflow, which is not installed\.$' || true)
  [[ -z ${missing//No broken requirements found./} ]] || { echo "$missing" >&2 && exit 1; }
else
  pip check
fi
printf '%s\n' "$wanted" >"$stamp"
echo "Ready: $name with $("$venv/bin/python" --version)"
