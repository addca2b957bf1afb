"""The ledger counts what collectives move, in the graph that runs."""

import numpy as np
import pytest
import tensorflow as tf
from replicas import run_everywhere

from lmscale.distribution import collectives, ledger
from lmscale.distribution.all_to_all import all_to_all, exchange_equal_parts, reduce_scatter_sum


def counted(strategy, function, *, compiled=True):
    """({part: bytes received}, {part: bytes sent}) of each replica while it runs a function."""

    def record():
        with ledger.recording() as moved:
            function()
        # Tensors, that of each replica its own.
        return tf.nest.map_structure(tf.identity, (moved.received(), moved.sent()))

    return run_everywhere(strategy, record, compiled=compiled)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("num_replicas", [1, 2, 3, 8])
def test_standard_costs(mirrored, num_replicas, compiled):
    def move():
        with ledger.part("gathered"):
            collectives.all_gather(tf.zeros([5, 3], tf.bfloat16))
            collectives.all_gather(tf.zeros([7], tf.int32))
            collectives.all_gather(tf.zeros([0, 4]))
        with ledger.part("reduced"):
            collectives.all_reduce_sum({"x": tf.zeros([num_replicas, 6]), "y": [tf.zeros([num_replicas])]})
        with ledger.part("scattered"):
            reduce_scatter_sum(tf.zeros([num_replicas * 2, 3]))
        exchange_equal_parts(tf.zeros([num_replicas * 4], tf.float64))

    others = num_replicas - 1
    expected = {
        "gathered": others * (5 * 3 * 2 + 7 * 4),
        "reduced": 2 * others * (6 + 1) * 4,
        "scattered": others * 2 * 3 * 4,
        ledger.OTHERS: others * 4 * 8,
    }
    for received, sent in counted(mirrored(num_replicas), move, compiled=compiled):
        assert received == sent == ({} if num_replicas == 1 else expected)


@pytest.mark.parametrize("num_replicas", [2, 3])
def test_pieces_of_sizes_that_depend_on_ids(mirrored, num_replicas):
    # Replica i sends i + 2 j + 1 rows to j, of two columns, which the graph does not know.
    sizes = np.arange(num_replicas)[:, None] + 2 * np.arange(num_replicas) + 1

    def move():
        own = tf.gather(tf.constant(sizes, tf.int32), tf.cast(collectives.replica_id(), tf.int32))
        pieces = [tf.zeros([size, 3]) for size in tf.unstack(own)]
        with ledger.part("there"):
            there = all_to_all(own, max_size=100).send(pieces, [x[:, 0] for x in pieces])
        with ledger.part("back"):
            all_to_all(own, max_size=100).send_back(*there)

    of_others = sizes * (1 - np.eye(num_replicas, dtype=int))
    for i, (received, sent) in enumerate(counted(mirrored(num_replicas), move)):
        assert sent == {"there": 16 * of_others[i].sum(), "back": 16 * of_others[:, i].sum()}
        assert received == {"there": 16 * of_others[:, i].sum(), "back": 16 * of_others[i].sum()}


def test_nothing_is_counted_outside(mirrored):
    def move():
        with ledger.recording() as moved:
            pass
        collectives.all_gather(tf.zeros([5]))
        with ledger.recording() as outer:
            collectives.all_gather(tf.zeros([2]))
            with ledger.recording() as inner, ledger.part("inner"):
                collectives.all_gather(tf.zeros([3]))
            collectives.all_gather(tf.zeros([4]))
        assert not moved.movements
        assert [(m.kind, m.dtype, m.part, m.received) for m in inner.movements] == [
            ("all_gather", tf.float32, "inner", 12)
        ]
        assert [m.received for m in outer.movements] == [8, 16]

    mirrored(2).run(move)


@pytest.mark.parametrize("num_replicas", [1, 2, 3])
@pytest.mark.parametrize("dtype", [tf.float32, tf.bfloat16])
def test_reduce_scatter_sums_in_float32(mirrored, num_replicas, dtype):
    values = np.random.default_rng(0).integers(-9, 9, [num_replicas, num_replicas * 2, 3]) + 1 / 256
    values = tf.cast(tf.constant(values), dtype)

    def reduce():
        return reduce_scatter_sum(values[collectives.replica_id()])

    expected = np.asarray(tf.cast(values, tf.float64)).sum(axis=0)
    for i, own in enumerate(run_everywhere(mirrored(num_replicas), reduce, compiled=True)):
        assert own.dtype == np.float32
        np.testing.assert_allclose(own, expected[2 * i : 2 * i + 2], rtol=1e-6)
