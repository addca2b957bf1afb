"""Exchanges in which no row travels twice, nor to a replica that has not asked for it; and who gets which exchange."""

import dataclasses

import tensorflow as tf

from lmscale.distribution import collectives
from lmscale.tables.exchange import Exchange, Route, StaticExchange


@dataclasses.dataclass(frozen=True)
class _AllToAllRoute(Route):
    asked: list  # of each replica, [a_i] int32: rows of its shard that this replica wants, each once
    answered: list  # of each replica, [b_i] int32: rows of this shard that it wants, each once
    positions: tf.Tensor  # [n + s] int32: place of each id's row in the concatenation of `asked`


class AllToAllExchange(Exchange):
    """A distinct row goes once from its owner to each replica that asks for it, its summed gradient once back.

    For the replicas of one process, in shapes that depend on the ids. Rows of a replica's own shard do not travel, and
    no row goes through a sum. Sums are taken in the order of the replicas: equal runs give equal bits.

    Communication, u the distinct ids of a replica: route, an all-to-all of [u] rows' numbers; fetch, one of [u] rows;
    collect, one of [u] sums. Of evenly spread ids, 1 / num_replicas stays at home.
    """

    def route(self, ids, shared_ids, placement):
        distinct, indices = tf.unique(tf.concat([ids, shared_ids], axis=0))
        owners = placement.owner(distinct)
        asked = tf.dynamic_partition(placement.local_row(distinct), owners, placement.num_shards)
        order = tf.dynamic_partition(tf.range(tf.size(distinct)), owners, placement.num_shards)
        positions = tf.math.invert_permutation(tf.concat(order, axis=0))
        return _AllToAllRoute(
            asked=asked,
            answered=collectives.all_to_all(asked),
            positions=tf.gather(positions, indices),
        )

    def fetch(self, route, shards):
        return [
            tf.gather(
                tf.concat(
                    collectives.all_to_all([tf.gather(shard, rows) for rows in route.answered]), axis=0
                ),
                route.positions,
            )
            for shard in shards
        ]

    def collect(self, route, values):
        sizes = [tf.size(rows) for rows in route.asked]
        local_rows, segments = tf.unique(tf.concat(route.answered, axis=0))
        sums = []
        for x in values:
            own = tf.math.unsorted_segment_sum(x, route.positions, tf.add_n(sizes))
            received = collectives.all_to_all(tf.split(own, sizes))
            sums.append(
                tf.math.unsorted_segment_sum(tf.concat(received, axis=0), segments, tf.size(local_rows))
            )
        return local_rows, sums


@dataclasses.dataclass(frozen=True)
class _LocalRoute(Route):
    rows: tf.Tensor  # [n + s]


class LocalExchange(Exchange):
    """For one replica, which has every row: in shapes that depend on the ids.

    Communication: none.
    """

    def route(self, ids, shared_ids, placement):
        return _LocalRoute(placement.local_row(tf.concat([ids, shared_ids], axis=0)))

    def fetch(self, route, shards):
        return [tf.gather(shard, route.rows) for shard in shards]

    def collect(self, route, values):
        local_rows, segments = tf.unique(route.rows)
        return local_rows, [tf.math.unsorted_segment_sum(x, segments, tf.size(local_rows)) for x in values]


def choose_exchange(strategy, *, static_shapes):
    """The exchange that does least under a strategy.

    Args:
      strategy: `tf.distribute.Strategy`.
      static_shapes: whether the step will be compiled by XLA, which has no shapes that depend on ids.

    Returns:
      An `Exchange`.
    """
    if static_shapes or isinstance(strategy, tf.distribute.TPUStrategy):
        return StaticExchange()
    if strategy.num_replicas_in_sync == 1:
        return LocalExchange()
    # merge_call, which AllToAllExchange needs, reaches the replicas of one process alone.
    return AllToAllExchange() if isinstance(strategy, tf.distribute.MirroredStrategy) else StaticExchange()
