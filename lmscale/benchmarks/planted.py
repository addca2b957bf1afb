"""Data with a known best answer: tables of classes, and histories of items."""

import csv
import json
from pathlib import Path

import numpy as np

_LEAST, _MOST = 5, 15  # Items of a history.


def write_classes(output, *, features, values, groups, signal, examples, seed):
    """Writes a table whose classes follow from groups of values: train.csv, valid.csv, test.csv and schema.json.

    Args:
      output: folder.
      features: categorical features.
      values: of each.
      groups: of the values of each; there are groups**features classes.
      signal: how often the class is the planted one; else it is any other one.
      examples: of the training; a fiftieth for the others.
      seed: of all that is drawn.

    Raises:
      ValueError: if there are fewer values than groups, or examples than classes.
    """
    if values < groups:
        raise ValueError(f"--values must be at least --groups. Received: {values}, {groups}.")
    rng = np.random.default_rng(seed)
    num_classes = groups**features
    if examples < num_classes:
        raise ValueError(
            f"There must be an example of each class. Received: {examples:,} examples, {num_classes:,} classes, "
            "groups**features. Draw more examples, or fewer groups."
        )
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


def write_histories(output, *, users, items, signal, seed):
    """Writes histories, "user item" a line, in which an item is mostly followed by the one that belongs to it.

    Args:
      output: path.
      users, items: how many.
      signal: how often the planted item is next; else it is any other one.
      seed: of all that is drawn.
    """
    rng = np.random.default_rng(seed)
    circle = rng.permutation(items)
    place_of = np.argsort(circle)
    lines = []
    for user in range(users):
        item = rng.integers(items)
        for _ in range(rng.integers(_LEAST, _MOST + 1)):
            lines.append(f"user{user} item{item}\n")
            planted = circle[(place_of[item] + 1) % items]
            item = planted if rng.random() < signal else (planted + rng.integers(1, items)) % items
    Path(output).write_text("".join(lines), encoding="utf-8")
