#!/usr/bin/env bash
# Makes a Cloud TPU VM, or a slice of several hosts, installs this project there, and runs a command on it.
#
# Usage: launch/tpu_vm.sh create --name=NAME --zone=ZONE --type=TYPE --runtime=VERSION [--print]
#        launch/tpu_vm.sh install --name=NAME --zone=ZONE [--print]
#        launch/tpu_vm.sh run --name=NAME --zone=ZONE [--worker=all] [--print] -- COMMAND ...
#        launch/tpu_vm.sh delete --name=NAME --zone=ZONE [--print]
#
#   launch/tpu_vm.sh create --name=lm --zone=us-central2-b --type=v4-8 --runtime=tpu-ubuntu2204-base
#   launch/tpu_vm.sh install --name=lm --zone=us-central2-b
#   launch/tpu_vm.sh run --name=lm --zone=us-central2-b -- \
#     .venv-tpu/bin/python -m lmscale.train --tpu=local --gin_file=quickstart.gin --workdir=gs://my-bucket/runs/tpu
#
# The command runs in ~/lmscale of worker 0: a v4-8 or v5litepod-4 is one host, whose chips --tpu=local takes. Of a
# slice with several hosts, --worker=all runs it on each. install makes .venv-tpu there, with the package tensorflow-tpu
# (launch/setup.sh --tpu). The TPU costs until it is deleted. --print only shows the commands of gcloud.
set -euo pipefail
unset CDPATH
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

fail() { echo "error: $*" >&2 && exit 2; }

show() {
  local words
  words=$(printf ' %q' "$@") && echo "${words# }"
}

what='' name='' zone='' type='' runtime='' worker=0 action=run
while (($#)); do
  case $1 in
    -h | --help) awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$root/launch/tpu_vm.sh" && exit 0 ;;
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --runtime=*) runtime=${1#*=} ;;
    --worker=*) worker=${1#*=} ;;
    --print) action=print ;;
    --) break ;;
    -*) fail "unknown flag. Received: $1. See launch/tpu_vm.sh --help" ;;
    *) [[ -z $what ]] || fail "-- must stand before the command. Received: $1" && what=$1 ;;
  esac
  shift
done
[[ -n $name ]] || fail "--name is required. Received: none"
[[ -n $zone ]] || fail "--zone is required. Received: none"
[[ ${1-} == -- ]] && shift
[[ $what == run ]] || (($# == 0)) || fail "only run takes a command. Received: $what, $*"

# Shows a command, with --print, or runs it.
step() {
  if [[ $action == print ]]; then
    show "$@"
  else
    "$@"
  fi
}

readonly tpu=(gcloud compute tpus tpu-vm)
case $what in
  create)
    [[ -n $type && -n $runtime ]] || fail "create needs --type and --runtime. Received: --type=$type --runtime=$runtime"
    step "${tpu[@]}" create "$name" "--zone=$zone" "--accelerator-type=$type" "--version=$runtime"
    ;;
  install)
    # What git has: neither .venv nor runs.
    step mkdir -p "$root/build"
    step git -C "$root" archive --output=build/lmscale.tar.gz HEAD
    step "${tpu[@]}" scp "$root/build/lmscale.tar.gz" "$name:lmscale.tar.gz" "--zone=$zone" --worker=all
    step "${tpu[@]}" ssh "$name" "--zone=$zone" --worker=all \
      "--command=mkdir -p lmscale && tar -xzf lmscale.tar.gz -C lmscale && lmscale/launch/setup.sh --tpu"
    ;;
  run)
    (($#)) || fail "-- and a command must come last. Received: no command"
    step "${tpu[@]}" ssh "$name" "--zone=$zone" "--worker=$worker" "--command=cd lmscale && exec$(printf ' %q' "$@")"
    ;;
  delete) step "${tpu[@]}" delete "$name" "--zone=$zone" --quiet ;;
  *) fail "the first argument must be create, install, run or delete. Received: ${what:-none}" ;;
esac
