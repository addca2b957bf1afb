import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from lmscale.distribution import collectives
from lmscale.distribution.strategies import mirrored_strategy
from lmscale.tables.all_to_all import AllToAllExchange, LocalExchange, choose_exchange
from lmscale.tables.exchange import StaticExchange
from lmscale.tables.placement import Placement

VOCAB_SIZE, EMBED_DIM, NUM_IDS, NUM_SHARED = 101, 3, 13, 7

EXCHANGES = [
    *((StaticExchange(), n) for n in (1, 2, 3, 4, 8)),
    *((AllToAllExchange(), n) for n in (1, 2, 3, 4, 8)),
    (LocalExchange(), 1),
]
every_exchange = pytest.mark.parametrize(
    ("exchange", "num_replicas"), EXCHANGES, ids=lambda x: x if isinstance(x, int) else type(x).__name__
)


@dataclasses.dataclass(frozen=True)
class Problem:
    """Rows to bring and values to collect, whole: the vocabulary's rows in id order, everyone's ids."""

    rows: list  # of each parameter, [vocab_size, ...]
    ids: np.ndarray  # [num_replicas, n]
    shared_ids: np.ndarray  # [s]
    values: list  # of each parameter, [num_replicas, n + s, ...]

    @property
    def wanted(self):
        """[num_replicas, n + s]"""
        shared = np.broadcast_to(self.shared_ids, [len(self.ids), len(self.shared_ids)])
        return np.concatenate([self.ids, shared], axis=1)

    @property
    def placement(self):
        return Placement(vocab_size=len(self.rows[0]), num_shards=len(self.ids))

    def expected_sums(self):
        """[vocab_size, ...] float64 of each parameter."""
        sums = [np.zeros(rows.shape) for rows in self.rows]
        for total, values in zip(sums, self.values, strict=True):
            np.add.at(total, self.wanted, values.astype(np.float64))
        return sums

    def variables(self, strategy):
        """This problem's rows as shards, one on each replica; padding and scratch rows 0."""
        shape = [self.placement.allocated_rows]
        with strategy.scope():
            variables = [
                collectives.local_variable(tf.zeros(shape + list(rows.shape[1:]))) for rows in self.rows
            ]
        for variable, rows in zip(variables, self.rows, strict=True):
            for shard_id, component in enumerate(strategy.experimental_local_results(variable)):
                own = rows[shard_id :: len(self.ids)]
                component.scatter_update(tf.IndexedSlices(own, tf.range(len(own))))
        return variables


def _problem(ids, shared_ids, *, vocab_size=VOCAB_SIZE, row_shapes=((EMBED_DIM,), ()), seed=1):
    rng = np.random.default_rng(seed)
    lengths = [len(ids), ids.shape[1] + len(shared_ids)]
    return Problem(
        rows=[rng.normal(size=[vocab_size, *shape]).astype(np.float32) for shape in row_shapes],
        ids=ids.astype(np.int32),
        shared_ids=shared_ids.astype(np.int32),
        values=[rng.normal(size=[*lengths, *shape]).astype(np.float32) for shape in row_shapes],
    )


def _ids(case, num_replicas):
    """(ids [num_replicas, n], shared_ids [s])"""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, VOCAB_SIZE, [num_replicas, NUM_IDS])
    shared_ids = rng.integers(0, VOCAB_SIZE, NUM_SHARED)
    if case == "duplicates":
        ids[0, :4] = VOCAB_SIZE - 1  # On a replica,
        ids[:, 4] = VOCAB_SIZE // 2  # between replicas,
        shared_ids[:2] = 5  # among the shared ids,
        shared_ids[2:4] = VOCAB_SIZE // 2, ids[-1, -1]  # and between shared ids and others.
    elif case == "distinct":
        ids = rng.permutation(VOCAB_SIZE)[: NUM_IDS * num_replicas][: num_replicas * (NUM_IDS // 2)]
        ids = ids.reshape(num_replicas, -1)
    elif case == "all on the last shard":
        ids = num_replicas - 1 + num_replicas * rng.integers(0, VOCAB_SIZE // num_replicas, ids.shape)
        shared_ids = num_replicas - 1 + num_replicas * np.arange(3)
    elif case == "no shared ids":
        shared_ids = shared_ids[:0]
    elif case == "shared ids alone":
        ids = ids[:, :0]
    else:
        assert case == "one id"
        ids, shared_ids = np.full([num_replicas, NUM_IDS], 3), np.full([NUM_SHARED], 3)
    return ids, shared_ids


def _compiled(strategy, exchange, problem, *, rounds=None):
    """A function that fetches the rows and collects the values: ({name: list of tensors}) of each replica.

    With `rounds`, it does so inside a `tf.while_loop`, as a trainer does, with ids that change from round to round, and
    returns what the last one gave, the problem's own.
    """
    variables = problem.variables(strategy)
    ids, shared_ids = tf.constant(problem.ids), tf.constant(problem.shared_ids)
    values = [tf.constant(x) for x in problem.values]

    def replica_exchange(ids, shared_ids):
        replica = collectives.replica_id()
        route = exchange.route(ids[replica], shared_ids, problem.placement)
        fetched = exchange.fetch(route, [collectives.local_value(v) for v in variables])
        local_rows, sums = exchange.collect(route, [x[replica] for x in values])
        return {"fetched": fetched, "local_rows": [local_rows], "sums": sums}

    def one_round(i):
        # Round 0 is the problem's; the others ask for other rows, so for other numbers of them.
        results = strategy.run(
            replica_exchange, args=(ids % (len(problem.rows[0]) // (i + 1) + 1), shared_ids // (i + 1))
        )
        return {
            name: [strategy.experimental_local_results(x) for x in tensors]
            for name, tensors in results.items()
        }

    def loop():
        def body(i, last):
            del last
            return i - 1, one_round(i)

        like = one_round(tf.constant(rounds))
        shapes = tf.nest.map_structure(lambda x: tf.TensorShape([None, *x.shape[1:]]), like)
        return tf.while_loop(
            lambda i, _: i >= 0,
            body,
            [tf.constant(rounds - 1), like],
            shape_invariants=[tf.TensorShape([]), shapes],
            parallel_iterations=1,
        )[1]

    return tf.function(loop if rounds else lambda: one_round(tf.constant(0)), autograph=False)


def _assert_right(problem, results):
    """That rows fetched are the very rows, and sums those of plain addition, at each row once at most."""
    num_replicas = len(problem.ids)
    expected = problem.expected_sums()
    actual = [np.zeros(x.shape) for x in expected]
    placement = problem.placement
    for replica in range(num_replicas):
        for rows, fetched in zip(problem.rows, results["fetched"], strict=True):
            np.testing.assert_array_equal(fetched[replica], rows[problem.wanted[replica]])
        local_rows = results["local_rows"][0][replica].numpy()
        assert local_rows.dtype == np.int32
        is_row = local_rows < placement.scratch_row
        np.testing.assert_array_equal(local_rows[~is_row], placement.scratch_row)
        ids = local_rows[is_row] * num_replicas + replica
        wanted = np.unique(problem.wanted)
        # Each row that anyone wants of this shard, once.
        np.testing.assert_array_equal(np.sort(ids), wanted[wanted % num_replicas == replica])
        for total, sums in zip(actual, results["sums"], strict=True):
            np.testing.assert_array_equal(sums[replica].numpy()[~is_row], 0.0)
            total[ids] = sums[replica].numpy()[is_row]
    for total, sums in zip(actual, expected, strict=True):
        np.testing.assert_allclose(total, sums, rtol=1e-6, atol=1e-5)


@every_exchange
@pytest.mark.parametrize(
    "case",
    ["duplicates", "distinct", "all on the last shard", "no shared ids", "shared ids alone", "one id"],
)
def test_against_plain_addition(mirrored, exchange, num_replicas, case):
    problem = _problem(*_ids(case, num_replicas))
    _assert_right(problem, _compiled(mirrored(num_replicas), exchange, problem)())


@every_exchange
def test_one_parameter(mirrored, exchange, num_replicas):
    problem = _problem(*_ids("duplicates", num_replicas), row_shapes=[(EMBED_DIM,)])
    _assert_right(problem, _compiled(mirrored(num_replicas), exchange, problem)())


@every_exchange
def test_fewer_rows_than_replicas(mirrored, exchange, num_replicas):
    vocab_size = 2
    ids = np.random.default_rng(0).integers(0, vocab_size, [num_replicas, NUM_IDS])
    problem = _problem(ids, np.array([1, 1, 0]), vocab_size=vocab_size)
    _assert_right(problem, _compiled(mirrored(num_replicas), exchange, problem)())


@every_exchange
def test_inside_a_loop_of_steps(mirrored, exchange, num_replicas):
    problem = _problem(*_ids("duplicates", num_replicas))
    _assert_right(problem, _compiled(mirrored(num_replicas), exchange, problem, rounds=3)())


@every_exchange
def test_equal_runs_give_equal_bits(mirrored, exchange, num_replicas):
    rng = np.random.default_rng(2)
    # Of Zipf's kind, so that many terms meet in a sum, and in rows enough for several threads.
    ids, shared_ids = (np.floor(5000 * rng.random(shape) ** 4) for shape in ([num_replicas, 900], [1100]))
    problem = _problem(ids, shared_ids, vocab_size=5000, row_shapes=[(67,), ()])
    compiled = _compiled(mirrored(num_replicas), exchange, problem)
    first = tf.nest.map_structure(lambda x: x.numpy(), compiled())
    for _ in range(5):
        tf.nest.map_structure(np.testing.assert_array_equal, first, compiled())


def test_values_that_are_not_finite_stay_in_their_rows(mirrored):
    num_replicas = 3
    ids, shared_ids = _ids("distinct", num_replicas)
    for exchange in (StaticExchange(), AllToAllExchange()):
        problem = _problem(ids, shared_ids)
        problem.values[0][0, 2] = np.nan
        results = _compiled(mirrored(num_replicas), exchange, problem)()
        owner = ids[0, 2] % num_replicas
        for replica in range(num_replicas):
            is_nan = np.isnan(results["sums"][0][replica].numpy()).all(axis=1)
            rows = results["local_rows"][0][replica].numpy()[is_nan]
            np.testing.assert_array_equal(rows, [ids[0, 2] // num_replicas] if replica == owner else [])


def test_choice():
    one, three = (mirrored_strategy(tuple(f"CPU:{i}" for i in range(n))) for n in (1, 3))
    for strategy in (one, three):
        assert isinstance(choose_exchange(strategy, static_shapes=True), StaticExchange)
    assert isinstance(choose_exchange(one, static_shapes=False), LocalExchange)
    assert isinstance(choose_exchange(tf.distribute.get_strategy(), static_shapes=False), LocalExchange)
    assert isinstance(choose_exchange(three, static_shapes=False), AllToAllExchange)
