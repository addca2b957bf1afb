"""Histories of users, "user item" a line in the order of time, to a prepared directory: what comes next for each."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from lmscale.data.columns import Column, ColumnsWriter, Lists, PreparedColumns
from lmscale.data.prepared_directory import PreparedDirectoryWriter
from lmscale.data.text_files import read_blocks
from lmscale.data.there_already import Report, describe_files, meter, there_already
from lmscale.data.vocab import Vocabulary
from lmscale.doing import doing

ITEMS = "items"
_LEAST_EVENTS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeaveLastOut:
    """Which items of a user are targets, and of which split.

    Attributes:
      valid_users: how many users lose the item before the last one to validation, chosen by their names; None for all.
        Those of the others are trained on.

    The last item of each user is the target of the test, and its history all before it. The target of validation is
    the item before the last. Training has what is before the targets.
    """

    valid_users: int | None = None

    def __post_init__(self):
        if self.valid_users is not None and self.valid_users < 1:
            raise ValueError(
                f"valid_users must be at least 1. Received: {self.valid_users}. Leave it out for all."
            )


def prepare_histories(
    files: Sequence[Path],
    *,
    output: Path,
    rule: LeaveLastOut,
    overwrite: bool = False,
    report: Report = lambda phase, done, total: None,
) -> tuple[PreparedColumns, bool]:
    """Prepares histories.

    Items are rows in the order of falling counts in the training histories, equal ones by code point; those that only
    targets name have a row, too. The lines of a user need not follow each other. A user with fewer than three items
    has no targets: all are trained on.

    Args:
      files: texts, plain or compressed, read one after the other.
      output: the directory to make.
      rule: what is held out.
      overwrite: whether to replace a prepared directory there.
      report: called with (phase, bytes done, bytes in all).

    Returns:
      The data, and whether it was made: not if it was there already.

    Raises:
      ValueError: for a line that is not a user and an item; for too few users; as `preparation.prepare` of the output.
    """
    options = {"format": "histories", "leave_last_out": dataclasses.asdict(rule)}
    num_bytes = sum(path.stat().st_size for path in files)

    def inputs():
        return describe_files({"input": files}, on_bytes=meter("checking", num_bytes, report))

    there = there_already(
        output, open_data=PreparedColumns.open, options=options, inputs=inputs, overwrite=overwrite
    )
    if there is not None:
        return there, False
    with doing("reading the histories"):
        users = _read(files, on_bytes=meter("reading", num_bytes, report))
    with_targets = sorted(user for user, items in users.items() if len(items) >= _LEAST_EVENTS)
    if not with_targets:
        raise ValueError(
            f"A user at least must have {_LEAST_EVENTS} items. Received: {len(users):,} users, none with so many. Each "
            'line is "user item", in the order of time.'
        )
    if rule.valid_users is not None and rule.valid_users > len(with_targets):
        raise ValueError(
            f"valid_users must be at most the users with {_LEAST_EVENTS} items. Received: valid_users="
            f"{rule.valid_users}, {len(with_targets):,} such users. Give fewer, or leave it out for all."
        )
    chosen = with_targets
    if rule.valid_users is not None:
        generator = np.random.Generator(np.random.Philox(key=0))
        chosen = [
            with_targets[i]
            for i in np.sort(generator.choice(len(with_targets), rule.valid_users, replace=False))
        ]
    of_valid, of_test = set(chosen), set(with_targets)
    train = [items[: len(items) - (user in of_test) - (user in of_valid)] for user, items in users.items()]
    counts = Counter(item for items in train for item in items)
    counts.update({item: 0 for items in users.values() for item in items})
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    vocabulary = Vocabulary(
        tokens=tuple(item for item, _ in ranked), counts=np.array([count for _, count in ranked], np.int64)
    )
    splits = {
        "train": (train, None),
        "valid": (
            [items[:-2] for user, items in users.items() if user in of_valid],
            [items[-2] for user, items in users.items() if user in of_valid],
        ),
        "test": (
            [items[:-1] for user, items in users.items() if user in of_test],
            [items[-1] for user, items in users.items() if user in of_test],
        ),
    }
    with PreparedDirectoryWriter(output, replace=overwrite) as writer, doing("writing the histories"):
        columns = ColumnsWriter(writer)
        columns.vocabulary(ITEMS, vocabulary)
        columns.column("history", Column(type="lists", vocabulary=ITEMS))
        columns.column("target", Column(type="ids", vocabulary=ITEMS))
        for split, (histories, targets) in splits.items():
            values: dict = {"history": _lists(histories, vocabulary.ids)}
            told = {"events": len(values["history"].values)}
            if targets is not None:
                ids = np.array([vocabulary.ids[item] for item in targets], np.int64)
                values["target"] = ids
                # No model can know them: a bound on what can be hit.
                told["targets_never_trained_on"] = int(np.count_nonzero(vocabulary.counts[ids] == 0))
            columns.split(split, values, **told)
        columns.finish(options=options, inputs=inputs())
    return PreparedColumns.open(output), True


def _read(files: Sequence[Path], *, on_bytes: Callable[[int], None]) -> dict[str, list[str]]:
    """{user: items in order}."""
    users: dict[str, list[str]] = {}
    for path in files:
        number = 0
        for block in read_blocks(path, on_bytes=on_bytes):
            for line in block.lines:
                number += 1
                fields = line.split()
                if len(fields) != 2:
                    raise ValueError(
                        f'Each line must be "user item", in the order of time. Received: {path}, line {number:,}: '
                        f"{line[:80]!r}, of {len(fields)} fields. Correct the line, or take it out."
                    )
                users.setdefault(fields[0], []).append(fields[1])
    return users


def _lists(histories, ids) -> Lists:
    offsets = np.concatenate([[0], np.cumsum([len(items) for items in histories])]).astype(np.int64)
    values = np.fromiter((ids[item] for items in histories for item in items), np.int64, offsets[-1])
    return Lists(values, offsets)
