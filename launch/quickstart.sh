#!/usr/bin/env bash
# From a fresh clone to an exact test perplexity: sets up .venv, prepares a book, trains on 4 devices, evaluates.
#
# Usage: launch/quickstart.sh
#
# The host CPU is split into 4 devices, each with a quarter of the vocabulary's rows. Everything is written under runs/:
# the prepared data in runs/data/tiny-austen, the run in runs/quickstart. Interrupted, it goes on where it was; run
# again, it finds the run finished.
set -euo pipefail
unset CDPATH
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
cd -- "$root"

case "$*" in
  '') ;;
  -h | --help) awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' launch/quickstart.sh && exit 0 ;;
  *) echo "error: quickstart.sh takes no arguments. Received: $*" >&2 && exit 2 ;;
esac

readonly book=data/tiny-austen data=runs/data/tiny-austen run=runs/quickstart
readonly python=.venv/bin/python

# Shows a command, as it may be typed from this directory, and runs it.
step() {
  { printf '+' && printf ' %q' "$@" && echo; } >&2
  "$@"
}

# Prints the exact perplexity of a split.
perplexity() {
  step "$python" -m lmscale.evaluate --workdir="$run" --split="$1" | tail -n 1 |
    "$python" -c 'import json, sys; print("%.2f" % json.load(sys.stdin)["perplexity"])'
}

echo "[1/4] Environment: .venv from requirements.lock"
launch/setup.sh

echo "[2/4] Data: $book to $data"
if [[ -f $data/manifest.json ]]; then
  echo "Already prepared."
else
  step "$python" -m lmscale.prepare --train="$book/train.txt" --valid="$book/valid.txt" --test="$book/test.txt" \
    --output="$data" --tokenizer=whitespace
fi

echo "[3/4] Training: configs/quickstart.gin on 4 devices of the CPU, at most a few minutes"
step "$python" -m lmscale.train --gin_file=configs/quickstart.gin --workdir="$run" --cpu_devices=4

echo "[4/4] Exact evaluation: every token of both splits, the softmax over every row"
valid=$(perplexity valid)
test=$(perplexity test)

echo
printf 'Test perplexity:  %s  (validation: %s)\n' "$test" "$valid"
printf 'The run:          %q\n' "$root/$run"
printf 'TensorBoard:      %q --logdir=%q\n' "$root/.venv/bin/tensorboard" "$root/$run"
