"""Histories with a known best answer: python -m lmscale.benchmarks.planted_histories --output=histories.txt

Each item has one that follows it, in one circle through all; with the probability 1 - signal any other item comes next.
So no model can rank the next item first more often than in `signal` of the cases (and one of the items by chance), and
one that has found the circle does. Writes "user item" lines, for `lmscale.prepare --format=histories`.
"""

from absl import flags

from lmscale.benchmarks import planted
from lmscale.command_line import DEFINE_path, run_main

_OUTPUT = DEFINE_path("output", None, "File to write.")
_USERS = flags.DEFINE_integer("users", 4_000, "Users.", lower_bound=1)
_ITEMS = flags.DEFINE_integer("items", 1_000, "Items.", lower_bound=2)
_SIGNAL = flags.DEFINE_float(
    "signal", 0.8, "How often the planted item is next.", lower_bound=0, upper_bound=1
)
_SEED = flags.DEFINE_integer("seed", 0, "Of everything that is drawn.", lower_bound=0)


def main(argv):
    """Writes what the flags say."""
    del argv
    if not _OUTPUT.value:
        raise ValueError("--output must name the file to write. Received none.")
    planted.write_histories(
        _OUTPUT.value, users=_USERS.value, items=_ITEMS.value, signal=_SIGNAL.value, seed=_SEED.value
    )
    print(f"Wrote {_OUTPUT.value!r}. No model ranks more than {_SIGNAL.value:.1%} of the next items first.")
    return 0


if __name__ == "__main__":
    run_main(main)
