"""Rows of tables, as they are asked for and as they come."""

import dataclasses

import tensorflow as tf


@dataclasses.dataclass(frozen=True)
class Lookup:
    """Rows that a task reads: `ids` [*shape] int32 of the table named `table`."""

    table: str
    ids: tf.Tensor


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of a table, or gradients with respect to them, for which None stands for zero.

    Attributes:
      embedding: [*shape, dim] float32.
      bias: [*shape] float32; None in a table without bias.
    """

    embedding: tf.Tensor | None
    bias: tf.Tensor | None = None


@dataclasses.dataclass(frozen=True)
class ShardRows:
    """Gradients of some rows of a replica's own shard, complete over all replicas.

    Attributes:
      local_rows: [r] int32, rows of the shard; a row that is there twice has the sum of both for its gradient.
      gradients: `Rows` of [r, dim] and [r].
    """

    local_rows: tf.Tensor
    gradients: Rows
