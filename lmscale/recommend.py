"""The next items for histories: python -m lmscale.recommend --workdir=runs/quickstart_next_item --input=histories.txt

A line of the input is a history: its items, the oldest first, between blanks. Each gives a JSON object on stdout with
the best items of the whole catalogue, and the log-probability of each.
"""

import json
import sys
from pathlib import Path

from absl import flags

from lmscale import machine_flags, run_flags, workdir_flags
from lmscale.command_line import DEFINE_path, run_main
from lmscale.data.text_files import read_text

flags.adopt_module_key_flags(run_flags)

_INPUT = DEFINE_path("input", None, "File of histories, UTF-8; without it, stdin.")
_K = flags.DEFINE_integer("k", 10, "Items for each history.", lower_bound=1)
_EXCLUDE_SEEN = flags.DEFINE_bool("exclude_seen", True, "Leave out what is in the history.")


def main(argv):
    """Histories to items, printed."""
    del argv
    workdir_flags.check()
    text = _text_of_stdin() if _INPUT.value is None else read_text(Path(_INPUT.value))
    lines = text.splitlines()
    if not lines:
        raise ValueError("A history is needed. Received: none. Give a line of items for each.")
    with machine_flags.processes() as group:
        _print_items(lines, group)
    return 0


def _text_of_stdin():
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"Histories on stdin must be UTF-8. Received: byte 0x{error.object[error.start]:02x} at byte "
            f"{error.start + 1:,}. Convert them, for instance with iconv -t UTF-8."
        ) from error


def _print_items(lines, group):
    # TensorFlow takes seconds to import: mistakes in flags come before.
    from lmscale.metrics import progress
    from lmscale.recommendation import Recommender
    from lmscale.workdir import Workdir

    with Workdir(workdir_flags.workdir_path(), readonly=True) as workdir:
        restored = run_flags.restored_model(workdir, group)
        recommender = Recommender(restored)
        histories = [
            recommender.ids(line.split(), place=f"Line {number:,}")
            for number, line in enumerate(lines, start=1)
        ]
        group.check_same("The histories", histories)
        metadata = restored.restore(restored.step_of(workdir_flags.checkpoint()))
        tokens = recommender.vocabulary.tokens
        with (
            restored.weights(metadata),
            progress(
                total=len(lines), initial=0, description="recommending", is_shown=group.is_chief
            ) as show_histories,
        ):
            best = recommender.best(histories, k=_K.value, exclude_seen=_EXCLUDE_SEEN.value)
            for number, (line, (ids, log_probs)) in enumerate(zip(lines, best, strict=True), start=1):
                show_histories(number)
                if group.is_chief:
                    items = [
                        {"item": tokens[item], "log_prob": float(log_prob)}
                        for item, log_prob in zip(ids, log_probs, strict=True)
                    ]
                    print(
                        json.dumps({"history": line.split(), "items": items}, ensure_ascii=False), flush=True
                    )


def run():
    """Console script lmscale-recommend."""
    run_main(main)


if __name__ == "__main__":
    run()
