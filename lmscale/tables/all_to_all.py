"""Exchanges in which no row travels twice, nor to a replica that has not asked for it; and who gets which exchange."""

import dataclasses

import tensorflow as tf

from lmscale.distribution.all_to_all import AllToAll, all_to_all
from lmscale.tables.exchange import Exchange, Route, StaticExchange
from lmscale.tables.segments import segment_sum


@dataclasses.dataclass(frozen=True)
class _AllToAllRoute(Route):
    way: AllToAll  # of requests; rows take it back, gradients of rows go it again
    asked: list  # of each replica, [a_i] int32: rows of its shard that this replica wants, each once
    answered: list  # of each replica, [b_i] int32: rows of this shard that it wants, each once
    positions: tf.Tensor  # [n + s] int32: place of each id's row in the concatenation of `asked`


class AllToAllExchange(Exchange):
    """A distinct row goes once from its owner to each replica that asks for it, its summed gradient once back.

    In shapes that depend on the ids. Rows of a replica's own shard do not travel, and no row goes through a sum. Sums
    are taken in the order of the replicas: equal runs give equal bits.

    Communication, u the distinct ids of a replica: route, an all-to-all of [u] rows' numbers; fetch, one of [u] rows;
    collect, one of [u] sums. Of evenly spread ids, 1 / num_replicas stays at home.
    """

    def route(self, ids, shared_ids, placement):
        distinct, indices = tf.unique(tf.concat([ids, shared_ids], axis=0))
        owners = placement.owner(distinct)
        asked = tf.dynamic_partition(placement.local_row(distinct), owners, placement.num_shards)
        order = tf.dynamic_partition(tf.range(tf.size(distinct)), owners, placement.num_shards)
        positions = tf.math.invert_permutation(tf.concat(order, axis=0))
        way = all_to_all(
            tf.stack([tf.size(rows) for rows in asked]), max_size=ids.shape[0] + shared_ids.shape[0]
        )
        return _AllToAllRoute(
            way=way,
            asked=asked,
            answered=way.send(asked)[0],
            positions=tf.gather(positions, indices),
        )

    def fetch(self, route, shards):
        answers = [[tf.gather(shard, rows) for rows in route.answered] for shard in shards]
        received = route.way.send_back(*answers)
        return [tf.gather(tf.concat(rows, axis=0), route.positions) for rows in received]

    def collect(self, route, values):
        sizes = [tf.size(rows) for rows in route.asked]
        own = [segment_sum(x, route.positions, tf.add_n(sizes)) for x in values]
        received = route.way.send(*(tf.split(x, sizes) for x in own))
        local_rows, segments = tf.unique(tf.concat(route.answered, axis=0))
        return local_rows, [
            tf.math.unsorted_segment_sum(tf.concat(x, axis=0), segments, tf.size(local_rows))
            for x in received
        ]


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
        return local_rows, [segment_sum(x, segments, tf.size(local_rows)) for x in values]


def choose_exchange(strategy, *, static_shapes):
    """The exchange that does least under a strategy.

    Args:
      strategy: `tf.distribute.Strategy`.
      static_shapes: whether the step will be compiled by XLA, which has no shapes that depend on ids.

    Returns:
      An `Exchange`.
    """
    if static_shapes:
        return StaticExchange()
    if strategy.num_replicas_in_sync == 1:
        return LocalExchange()
    return AllToAllExchange()
