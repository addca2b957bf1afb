"""The words nearest to given ones: python -m lmscale.neighbors --workdir=runs/quickstart Elizabeth happy --k=5

By the cosine of their rows in a table of the run, over every row. Each word gives a JSON object on stdout.
"""

import json
from pathlib import Path

from absl import flags

from lmscale import machine_flags, run_flags, workdir_flags
from lmscale.command_line import DEFINE_path, run_main
from lmscale.data.text_files import read_text

flags.adopt_module_key_flags(run_flags)

_INPUT = DEFINE_path("input", None, "File with a word in each line, in place of words on the command line.")
_TABLE = flags.DEFINE_string("table", None, "Table to search. Without it: that of the softmax.")
_K = flags.DEFINE_integer("k", 10, "Neighbours of each word.", lower_bound=1)


def main(argv):
    """Words to their neighbours, printed."""
    workdir_flags.check()
    words = argv[1:]
    if _INPUT.value is not None:
        if words:
            raise ValueError(
                f"Words must come from one place. Received: {' '.join(words)} and --input={_INPUT.value}. Leave one of "
                "them out."
            )
        words = read_text(Path(_INPUT.value)).split()
    if not words:
        raise ValueError("A word is needed. Received: none. Write words behind the flags, or pass --input.")
    with machine_flags.processes() as group:
        _print_neighbors(words, group)
    return 0


def _print_neighbors(words, group):
    # TensorFlow takes seconds to import: mistakes in flags come before.
    from lmscale.metrics import progress
    from lmscale.nearest import NearestRows
    from lmscale.workdir import Workdir

    with Workdir(workdir_flags.workdir_path(), readonly=True) as workdir:
        restored = run_flags.restored_model(workdir, group)
        nearest = NearestRows(restored, table=_TABLE.value)
        ids = nearest.ids(words)
        group.check_same("The words", ids)
        metadata = restored.restore(restored.step_of(workdir_flags.checkpoint()))
        tokens = nearest.vocabulary.tokens
        with (
            restored.weights(metadata),
            progress(
                total=len(words), initial=0, description="searching", is_shown=group.is_chief
            ) as show_words,
        ):
            found = nearest.nearest(ids, k=_K.value)
            for number, (word, (rows, cosines)) in enumerate(zip(words, found, strict=True), start=1):
                show_words(number)
                if group.is_chief:
                    neighbors = [
                        {"word": tokens[row], "cosine": float(cosine)}
                        for row, cosine in zip(rows, cosines, strict=True)
                    ]
                    print(json.dumps({"word": word, "neighbors": neighbors}, ensure_ascii=False), flush=True)


def run():
    """Console script lmscale-neighbors."""
    run_main(main, takes_arguments=True)


if __name__ == "__main__":
    run()
