"""Batches of examples in columns, as pure functions of (seed, step)."""

from collections.abc import Mapping

import numpy as np

from lmscale.data.batches import ALL, Batch, checked_step, permuted
from lmscale.data.columns import Lists, PreparedColumns


class Examples:
    """Some columns of a split: `at(rows)` gives their values as features.

    A column of lists has at most `longest` ids an example, the last ones, and beside it NAME_weights [examples,
    longest] float32: 1, or 0 for padding.
    """

    def __init__(self, data: PreparedColumns, split: str, names, *, longest: Mapping[str, int]):
        """Args:
        data: `PreparedColumns`.
        split: its split.
        names: columns.
        longest: {column of lists: ids of an example at most}.
        """
        self._columns = {name: data.column(split, name) for name in names}
        self._longest = longest
        self.size = data.num_examples(split)

    def at(self, rows) -> dict[str, np.ndarray]:
        """{name: [len(rows), ...]} of the examples of these numbers."""
        features = {}
        for name, values in self._columns.items():
            if isinstance(values, Lists):
                length = self._longest[name]
                features[name] = values.padded(rows, length)
                filled = np.minimum(values.lengths[rows], length)
                features[f"{name}_weights"] = (np.arange(length) < filled[:, None]).astype(np.float32)
            elif values.dtype.kind == "f":
                features[name] = np.asarray(values[rows], np.float32)
            else:
                features[name] = values[rows].astype(np.int32)
        return features


class ShuffledExamples:
    """Training batches: every example once an epoch, in an order permuted by (seed, epoch), but for a last part."""

    def __init__(self, examples, *, global_batch_size: int, labels_per_example: int, seed: int):
        """Args:
          examples: `Examples`, or what else has their `at` and `size`.
          global_batch_size: examples of a batch, over all devices.
          labels_per_example: how many heads count each.
          seed: integer >= 0.

        Raises:
          ValueError: if there are fewer examples than in a batch.
        """
        self.steps_per_epoch = examples.size // global_batch_size
        if self.steps_per_epoch < 1:
            raise ValueError(
                "There must be as many examples as in a batch. Received: "
                f"{examples.size:,} examples, global_batch_size={global_batch_size}. Set GLOBAL_BATCH_SIZE to at most "
                f"{examples.size:,}, or prepare more data."
            )
        self.labels_per_step = global_batch_size * labels_per_example
        self._examples, self._seed = examples, seed
        self._places = np.arange(global_batch_size, dtype=np.int64)

    def at(self, step: int, examples: slice = ALL) -> Batch:
        """The batch of a step, or some of its examples."""
        epoch, step_in_epoch = divmod(checked_step(step), self.steps_per_epoch)
        places = step_in_epoch * len(self._places) + self._places[examples]
        rows = permuted(places, self._examples.size, seed=self._seed, epoch=epoch)
        return Batch(self._examples.at(rows), starts_epoch=True, epoch=epoch)


class EveryExample:
    """Evaluation batches: every example once, in order, with "weights" [examples], 0 for padding."""

    def __init__(self, examples, *, batch_size: int, limit: int | None = None):
        """Args:
        examples: as of `ShuffledExamples`.
        batch_size: examples of a batch.
        limit: examples to stop after; None for all.
        """
        self.num_labels = examples.size if limit is None else min(limit, examples.size)
        self.num_steps = -(-self.num_labels // batch_size)
        self._examples, self._batch_size = examples, batch_size

    def at(self, step: int, examples: slice = ALL) -> Batch:
        """The batch of a step, or some of its examples."""
        rows = step * self._batch_size + np.arange(self._batch_size)[examples]
        weights = (rows < self.num_labels).astype(np.float32)
        return Batch({**self._examples.at(np.minimum(rows, self.num_labels - 1)), "weights": weights})
