#!/usr/bin/env bash
# Runs a command as a custom job of Vertex AI: one chief (worker pool 0) and the other processes (worker pool 1).
#
# Usage: launch/vertex.sh --region=REGION --image=URI --machine_type=TYPE [--accelerator=TYPE:COUNT]
#                         [--num_processes=N] [--name=NAME] [--print] -- COMMAND ...
#   launch/vertex.sh --region=europe-west4 --image=registry.example/lmscale --machine_type=a2-highgpu-1g \
#     --accelerator=NVIDIA_TESLA_A100:1 --num_processes=4 -- \
#     lmscale-train --gin_file=quickstart.gin --workdir=/gcs/my-bucket/runs/vertex
#
# The image must have lmscale installed; Vertex AI mounts a bucket at /gcs/BUCKET. Each machine runs one process, which
# finds the others in CLUSTER_SPEC; --accelerator is that of each. The project is gcloud's.
# A job that ended with 69 or 75 goes on when the same command is submitted again. --print only shows gcloud's command.
set -euo pipefail
unset CDPATH
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

fail() { echo "error: $*" >&2 && exit 2; }

show() {
  local words
  words=$(printf ' %q' "$@") && echo "${words# }"
}

region='' image='' machine_type='' accelerator='' num_processes=1 name=lmscale action=run
while (($#)); do
  case $1 in
    -h | --help) awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$root/launch/vertex.sh" && exit 0 ;;
    --region=*) region=${1#*=} ;;
    --image=*) image=${1#*=} ;;
    --machine_type=*) machine_type=${1#*=} ;;
    --accelerator=*) accelerator=${1#*=} ;;
    --num_processes=*) num_processes=${1#*=} ;;
    --name=*) name=${1#*=} ;;
    --print) action=print ;;
    --) break ;;
    -*) fail "unknown flag. Received: $1. See launch/vertex.sh --help" ;;
    *) fail "-- must stand before the command. Received: $1" ;;
  esac
  shift
done
[[ -n $region ]] || fail "--region is required. Received: none"
[[ -n $image ]] || fail "--image is required. Received: none"
[[ -n $machine_type ]] || fail "--machine_type is required. Received: none"
[[ $num_processes =~ ^[1-9][0-9]{0,3}$ ]] || fail "--num_processes must be from 1. Received: $num_processes"
[[ -z $accelerator || $accelerator =~ ^[A-Z0-9_]+:[1-9][0-9]*$ ]] ||
  fail "--accelerator must be TYPE:COUNT. Received: $accelerator"
[[ ${1-} == -- ]] && shift
(($#)) || fail "-- and a command must come last. Received: no command"

# gcloud takes a list as one argument: ^X^ makes X its separator, here the first that no argument has.
list() {
  local separator
  for separator in ',' ';' '|' '~' '#' '+'; do
    if [[ $* != *"$separator"* ]]; then
      local IFS=$separator
      echo "^$separator^$*"
      return
    fi
  done
  fail "an argument must lack one of , ; | ~ # and +. Received: $*"
}

machine="container-image-uri=$image,machine-type=$machine_type"
[[ -z $accelerator ]] || machine+=",accelerator-type=${accelerator%:*},accelerator-count=${accelerator#*:}"
command=(gcloud ai custom-jobs create "--region=$region" "--display-name=$name")
command+=("--worker-pool-spec=$machine,replica-count=1")
((num_processes == 1)) || command+=("--worker-pool-spec=$machine,replica-count=$((num_processes - 1))")
executable=$(list "$1")
command+=("--command=$executable")
shift
if (($#)); then
  arguments=$(list "$@")
  command+=("--args=$arguments")
fi

if [[ $action == print ]]; then
  show "${command[@]}"
else
  exec "${command[@]}"
fi
