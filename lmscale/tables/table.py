"""The vocabulary matrix, sharded: pull rows, push gradients."""

import dataclasses

import numpy as np
import tensorflow as tf

from lmscale.distribution import collectives
from lmscale.distribution.strategies import first_local_replica
from lmscale.tables.placement import Placement

# Ids initialised at a time: fixed, so that a row's first value depends on (seed, id) and not on the number of shards.
_INITIAL_BLOCK_ROWS = 65_536


@dataclasses.dataclass(frozen=True)
class PulledRows:
    """Rows of one replica, dense and local: differentiate with respect to these.

    `ids` are this replica's, of any shape; `shared_ids` [num_shared] are the same on every replica. Bias fields are
    None for a table without bias.
    """

    ids: tf.Tensor
    shared_ids: tf.Tensor
    embedding: tf.Tensor  # ids.shape + [embed_dim]
    bias: tf.Tensor | None  # ids.shape
    shared_embedding: tf.Tensor  # [num_shared, embed_dim]
    shared_bias: tf.Tensor | None  # [num_shared]

    def labels_of_windows(self):
        """The rows that play the label's role in windows [batch, time + 1] of ids: positions 1 and on, flattened."""
        return dataclasses.replace(
            self,
            ids=tf.reshape(self.ids[:, 1:], [-1]),
            embedding=tf.reshape(self.embedding[:, 1:], [-1, self.embedding.shape[-1]]),
            bias=None if self.bias is None else tf.reshape(self.bias[:, 1:], [-1]),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowGradients:
    """Gradients with respect to the fields of a `PulledRows`, of the same shapes. None stands for zero."""

    embedding: tf.Tensor | None = None
    shared_embedding: tf.Tensor | None = None
    bias: tf.Tensor | None = None
    shared_bias: tf.Tensor | None = None


@dataclasses.dataclass(frozen=True)
class MergedGradients:
    """What this shard is about to apply: each of its rows at most once.

    `local_rows` [rows] int32 are local row numbers, padded with the scratch row; None means every row of the shard.
    """

    local_rows: tf.Tensor | None
    gradients: dict  # parameter name -> [rows, ...]
    num_rows: tf.Tensor  # rows of the vocabulary touched on this shard
    squared_norm: tf.Tensor  # over all shards


class ShardedTable:
    """A [vocab_size, embed_dim] matrix and an optional [vocab_size] bias, 1/N of the rows on each of N replicas.

    Tied use: the same row is a word's input embedding and its softmax weight. The optimizer's slots are sharded with
    the rows. Neither is ever replicated, gathered whole, or made dense. Create it inside `strategy.scope()`, of a
    strategy whose replicas all have variables of their own (Mirrored, MultiWorkerMirrored, OneDevice, or none); call
    `pull`, `merge`, `apply` and `push` inside `strategy.run`.

    Attributes:
      parameters: {name: per-replica variable [allocated_rows, ...]}, names "embedding" and "bias".
      slots: {name: {slot: per-replica variable}}.
    """

    def __init__(
        self,
        *,
        vocab_size,
        embed_dim,
        optimizer=None,
        bias=True,
        initializer=None,
        seed=0,
    ):
        """Args:
        vocab_size: rows.
        embed_dim: columns.
        optimizer: a `UpdateRule`, or None for a table that is only read.
        bias: whether each row also has a softmax bias, initially 0.
        initializer: function (shape, seed) -> float32 tensor, called for blocks of rows; by default uniform
          with bound embed_dim ** -0.5, which gives logits of unit order for a hidden state of unit order.
        seed: int.
        """
        strategy = tf.distribute.get_strategy()
        self.placement = Placement(vocab_size=vocab_size, num_shards=strategy.num_replicas_in_sync)
        self.vocab_size = vocab_size
        self.embed_dim = embed_dim
        self.optimizer = optimizer
        self._strategy = strategy
        self._layout = table_layout(
            vocab_size=vocab_size, embed_dim=embed_dim, optimizer=optimizer, bias=bias
        )
        self.parameters = {e.name: self._make_variable(e) for e in self._layout if not e.is_slot}
        self.slots = {name: {} for name in self.parameters}
        for entry in self._layout:
            if entry.is_slot:
                name, slot_name = entry.name.split("/")
                self.slots[name][slot_name] = self._make_variable(entry)
        self._initialise(initializer or _uniform(embed_dim**-0.5), seed)

    def _make_variable(self, entry):
        shape = [self.placement.allocated_rows, *entry.row_shape]
        return collectives.local_variable(
            lambda: tf.fill(shape, tf.cast(entry.initial_value, entry.dtype)),
            dtype=entry.dtype,
            name=entry.name.replace("/", "_"),
        )

    def _initialise(self, initializer, seed):
        for block, start in enumerate(range(0, self.vocab_size, _INITIAL_BLOCK_ROWS)):
            # Always a whole block, cut afterwards: a row does not depend on vocab_size either.
            values = initializer([_INITIAL_BLOCK_ROWS, self.embed_dim], [seed, block])
            stop = min(start + _INITIAL_BLOCK_ROWS, self.vocab_size)
            self.write_rows("embedding", start, values[: stop - start].numpy())

    # -- inside strategy.run ------------------------------------------------------------------------------------

    def local_parameter(self, name):
        """This replica's shard of a parameter, [allocated_rows, ...]; None if the table has no such parameter."""
        if name not in self.parameters:
            return None
        if collectives.num_replicas() != self.placement.num_shards:
            raise ValueError(
                "A table must be used under the strategy in whose scope it was created. Received: a table of "
                f"{self.placement.num_shards} shard(s) on {collectives.num_replicas()} replica(s). Create it inside "
                "strategy.scope() and use it inside strategy.run."
            )
        return collectives.local_value(self.parameters[name])

    @property
    def num_valid_rows(self):
        """Rows of this replica's shard that belong to the vocabulary."""
        return self.placement.num_valid_rows(collectives.replica_id())

    def _local_rows(self, ids):
        """Local row of the ids that this shard owns, the scratch row for the others."""
        ids = tf.cast(ids, tf.int32)
        own = tf.equal(self.placement.owner(ids), tf.cast(collectives.replica_id(), tf.int32))
        return tf.where(own, self.placement.local_row(ids), self.placement.scratch_row)

    def pull(self, ids, shared_ids=None):
        """Fetches rows from their owners.

        Ids outside [0, vocab_size) are undefined behaviour here: check data where it enters.

        Args:
          ids: int tensor of any static shape, this replica's own; the same shape on every replica.
          shared_ids: [num_shared] ids that every replica needs, the same on each (sampled negatives); None for none.

        Returns:
          `PulledRows`, float32.

        Raises:
          ValueError: if the shape of ids is not static, or the table was made for another number of replicas.

        Communication: all-gather of `ids`; one all-reduce of [N * ids + num_shared, embed_dim + 1] rows, to which
        each shard contributes the rows it owns and zeros elsewhere (the sum is exact). None with one replica.
        """
        shared_ids = tf.zeros([0], tf.int32) if shared_ids is None else tf.cast(shared_ids, tf.int32)
        ids = tf.cast(ids, tf.int32)
        if not (ids.shape.is_fully_defined() and shared_ids.shape.is_fully_defined()):
            raise ValueError(
                "ids and shared_ids must have static shapes. Received: "
                f"{ids.shape} and {shared_ids.shape}. Fix the batch size, or use tf.ensure_shape."
            )
        flat_ids = tf.reshape(ids, [-1])
        count = flat_ids.shape[0]
        wanted = tf.concat([collectives.all_gather(flat_ids), shared_ids], axis=0)
        local_rows = self._local_rows(wanted)
        # The scratch row is zero and stays zero (its gradient always is), so rows of other shards come out as zeros.
        rows = [tf.gather(self.local_parameter(name), local_rows) for name in self.parameters]
        rows = _sum_over_replicas(rows)
        first = collectives.replica_id() * count
        num_gathered = count * collectives.num_replicas()
        own = [tf.reshape(x[first : first + count], ids.shape + x.shape[1:]) for x in rows]
        shared = [x[num_gathered:] for x in rows]
        return PulledRows(
            ids=ids,
            shared_ids=shared_ids,
            embedding=own[0],
            bias=own[1] if len(own) > 1 else None,
            shared_embedding=shared[0],
            shared_bias=shared[1] if len(shared) > 1 else None,
        )

    def merge(self, pulled, gradients, *, dense=None):
        """Brings gradients home: every shard receives those of its rows, duplicates summed.

        Args:
          pulled: the `PulledRows` they belong to.
          gradients: `RowGradients` of this replica's share of the loss (the shares add up to the loss).
          dense: {parameter: [allocated_rows, ...]} gradients of this shard's every row that are already complete (a
            full softmax), or None. With it, every row counts as touched.

        Returns:
          `MergedGradients`.

        Communication: all-gather of ids and of the gradients of `ids`, [N * ids, embed_dim + 1]; all-reduce of those of
        `shared_ids`, [num_shared, embed_dim + 1], and of the scalar squared norm.
        """
        count = int(np.prod(pulled.ids.shape))
        ids = tf.concat([collectives.all_gather(tf.reshape(pulled.ids, [-1])), pulled.shared_ids], axis=0)
        own = _gather_over_replicas(
            [
                tf.reshape(_or_zeros(gradients.embedding, pulled.embedding), [count, self.embed_dim]),
                *(
                    []
                    if pulled.bias is None
                    else [tf.reshape(_or_zeros(gradients.bias, pulled.bias), [count])]
                ),
            ]
        )
        shared = _sum_over_replicas(
            [
                _or_zeros(gradients.shared_embedding, pulled.shared_embedding),
                *([] if pulled.bias is None else [_or_zeros(gradients.shared_bias, pulled.shared_bias)]),
            ]
        )
        stacked = [tf.concat(pair, axis=0) for pair in zip(own, shared, strict=True)]
        local_rows = self._local_rows(ids)
        if dense is None:
            local_rows, segments = _unique_rows(local_rows, self.placement.scratch_row)
            num_segments = local_rows.shape[0]
            num_rows = tf.reduce_sum(tf.cast(local_rows < self.placement.scratch_row, tf.int32))
        else:
            local_rows, segments, num_segments = None, local_rows, self.placement.allocated_rows
            num_rows = tf.cast(self.num_valid_rows, tf.int32)
        merged = {}
        for name, values in zip(self.parameters, stacked, strict=True):
            merged[name] = tf.math.unsorted_segment_sum(values, segments, num_segments)
            if dense is not None:
                merged[name] += dense[name]
        # Gradients of rows owned elsewhere were summed into the scratch row: not this shard's, drop them.
        keep = (
            tf.range(self.placement.allocated_rows) < self.placement.scratch_row
            if local_rows is None
            else local_rows < self.placement.scratch_row
        )
        merged = {name: tf.where(_as_column(keep, x), x, 0.0) for name, x in merged.items()}
        squared_norm = tf.add_n([tf.reduce_sum(tf.square(x)) for x in merged.values()])
        return MergedGradients(
            local_rows=local_rows,
            gradients=merged,
            num_rows=num_rows,
            squared_norm=collectives.all_reduce_sum(squared_norm),
        )

    def apply(self, merged, *, step, scale=1.0, keep=True):
        """Updates this shard's touched rows and their slots, once each.

        Args:
          merged: `MergedGradients`.
          step: int scalar tensor, updates done before this one.
          scale: factor on the gradients (clipping by global norm).
          keep: bool scalar; False leaves every row and slot as it is (a step with a non-finite loss).

        Communication: none.
        """
        if self.optimizer is None:
            raise ValueError(
                "A table needs an optimizer to be updated. Received: optimizer=None. Pass a UpdateRule."
            )
        rows = merged.local_rows
        if rows is not None:
            rows = tf.where(keep, rows, self.placement.scratch_row)
        for name, gradient in merged.gradients.items():
            variables = {"": self.parameters[name], **self.slots[name]}
            variables = {key: collectives.local_value(variable) for key, variable in variables.items()}
            old = {
                key: v.read_value() if rows is None else tf.gather(v, rows) for key, v in variables.items()
            }
            weights = old.pop("")
            gradient = tf.where(keep, gradient * scale, 0.0)
            new_weights, new_slots = self.optimizer.update_rows(
                weights=weights, gradients=gradient, slots=old, step=step
            )
            for key, value in {"": new_weights, **new_slots}.items():
                if rows is None:
                    variables[key].assign(tf.where(keep, value, variables[key]))
                else:
                    variables[key].scatter_update(tf.IndexedSlices(value, rows))

    def push(self, pulled, gradients, *, step):
        """`merge` and `apply` in one: for training loops without clipping over body and rows together."""
        merged = self.merge(pulled, gradients)
        self.apply(merged, step=step)
        return merged

    # -- on the host, outside strategy.run ------------------------------------------------------------------------

    def variables(self):
        """{name: (per-replica variable, row shape)} of parameters ("embedding") and slots ("embedding/accumulator")."""
        named = dict(self.parameters)
        for name, slots in self.slots.items():
            named.update({f"{name}/{slot}": variable for slot, variable in slots.items()})
        return named

    def _components(self, name):
        """[(shard id, variable)] of the shards of `name` that this process holds."""
        components = self._strategy.experimental_local_results(self.variables()[name])
        first = first_local_replica(self._strategy, num_local=len(components))
        return list(enumerate(components, start=first))

    def read_rows(self, name, start, stop):
        """Rows [start, stop) of the logical [vocab_size, ...] tensor `name` in id order, as a numpy array.

        Raises:
          ValueError: if there are no such rows, or this process does not hold all shards.
        """
        self._check_range(name, start, stop)
        n = self.placement.num_shards
        first, last = start // n, -(-stop // n)
        components = self._components(name)
        if len(components) < n:
            raise ValueError(
                f"Rows are read by a process that holds all shards. Received: {len(components)} of {n} here. "
                "Read them under a strategy of one process."
            )
        # Gathered and scattered, here and below: a slice of a variable copies the whole of it once scatter updates
        # have touched it.
        blocks = [tf.gather(component, tf.range(first, last)).numpy() for _, component in components]
        rows = np.stack(blocks, axis=1).reshape((-1, *blocks[0].shape[1:]))
        return rows[start - first * n : stop - first * n]

    def write_rows(self, name, start, values):
        """Writes rows [start, start + len(values)) of the logical tensor `name`: those that this process holds.

        Raises:
          ValueError: if there are no such rows, or values are not of their shape. Nothing is written then.
        """
        self._check_range(name, start, start + len(values))
        self._check_row_shape(name, values)
        n = self.placement.num_shards
        for shard_id, component in self._components(name):
            offset = (shard_id - start) % n  # of the first id in the block that this shard owns
            mine = values[offset::n]
            if len(mine):
                first = (start + offset) // n
                component.scatter_update(tf.IndexedSlices(mine, tf.range(first, first + len(mine))))

    def write_ids(self, name, ids, values):
        """Writes the rows `ids` of the logical tensor `name`: those that this process holds.

        Args:
          name: of a parameter or slot, as in `variables`.
          ids: [n] int, distinct, in any order.
          values: [n, ...], the row of each id.

        Raises:
          ValueError: if an id is out of range or there twice, or values are not of their shape. Nothing is written
            then.
        """
        ids, values = np.asarray(ids), np.asarray(values)
        if ids.ndim != 1 or ids.dtype.kind not in "iu" or len(ids) != len(values):
            raise ValueError(
                f"ids must be [n] integers, one for each of the values. Received: shape {ids.shape} of {ids.dtype} "
                f"for {len(values)} values."
            )
        self._check_row_shape(name, values)
        if not len(ids):
            return
        self._check_range(name, int(ids.min()), int(ids.max()) + 1)
        distinct, counts = np.unique(ids, return_counts=True)
        if len(distinct) < len(ids):
            raise ValueError(
                "ids must be distinct, for which of two rows would be kept is not known. Received: id "
                f"{distinct[counts > 1][0]} {counts.max()} times. Pass each id once."
            )
        owner, local_rows = self.placement.owner(ids), self.placement.local_row(ids)
        for shard_id, component in self._components(name):
            mine = np.flatnonzero(owner == shard_id)
            if len(mine):
                component.scatter_update(
                    tf.IndexedSlices(values[mine], tf.constant(local_rows[mine], tf.int32))
                )

    def _check_row_shape(self, name, values):
        row_shape = tuple(self.variables()[name].shape[1:])
        if tuple(np.shape(values)[1:]) != row_shape:
            raise ValueError(
                f"values must have the shape [rows, ...] of {name!r}, {('rows', *row_shape)}. Received: "
                f"{tuple(np.shape(values))}."
            )

    def _check_range(self, name, start, stop):
        if name not in self.variables():
            raise ValueError(f"name must be one of {sorted(self.variables())}. Received: {name!r}.")
        if not 0 <= start <= stop <= self.vocab_size:
            raise ValueError(
                f"Rows must lie in 0 .. vocab_size. Received: [{start}, {stop}), vocab_size={self.vocab_size}."
            )

    def bytes_per_shard(self):
        """{name: bytes} of parameters and slots that each device holds; scratch and padding rows included."""
        return {entry.name: entry.bytes_on_shard(self.placement) for entry in self._layout}


@dataclasses.dataclass(frozen=True)
class TableEntry:
    """One tensor of a table: a parameter, "embedding", or a slot of one, "embedding/accumulator"."""

    name: str
    row_shape: tuple[int, ...]
    dtype: tf.DType
    initial_value: float

    @property
    def is_slot(self):
        return "/" in self.name

    def bytes_on_shard(self, placement):
        """Bytes allocated on each shard, scratch and padding rows included."""
        return placement.allocated_rows * int(np.prod(self.row_shape, dtype=np.int64)) * self.dtype.size


def table_layout(*, vocab_size, embed_dim, optimizer, bias):
    """The tensors of a `ShardedTable` without making them, a list of `TableEntry`; arguments as the table's."""
    if vocab_size < 1 or embed_dim < 1:
        raise ValueError(
            "vocab_size and embed_dim must be at least 1. Received: "
            f"vocab_size={vocab_size}, embed_dim={embed_dim}. Set EMBED_DIM to a positive number."
        )
    row_shapes = {"embedding": (embed_dim,), **({"bias": ()} if bias else {})}
    entries = [TableEntry(name, shape, tf.float32, 0.0) for name, shape in row_shapes.items()]
    for name, shape in row_shapes.items():
        for slot_name, slot in (optimizer.slots if optimizer else {}).items():
            row_shape = shape if slot.per_element else ()
            entries.append(TableEntry(f"{name}/{slot_name}", row_shape, slot.dtype, slot.initial_value))
    return entries


def _uniform(bound):
    def initialise(shape, seed):
        return tf.random.stateless_uniform(shape, seed, -bound, bound)

    return initialise


def _or_zeros(gradient, like):
    return tf.zeros_like(like) if gradient is None else tf.cast(gradient, tf.float32)


def _as_column(mask, like):
    return tf.reshape(mask, [-1] + [1] * (len(like.shape) - 1))


def _one_matrix(tensors):
    """[rows, dim] and perhaps [rows] side by side, so that one collective moves both."""
    return tf.concat([tensors[0], *(x[:, tf.newaxis] for x in tensors[1:])], axis=1)


def _split_matrix(matrix, tensors):
    dim = tensors[0].shape[1]
    return [matrix[:, :dim], *(matrix[:, dim + i] for i in range(len(tensors) - 1))]


def _sum_over_replicas(tensors):
    if collectives.num_replicas() == 1:
        return tensors
    return _split_matrix(collectives.all_reduce_sum(_one_matrix(tensors)), tensors)


def _gather_over_replicas(tensors):
    if collectives.num_replicas() == 1:
        return tensors
    return _split_matrix(collectives.all_gather(_one_matrix(tensors)), tensors)


def _unique_rows(local_rows, scratch_row):
    """Numbers the distinct rows of `local_rows` with static shapes (XLA has no `tf.unique`).

    Returns:
      (rows [n]: the distinct rows, in rising order, padded with the scratch row; segments [n]: for each entry, the
      position of its row in `rows`). n = len(local_rows).
    """
    size = local_rows.shape[0]
    order = tf.argsort(local_rows, stable=True)
    in_order = tf.gather(local_rows, order)
    is_first = tf.concat([[True], in_order[1:] != in_order[:-1]], axis=0)[:size]
    segments_in_order = tf.cumsum(tf.cast(is_first, tf.int32)) - 1
    segments = tf.scatter_nd(order[:, tf.newaxis], segments_in_order, [size])
    # tensor_scatter_nd_update: duplicates write equal values.
    rows = tf.tensor_scatter_nd_update(tf.fill([size], scratch_row), segments[:, tf.newaxis], local_rows)
    return rows, segments
