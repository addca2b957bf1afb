"""A table with a known best answer: python -m lmscale.benchmarks.planted_classes --output=planted

Every value of each feature belongs to a group, and the groups of an example's values name its class; with the
probability 1 - signal the class is any other one. So no model can be right more often than in `signal` of the examples
(and one of classes by chance), and one that has found the groups is. Writes train.csv, valid.csv, test.csv and
schema.json; prints the bound.
"""

import csv
import json
from pathlib import Path

import numpy as np
from absl import flags

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


def write(output, *, features, values, groups, signal, examples, seed):
    """Writes the files.

    Args:
      output: folder.
      features, values, groups, signal, examples, seed: as the flags of these names.

    Returns:
      The bound: how often the best answer is right.
    """
    if values < groups:
        raise ValueError(f"--values must be at least --groups. Received: {values}, {groups}.")
    rng = np.random.default_rng(seed)
    num_classes = groups**features
    # As many values in each group, but for one.
    group_of = np.stack([rng.permutation(np.arange(values) % groups) for _ in range(features)])
    members = [  # [groups, values] of each feature: the values of a group, again and again.
        np.stack([np.resize(np.flatnonzero(of == group), values) for group in range(groups)])
        for of in group_of
    ]
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    names = [f"feature_{i}" for i in range(features)]
    for split, size in {"train": examples, "valid": examples // 50, "test": examples // 50}.items():
        chosen = rng.integers(0, values, [features, size])
        is_noise = rng.random(size) >= signal
        if split == "train":
            # Every class is planted once at least, so that none is unknown later.
            first = min(size, num_classes)
            wanted = np.unravel_index(rng.permutation(num_classes)[:first], (groups,) * features)
            for feature in range(features):
                chosen[feature, :first] = members[feature][wanted[feature], rng.integers(0, values, first)]
            is_noise[:first] = False
        found = np.take_along_axis(group_of, chosen, axis=1)
        classes = np.ravel_multi_index(tuple(found), (groups,) * features)
        others = (classes + rng.integers(1, num_classes, size)) % num_classes
        classes = np.where(is_noise, others, classes)
        with (output / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow([*names, "number", "label"])
            numbers = rng.normal(size=size)
            for i in range(size):
                writer.writerow([*(f"v{j}" for j in chosen[:, i]), f"{numbers[i]:.4f}", f"c{classes[i]}"])
    schema = {name: {"kind": "categorical"} for name in names}
    schema |= {"number": {"kind": "number"}, "label": {"kind": "class"}}
    (output / "schema.json").write_text(json.dumps({"columns": schema}, indent=2) + "\n", encoding="utf-8")
    return signal


def main(argv):
    """Writes what the flags say."""
    del argv
    if not _OUTPUT.value:
        raise ValueError("--output must name the folder to write to. Received none.")
    bound = write(
        _OUTPUT.value,
        features=_FEATURES.value,
        values=_VALUES.value,
        groups=_GROUPS.value,
        signal=_SIGNAL.value,
        examples=_EXAMPLES.value,
        seed=_SEED.value,
    )
    print(f"Wrote {_OUTPUT.value!r}. No model is right more often than in {bound:.1%} of the examples.")
    return 0


if __name__ == "__main__":
    run_main(main)
