"""How rows and the gradients of rows travel between the replicas, each of which holds a shard of them.

One route a step and table says what goes where; the rows take it one way, their gradients the other.
"""

import abc
import dataclasses

import tensorflow as tf

from lmscale.distribution import collectives


class Route:
    """What `Exchange.route` found out, as one replica sees it: for the methods of the same exchange."""


class Exchange(abc.ABC):
    """Brings rows to the replicas that ask for them, and their gradients home. Call it inside `strategy.run`.

    n is the number of this replica's own ids, s that of ids which every replica has given. Several parameters whose
    rows lie alike (a matrix and its bias) travel together.
    """

    @abc.abstractmethod
    def route(self, ids, shared_ids, placement):
        """Prepares for rows to travel, once for both ways.

        Args:
          ids: [n] int32 of this replica; n is the same on every replica.
          shared_ids: [s] int32, the same on every replica.
          placement: `Placement`.

        Returns:
          A `Route`.
        """

    @abc.abstractmethod
    def fetch(self, route, shards):
        """Rows of the ids that the route was made of.

        Args:
          route: `Route`.
          shards: list of this replica's variables [allocated_rows, ...].

        Returns:
          List of [n + s, ...] tensors: a row for each of `ids`, then for each of `shared_ids`.
        """

    @abc.abstractmethod
    def collect(self, route, values):
        """Sums over all replicas, each row on the shard that owns it.

        Args:
          route: `Route`.
          values: list of [n + s, ...] tensors, laid out as `fetch` returns them.

        Returns:
          (local_rows [r] int32, list of [r, ...] sums): each row of this shard that some replica gave a value for,
          once. The scratch row may stand among them, more than once too; its sum is 0.
        """


@dataclasses.dataclass(frozen=True)
class _StaticRoute(Route):
    local_rows: (
        tf.Tensor
    )  # [num_replicas * n + s]: row on this shard of what anyone wants; scratch if not its own
    num_own: int
    scratch_row: int


class StaticExchange(Exchange):
    """Everything goes to everyone, in shapes that are known when the step is traced: what XLA needs.

    For every strategy, and the plain reference for the others.

    Communication: route, an all-gather of [n] ids. fetch, an all-reduce of [num_replicas * n + s] rows, to which each
    shard contributes those that it owns and zeros elsewhere (the sum is exact). collect, an all-gather of [n] rows and
    an all-reduce of [s]. None with one replica.
    """

    def route(self, ids, shared_ids, placement):
        wanted = tf.concat([collectives.all_gather(ids), shared_ids], axis=0)
        is_own = tf.equal(placement.owner(wanted), tf.cast(collectives.replica_id(), tf.int32))
        return _StaticRoute(
            local_rows=tf.where(is_own, placement.local_row(wanted), placement.scratch_row),
            num_own=ids.shape[0],
            scratch_row=placement.scratch_row,
        )

    def fetch(self, route, shards):
        # The scratch row is zero and stays zero (its gradient always is): so are the rows of other shards here.
        rows = _sum_over_replicas([tf.gather(shard, route.local_rows) for shard in shards])
        first = collectives.replica_id() * route.num_own
        num_gathered = collectives.num_replicas() * route.num_own
        return [
            tf.concat([collectives.block(x, first, route.num_own), x[num_gathered:]], axis=0) for x in rows
        ]

    def collect(self, route, values):
        own = _gather_over_replicas([x[: route.num_own] for x in values])
        shared = _sum_over_replicas([x[route.num_own :] for x in values])
        local_rows, segments = _unique_rows(route.local_rows, route.scratch_row)
        # What was summed into the scratch row belongs to other shards.
        keep = local_rows < route.scratch_row
        sums = [
            tf.math.unsorted_segment_sum(tf.concat(pair, axis=0), segments, local_rows.shape[0])
            for pair in zip(own, shared, strict=True)
        ]
        return local_rows, [tf.where(_as_column(keep, x), x, 0.0) for x in sums]


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
