"""What one replica reads of the tables for a batch: parts of one pull a table, and the way back of gradients."""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import tensorflow as tf

from lmscale.tables.rows import Rows
from lmscale.tables.table import PulledRows
from lmscale.tasks.task import Labels


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepRows:
    """All rows of a step on one replica, or the gradients with respect to them (then None stands for zero).

    Attributes:
      roles: {role: `Rows` [examples, ...]} that the task's `forward` reads.
      labels: {head: `Rows` [n]}, only of heads that need them.
      candidates: {head: `Rows` [num_candidates]}, only of heads that have them.
    """

    roles: Mapping[str, Rows]
    labels: Mapping[str, Rows]
    candidates: Mapping[str, Rows]


@dataclasses.dataclass(frozen=True)
class OwnLabels:
    """A replica's `count` labels from `start` on, among the `total` of the global batch and `padding` after them."""

    start: Any
    count: int
    total: int
    padding: int

    def of(self, rows):
        """This replica's of the `Rows` of all labels; zeros for padding."""

        def cut(x):
            if self.padding:
                x = tf.pad(x, [[0, self.padding]] + [[0, 0]] * (len(x.shape) - 1))
            begin, size = [self.start] + [0] * (len(x.shape) - 1), [self.count, *x.shape[1:]]
            return tf.ensure_shape(tf.slice(x, begin, size), size)

        return Rows(cut(rows.embedding), None if rows.bias is None else cut(rows.bias))

    def added(self, d_all, d_own):
        """Gradients of the `Rows` of all labels, as candidates, with those of this replica's, as labels; float32.

        Of a batch of training, which has no padding.
        """

        def add(of_all, of_own):
            if of_own is None:
                return of_all
            if of_all is None:
                of_all = tf.zeros([self.total, *of_own.shape[1:]])
            of_all, of_own = tf.cast(of_all, tf.float32), tf.cast(of_own, tf.float32)
            if not isinstance(self.start, int):  # One program for every core (TPU).
                places = self.start + tf.range(self.count)
                return tf.tensor_scatter_nd_add(of_all, places[:, tf.newaxis], of_own)
            stop = self.start + self.count
            return tf.concat(
                [of_all[: self.start], of_all[self.start : stop] + of_own, of_all[stop:]], axis=0
            )

        d_all, d_own = d_all or Rows(None), d_own or Rows(None)
        return Rows(add(d_all.embedding, d_own.embedding), add(d_all.bias, d_own.bias))


@dataclasses.dataclass(frozen=True)
class Receipt:
    """What one table's pull was made of: parts (kind, key, table, ids) of the own and of the shared ids, in order.

    And {head: `OwnLabels`} of the heads whose labels' rows are among those of the candidates.
    """

    pulled: PulledRows
    own_parts: list
    shared_parts: list
    own_labels: dict


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """One replica's part of a batch, and all rows that it asks for.

    Attributes:
      features: {name: [examples, ...]}.
      labels: {head: `Labels`}.
      candidates: {head: candidates or None}; empty if no training loss is asked for.
      rows: `StepRows`.
      receipts: of the pulls, for `Model.collect`.
    """

    features: Mapping[str, tf.Tensor]
    labels: Mapping[str, Labels]
    candidates: Mapping[str, Any]
    rows: StepRows
    receipts: Mapping[str, Receipt]


def joined(parts):
    """The ids of parts as one [n] int32 tensor; of none, [0]."""
    flat = [tf.cast(tf.reshape(ids, [-1]), tf.int32) for *_, ids in parts]
    return tf.concat(flat or [tf.zeros([0], tf.int32)], axis=0)


def parted(parts, embedding, bias):
    """`Rows` of each part, flat, of what was pulled for `joined(parts)`."""
    sizes = [ids.shape.num_elements() for *_, ids in parts]
    stops = list(itertools.accumulate(sizes))
    return [
        Rows(embedding[stop - size : stop], None if bias is None else bias[stop - size : stop])
        for size, stop in zip(sizes, stops, strict=True)
    ]


def stacked(parts, d_rows, *, table):
    """Gradients of parts as one `Rows`, flat, float32, in the order of `joined(parts)`."""
    embeddings, biases = [], []
    for kind, key, _, ids in parts:
        gradient = getattr(d_rows, kind).get(key) or Rows(None)
        count = ids.shape.num_elements()
        embeddings.append(_flat_or_zeros(gradient.embedding, [count, table.embed_dim]))
        biases.append(_flat_or_zeros(gradient.bias, [count]))
    has_bias = "bias" in table.parameters
    return Rows(
        _end_to_end(embeddings, like=[table.embed_dim]), _end_to_end(biases, like=[]) if has_bias else None
    )


def _end_to_end(tensors, *, like):
    """Tensors along their first axis, as one; of none, [0, *like]. One stays as it is: it is not copied."""
    if len(tensors) == 1:
        return tensors[0]
    return tf.concat(tensors or [tf.zeros([0, *like])], axis=0)


def _flat_or_zeros(gradient, shape):
    return tf.zeros(shape) if gradient is None else tf.reshape(tf.cast(gradient, tf.float32), shape)
