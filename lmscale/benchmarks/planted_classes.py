"""A table with a known best answer: python -m lmscale.benchmarks.planted_classes --output=planted

Every value of each feature belongs to a group, and the groups of an example's values name its class; with the
probability 1 - signal the class is any other one. So no model can be right more often than in `signal` of the examples
(and one of classes by chance), and one that has found the groups is. Writes train.csv, valid.csv, test.csv and
schema.json; prints the bound.
"""

from absl import flags

from lmscale.benchmarks import planted
from lmscale.command_line import DEFINE_path, run_main

_OUTPUT = DEFINE_path("output", None, "Folder to write to.")
_FEATURES = flags.DEFINE_integer("features", 3, "Categorical features.", lower_bound=1)
_VALUES = flags.DEFINE_integer("values", 10_000, "Values of each.", lower_bound=1)
_GROUPS = flags.DEFINE_integer(
    "groups", 29, "Groups of each: there are groups**features classes.", lower_bound=2
)
_SIGNAL = flags.DEFINE_float(
    "signal", 0.8, "How often the class is the planted one.", lower_bound=0, upper_bound=1
)
_EXAMPLES = flags.DEFINE_integer(
    "examples", 600_000, "Training examples; a fiftieth for the others.", lower_bound=50
)
_SEED = flags.DEFINE_integer("seed", 0, "Of everything that is drawn.", lower_bound=0)


def main(argv):
    """Writes what the flags say."""
    del argv
    if not _OUTPUT.value:
        raise ValueError("--output must name the folder to write to. Received none.")
    planted.write_classes(
        _OUTPUT.value,
        features=_FEATURES.value,
        values=_VALUES.value,
        groups=_GROUPS.value,
        signal=_SIGNAL.value,
        examples=_EXAMPLES.value,
        seed=_SEED.value,
    )
    print(
        f"Wrote {_OUTPUT.value!r}. No model is right more often than in {_SIGNAL.value:.1%} of the examples."
    )
    return 0


if __name__ == "__main__":
    run_main(main)
