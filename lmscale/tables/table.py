"""The vocabulary matrix, sharded: pull rows, push gradients."""

import dataclasses
from collections.abc import Mapping

import numpy as np
import tensorflow as tf

from lmscale.distribution import collectives, ledger
from lmscale.distribution.all_to_all import all_to_all_on_hosts, gather_on_hosts
from lmscale.distribution.strategies import first_local_replica
from lmscale.parameters.initializers import default_initializer, initial_rows
from lmscale.tables.all_to_all import choose_exchange
from lmscale.tables.exchange import Route
from lmscale.tables.placement import Placement


@dataclasses.dataclass(frozen=True)
class PulledRows:
    """Rows of one replica, dense and local: differentiate with respect to these.

    `ids` are this replica's, of any shape; `shared_ids` [num_shared] are the same on every replica. Bias fields are
    None for a table without bias. `route` is the way that the rows came and that their gradients go.
    """

    ids: tf.Tensor
    shared_ids: tf.Tensor
    embedding: tf.Tensor  # ids.shape + [embed_dim]
    bias: tf.Tensor | None  # ids.shape
    shared_embedding: tf.Tensor  # [num_shared, embed_dim]
    shared_bias: tf.Tensor | None  # [num_shared]
    route: Route


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowGradients:
    """Gradients with respect to the fields of a `PulledRows`, of the same shapes. None stands for zero."""

    embedding: tf.Tensor | None = None
    shared_embedding: tf.Tensor | None = None
    bias: tf.Tensor | None = None
    shared_bias: tf.Tensor | None = None


@dataclasses.dataclass(frozen=True)
class CollectedGradients:
    """What this shard is about to apply: each of its rows at most once.

    `local_rows` [rows] int32 are local row numbers, perhaps padded with the scratch row, whose gradient is 0; None
    means every row of the shard.
    """

    local_rows: tf.Tensor | None
    gradients: dict  # parameter name -> [rows, ...]
    num_rows: tf.Tensor  # rows of the vocabulary touched on this shard
    squared_norm: (
        dict  # parameter name -> scalar: of this shard's part; sum it over the replicas for the whole
    )


class ShardedTable:
    """A [vocab_size, embed_dim] matrix and an optional [vocab_size] bias, 1/N of the rows on each of N replicas.

    Tied use: the same row is a word's input embedding and its softmax weight. The optimizer's slots are sharded with
    the rows. Neither is ever replicated, gathered whole, or made dense. Create it inside `strategy.scope()`, of a
    strategy whose replicas all have variables of their own (Mirrored, MultiWorkerMirrored, OneDevice, or none); call
    `pull`, `collect`, `apply` and `push` inside `strategy.run`.

    Attributes:
      parameters: {name: per-replica variable [allocated_rows, ...]}, names "embedding" and "bias".
      slots: {name: {slot: per-replica variable}}.
      static_shapes: whether no shape of a step may depend on ids.
    """

    def __init__(
        self,
        *,
        vocab_size,
        embed_dim,
        update_rule=None,
        bias=True,
        initializer=None,
        seed=0,
        path="table",
        static_shapes=False,
    ):
        """Args:
        vocab_size: rows.
        embed_dim: columns.
        update_rule: an `UpdateRule` for rows and bias, or {parameter: rule or None}; None for parameters that are only
          read.
        bias: whether each row also has a softmax bias, initially 0.
        initializer: `keras.initializers.Initializer`; by default uniform with bound embed_dim ** -0.5, which gives
          logits of unit order for a hidden state of unit order.
        seed: int.
        path: what the first values depend on beside the seed, so that two tables do not start alike.
        static_shapes: whether rows are exchanged in shapes that do not depend on ids, at more cost: for steps that
          XLA compiles (jit_compile=True).
        """
        strategy = tf.distribute.get_strategy()
        self.placement = Placement(vocab_size=vocab_size, num_shards=strategy.num_replicas_in_sync)
        self.vocab_size = vocab_size
        self.embed_dim = embed_dim
        self._strategy = strategy
        self.static_shapes = static_shapes or isinstance(strategy, tf.distribute.TPUStrategy)
        self._exchange = choose_exchange(strategy, static_shapes=self.static_shapes)
        names = ["embedding", "bias"] if bias else ["embedding"]
        self.update_rules = (
            {name: update_rule.get(name) for name in names}
            if isinstance(update_rule, Mapping)
            else dict.fromkeys(names, update_rule)
        )
        self._layout = table_layout(
            vocab_size=vocab_size, embed_dim=embed_dim, update_rules=self.update_rules
        )
        self.parameters = {e.name: self._make_variable(e) for e in self._layout if not e.is_slot}
        self.slots = {name: {} for name in self.parameters}
        for entry in self._layout:
            if entry.is_slot:
                name, slot_name = entry.name.split("/")
                self.slots[name][slot_name] = self._make_variable(entry)
        rows = initial_rows(
            initializer or default_initializer(embed_dim),
            vocab_size=vocab_size,
            embed_dim=embed_dim,
            seed=seed,
            path=f"{path}/embedding",
        )
        for start, values in rows:
            self.write_rows("embedding", start, values)

    def _make_variable(self, entry):
        shape = [self.placement.allocated_rows, *entry.row_shape]
        return collectives.local_variable(
            lambda: tf.fill(shape, tf.cast(entry.initial_value, entry.dtype)),
            dtype=entry.dtype,
            name=entry.name.replace("/", "_"),
        )

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

        Communication: that of the exchange's `route` and `fetch`.
        """
        shared_ids = tf.zeros([0], tf.int32) if shared_ids is None else tf.cast(shared_ids, tf.int32)
        ids = tf.cast(ids, tf.int32)
        if not (ids.shape.is_fully_defined() and shared_ids.shape.is_fully_defined()):
            raise ValueError(
                "ids and shared_ids must have static shapes. Received: "
                f"{ids.shape} and {shared_ids.shape}. Fix the batch size, or use tf.ensure_shape."
            )
        shards = [self.local_parameter(name) for name in self.parameters]
        with ledger.part("ids"):
            route = self._exchange.route(tf.reshape(ids, [-1]), shared_ids, self.placement)
        with ledger.part("rows"):
            rows = self._exchange.fetch(route, shards)
        count = ids.shape.num_elements()
        own = [tf.reshape(x[:count], ids.shape + x.shape[1:]) for x in rows]
        shared = [x[count:] for x in rows]
        return PulledRows(
            ids=ids,
            shared_ids=shared_ids,
            embedding=own[0],
            bias=own[1] if len(own) > 1 else None,
            shared_embedding=shared[0],
            shared_bias=shared[1] if len(shared) > 1 else None,
            route=route,
        )

    def collect(self, pulled, gradients, *, dense=None, of_shard=()):
        """Brings gradients home: every shard receives those of its rows, duplicates summed.

        Args:
          pulled: the `PulledRows` they belong to; None if there is nothing but `dense` and `of_shard`.
          gradients: `RowGradients` of this replica's share of the loss (the shares add up to the loss).
          dense: {parameter: [allocated_rows, ...]} gradients of this shard's every row that are already complete (a
            full softmax), or None. With it, every row counts as touched.
          of_shard: sequence of `ShardRows`, gradients of some of this shard's rows that are already complete, in shapes
            that may depend on ids.

        Returns:
          `CollectedGradients`.

        Communication: that of the exchange's `collect`; none without `pulled`.
        """
        found = [(rows.local_rows, self._values_of(rows)) for rows in of_shard]
        if pulled is not None:
            values = [
                _own_and_shared(tf.reshape(own, [-1, *shared.shape[1:]]), shared)
                for own, shared in self._with_zeros(pulled, gradients)
            ]
            with ledger.part("row_gradients"):
                found.insert(0, self._exchange.collect(pulled.route, values))
        if not found:
            return self._collected_of_every_row(dense)
        local_rows, sums = _summed(found) if of_shard else found[0]
        sums = dict(zip(self.parameters, sums, strict=True))
        if dense is None:
            num_rows = tf.reduce_sum(tf.cast(local_rows < self.placement.scratch_row, tf.int32))
        else:
            rows = local_rows[:, tf.newaxis]
            return self._collected_of_every_row(
                {name: tf.tensor_scatter_nd_add(dense[name], rows, x) for name, x in sums.items()}
            )
        return CollectedGradients(
            local_rows=local_rows,
            gradients=sums,
            num_rows=num_rows,
            squared_norm={name: tf.reduce_sum(tf.square(x)) for name, x in sums.items()},
        )

    def _values_of(self, rows):
        """The gradients of `ShardRows` for each parameter, with zeros for one left out."""
        shapes = {
            name: tf.concat([tf.shape(rows.local_rows), variable.shape[1:]], axis=0)
            for name, variable in self.parameters.items()
        }
        gradients = {name: getattr(rows.gradients, name) for name in self.parameters}
        return [tf.zeros(shapes[name]) if x is None else x for name, x in gradients.items()]

    def _collected_of_every_row(self, dense):
        is_row = tf.range(self.placement.allocated_rows) < self.placement.scratch_row
        gradients = {
            name: tf.where(tf.reshape(is_row, [-1] + [1] * (len(x.shape) - 1)), x, 0.0)
            for name, x in dense.items()
        }
        return CollectedGradients(
            local_rows=None,
            gradients=gradients,
            num_rows=tf.cast(self.num_valid_rows, tf.int32),
            squared_norm={name: tf.reduce_sum(tf.square(x)) for name, x in gradients.items()},
        )

    def _with_zeros(self, pulled, gradients):
        """[(gradient of own rows, gradient of shared rows)] of each parameter, with zeros for those left out."""
        return [
            (
                _or_zeros(getattr(gradients, name), getattr(pulled, name)),
                _or_zeros(getattr(gradients, f"shared_{name}"), getattr(pulled, f"shared_{name}")),
            )
            for name in self.parameters
        ]

    def apply(self, merged, *, step, learning_rate=None, scale=1.0, keep=True):
        """Updates this shard's touched rows and their slots, once each.

        The arguments but the first may be {parameter: value}; parameters without an update rule stay as they are.

        Args:
          merged: `CollectedGradients`.
          step: int scalar tensor, updates done before this one.
          learning_rate: float32 scalar; None for that of `step` (see `UpdateRule.update`).
          scale: factor on the gradients (clipping by a norm).
          keep: bool scalar; False leaves every row and slot as it is (a step with a non-finite loss).

        Raises:
          ValueError: if no parameter has an update rule.

        Communication: none.
        """
        if not any(self.update_rules.values()):
            raise ValueError(
                "A table needs an update rule to be updated. Received: update_rule=None. Pass an UpdateRule."
            )
        for name, gradient in merged.gradients.items():
            rule = self.update_rules[name]
            if rule is None:
                continue
            own_step, own_rate, own_scale, own_keep = (
                value[name] if isinstance(value, Mapping) else value
                for value in (step, learning_rate, scale, keep)
            )
            rows = merged.local_rows
            if rows is not None:
                rows = tf.where(own_keep, rows, self.placement.scratch_row)
            variables = {"": self.parameters[name], **self.slots[name]}
            variables = {key: collectives.local_value(variable) for key, variable in variables.items()}
            old = {
                key: v.read_value() if rows is None else tf.gather(v, rows) for key, v in variables.items()
            }
            weights = old.pop("")
            new_weights, new_slots = rule.update(
                weights=weights,
                gradients=tf.where(own_keep, _scaled(gradient, own_scale), 0.0),
                slots=old,
                step=own_step,
                learning_rate=own_rate,
            )
            for key, value in {"": new_weights, **new_slots}.items():
                if rows is None:
                    variables[key].assign(tf.where(own_keep, value, variables[key]))
                else:
                    variables[key].scatter_update(tf.IndexedSlices(value, rows))

    def push(self, pulled, gradients, *, step):
        """`collect` and `apply` in one: for training loops without clipping over body and rows together."""
        collected = self.collect(pulled, gradients)
        self.apply(collected, step=step)
        return collected

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

        Of several processes, each must call it, with a range of its own, which may be empty.

        Raises:
          ValueError: if there are no such rows.

        Communication: `all_to_all_on_hosts` of the rows, those of every range padded to the longest.
        """
        self._check_range(name, start, stop)
        n = self.placement.num_shards
        components = [component for _, component in self._components(name)]
        # Rows of each shard that hold a range, of which the first and the last may be partly of the range.
        ranges = [
            (first // n, -(-last // n))
            for first, last in gather_on_hosts(self._strategy, np.array([start, stop]))
        ]
        longest = max(last - first for first, last in ranges)
        # Gathered and scattered, here and below: a slice of a variable copies the whole of it once scatter updates
        # have touched it.
        pieces = [
            np.stack(
                [
                    tf.gather(x, tf.minimum(tf.range(first, first + longest), x.shape[0] - 1)).numpy()
                    for x in components
                ]
            )
            for first, _ in ranges
        ]
        received = all_to_all_on_hosts(self._strategy, pieces)
        blocks = received[0] if len(received) == 1 else np.concatenate(received)  # [num_shards, longest, ...]
        rows = np.swapaxes(blocks, 0, 1).reshape((-1, *blocks.shape[2:]))
        offset = start - start // n * n
        return rows[offset : offset + stop - start]

    def send_rows(self, name, start, values):
        """Writes rows [start, start + len(values)) of the logical tensor `name`, whoever holds them.

        Of several processes, each must call it, with a range of its own, which may be empty. No row is in two ranges.

        Raises:
          ValueError: if there are no such rows, or values are not of their shape. Nothing is written then.

        Communication: `all_to_all_on_hosts` of the rows, those of every range padded to the longest.
        """
        stop = start + len(values)
        self._check_range(name, start, stop)
        self._check_row_shape(name, values)
        n = self.placement.num_shards
        ranges = gather_on_hosts(self._strategy, np.array([start, stop]))
        longest = -(-max(last - first for first, last in ranges) // n)
        of_shards = np.zeros([n, longest, *values.shape[1:]], values.dtype)
        for shard_id in range(n):
            rows = values[self._offset(shard_id, start) :: n]
            of_shards[shard_id, : len(rows)] = rows
        received = all_to_all_on_hosts(self._strategy, np.split(of_shards, len(ranges)))
        for (first, last), blocks in zip(ranges, received, strict=True):
            for (shard_id, component), rows in zip(self._components(name), blocks, strict=True):
                num_rows = len(range(first + self._offset(shard_id, first), last, n))
                self._write_shard(shard_id, component, first, rows[:num_rows])

    def write_rows(self, name, start, values):
        """Writes rows [start, start + len(values)) of the logical tensor `name`: those that this process holds.

        Raises:
          ValueError: if there are no such rows, or values are not of their shape. Nothing is written then.
        """
        self._check_range(name, start, start + len(values))
        self._check_row_shape(name, values)
        n = self.placement.num_shards
        for shard_id, component in self._components(name):
            self._write_shard(shard_id, component, start, values[self._offset(shard_id, start) :: n])

    def _offset(self, shard_id, start):
        """Of the first id from `start` on that a shard owns, behind `start`."""
        return (shard_id - start) % self.placement.num_shards

    def _write_shard(self, shard_id, component, start, rows):
        """Writes rows of the ids from `start` on that a shard owns."""
        if len(rows):
            first = self.placement.local_row(start + self._offset(shard_id, start))
            component.scatter_update(tf.IndexedSlices(rows, tf.range(first, first + len(rows))))

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


def table_layout(*, vocab_size, embed_dim, update_rules):
    """The tensors of a `ShardedTable` without making them, a list of `TableEntry`.

    Args:
      vocab_size, embed_dim: the table's.
      update_rules: {parameter: `UpdateRule` or None}, for "embedding" and, if there is one, "bias".

    Raises:
      ValueError: for sizes below 1.
    """
    if vocab_size < 1 or embed_dim < 1:
        raise ValueError(
            "vocab_size and embed_dim must be at least 1. Received: "
            f"vocab_size={vocab_size}, embed_dim={embed_dim}. Set EMBED_DIM to a positive number."
        )
    row_shapes = {name: (embed_dim,) if name == "embedding" else () for name in update_rules}
    entries = [TableEntry(name, shape, tf.float32, 0.0) for name, shape in row_shapes.items()]
    for name, shape in row_shapes.items():
        for slot_name, slot in (update_rules[name].slots if update_rules[name] else {}).items():
            row_shape = shape if slot.per_element else ()
            entries.append(TableEntry(f"{name}/{slot_name}", row_shape, slot.dtype, slot.initial_value))
    return entries


def _own_and_shared(own, shared):
    """Both along their first axis. Where there are none of one kind, the others are not copied."""
    parts = [x for x in (own, shared) if x.shape[0]]
    return parts[0] if len(parts) == 1 else tf.concat([own, shared], axis=0)


def _scaled(gradient, scale):
    """Their product; where the factor is known to be 1, no pass over the gradient."""
    return gradient if isinstance(scale, float) and scale == 1.0 else gradient * scale


def _or_zeros(gradient, like):
    return tf.zeros_like(like) if gradient is None else tf.cast(gradient, tf.float32)


def _summed(found):
    """One (local_rows, values) of several, each row once with the sum of its values."""
    local_rows, segments = tf.unique(tf.concat([rows for rows, _ in found], axis=0))
    return local_rows, [
        tf.math.unsorted_segment_sum(tf.concat(values, axis=0), segments, tf.size(local_rows))
        for values in zip(*(values for _, values in found), strict=True)
    ]
