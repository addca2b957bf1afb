import dataclasses
import re

import keras
import numpy as np
import pytest
import tensorflow as tf

from lmscale.distribution import collectives
from lmscale.parameters import update_rules
from lmscale.tables.table import RowGradients, ShardedTable, table_layout

VOCAB_SIZE, EMBED_DIM, BATCH, TIME, NUM_SHARED = 1003, 5, 2, 4, 9
LEARNING_RATE = 0.25

OPTIMIZERS = {
    "sgd": update_rules.SGD(learning_rate=LEARNING_RATE),
    "adagrad": update_rules.Adagrad(learning_rate=LEARNING_RATE),
    "row_wise_adagrad": update_rules.RowWiseAdagrad(learning_rate=LEARNING_RATE),
    "adam": update_rules.Adam(learning_rate=LEARNING_RATE, beta_2=0.98, epsilon=1e-3),
}


@dataclasses.dataclass(frozen=True)
class Push:
    """What one push is given: ids and gradients, with a leading axis for the replicas."""

    ids: np.ndarray  # [N, BATCH, TIME]
    shared_ids: np.ndarray  # [NUM_SHARED]
    embedding: np.ndarray  # [N, BATCH, TIME, EMBED_DIM]
    bias: np.ndarray
    shared_embedding: np.ndarray  # [N, NUM_SHARED, EMBED_DIM]
    shared_bias: np.ndarray

    def dense(self, vocab_size):
        """{parameter: [vocab_size, ...] float64}: the gradient of the whole table, by plain addition."""
        gradients = {"embedding": np.zeros([vocab_size, EMBED_DIM]), "bias": np.zeros([vocab_size])}
        for name, gradient in gradients.items():
            np.add.at(gradient, self.ids, getattr(self, name).astype(np.float64))
            shared = getattr(self, f"shared_{name}").astype(np.float64)
            np.add.at(gradient, self.shared_ids, shared.sum(axis=0))
        return gradients

    def touched(self):
        """The distinct ids."""
        return np.unique(np.concatenate([self.ids.ravel(), self.shared_ids]))


def _pushes(num_replicas, num_steps, *, vocab_size=VOCAB_SIZE, seed=0):
    """Pushes with duplicates of every kind."""
    rng = np.random.default_rng(seed)
    pushes = []
    for _ in range(num_steps):
        ids = rng.integers(0, vocab_size, [num_replicas, BATCH, TIME])
        ids[0, 0, :2] = vocab_size - 1  # Inside a replica,
        ids[:, 1, 0] = vocab_size // 2  # across the replicas,
        shared_ids = rng.integers(0, vocab_size, NUM_SHARED)
        shared_ids[:2] = 0  # among the shared ids,
        shared_ids[2:4] = ids[-1, 0, -1], vocab_size // 2  # and between shared ids and windows.
        pushes.append(
            Push(
                ids=ids.astype(np.int32),
                shared_ids=shared_ids.astype(np.int32),
                embedding=rng.normal(size=[*ids.shape, EMBED_DIM]).astype(np.float32),
                bias=rng.normal(size=ids.shape).astype(np.float32),
                shared_embedding=rng.normal(size=[num_replicas, NUM_SHARED, EMBED_DIM]).astype(np.float32),
                shared_bias=rng.normal(size=[num_replicas, NUM_SHARED]).astype(np.float32),
            )
        )
    return pushes


def _make_table(strategy, *, vocab_size=VOCAB_SIZE, embed_dim=EMBED_DIM, random_bias=True, **kwargs):
    with strategy.scope():
        table = ShardedTable(vocab_size=vocab_size, embed_dim=embed_dim, **kwargs)
    if "bias" in table.parameters and random_bias:
        table.write_rows("bias", 0, np.random.default_rng(1).normal(size=vocab_size).astype(np.float32))
    return table


def _logical(table):
    """{name: [vocab_size, ...]} of everything in a table."""
    return {name: table.read_rows(name, 0, table.vocab_size) for name in table.variables()}


def _physical(strategy, table):
    """{name: [N, allocated_rows, ...]}: scratch and padding rows included."""
    return {
        name: np.stack([v.numpy() for v in strategy.experimental_local_results(variable)])
        for name, variable in table.variables().items()
    }


def _run(strategy, function):
    """Runs a replica function; returns the list of its results, one of each replica, as numpy arrays."""
    results = strategy.run(function)
    flat = [strategy.experimental_local_results(x) for x in tf.nest.flatten(results)]
    return [
        tf.nest.pack_sequence_as(results, [np.asarray(x[i]) for x in flat])
        for i in range(strategy.num_replicas_in_sync)
    ]


def _tensors(pulled):
    return {name: x for name, x in vars(pulled).items() if name != "route"}


def _replica_gradients(table, push):
    """`push` as the current replica sees it: the rows it pulls and their gradients."""
    replica = collectives.replica_id()
    pulled = table.pull(tf.convert_to_tensor(push.ids)[replica], tf.convert_to_tensor(push.shared_ids))
    has_bias = "bias" in table.parameters
    return pulled, RowGradients(
        embedding=tf.convert_to_tensor(push.embedding)[replica],
        bias=tf.convert_to_tensor(push.bias)[replica] if has_bias else None,
        shared_embedding=tf.convert_to_tensor(push.shared_embedding)[replica],
        shared_bias=tf.convert_to_tensor(push.shared_bias)[replica] if has_bias else None,
    )


def _compiled_push(strategy, table, *, num_replicas):
    """A function of (push, step, scale, keep): one update in a `tf.function`; returns each replica's
    {"num_rows": number, parameter: squared norm of this shard's part}."""

    @tf.function
    def update(arrays, step, scale, keep):
        def replica_update():
            pulled, gradients = _replica_gradients(table, Push(**arrays))
            collected = table.collect(pulled, gradients)
            table.apply(collected, step=step, scale=scale, keep=keep)
            return {"num_rows": collected.num_rows, **collected.squared_norm}

        return strategy.run(replica_update)

    def run(push, *, step=0, scale=1.0, keep=True):
        arrays = {name: tf.constant(x) for name, x in vars(push).items()}
        results = update(arrays, tf.constant(step), tf.constant(scale), tf.constant(keep))
        return [
            {name: strategy.experimental_local_results(x)[i].numpy() for name, x in results.items()}
            for i in range(num_replicas)
        ]

    return run


class DenseReference:
    """The same table in float64, the whole of it updated by the dense rule, then the weights of touched rows kept."""

    def __init__(self, values, optimizer):
        self.weights = {name: values[name].astype(np.float64) for name in ("embedding", "bias")}
        self.optimizer = optimizer
        self.slots = {
            name: {
                slot_name: np.full(
                    weights.shape if slot.per_element else weights.shape[:1], slot.initial_value
                )
                for slot_name, slot in optimizer.slots.items()
            }
            for name, weights in self.weights.items()
        }

    def update(self, gradients, touched, *, step):
        is_touched = np.zeros(len(self.weights["bias"]), bool)
        is_touched[touched] = True
        for name, gradient in gradients.items():
            # Transposed, so that values per row meet values per element.
            direction = self._direction(gradient.T, self.slots[name], is_touched, step + 1).T
            self.weights[name][touched] -= LEARNING_RATE * direction[touched]

    def _direction(self, gradient, slots, touched, t):
        """What the learning rate multiplies; gradient: [EMBED_DIM, vocab_size] or [vocab_size]."""
        optimizer = self.optimizer
        if isinstance(optimizer, update_rules.SGD):
            return gradient
        if isinstance(optimizer, update_rules.Adagrad):
            slots["accumulator"] += gradient.T**2
            return gradient / (np.sqrt(slots["accumulator"].T) + optimizer.epsilon)
        if isinstance(optimizer, update_rules.RowWiseAdagrad):
            slots["accumulator"] += (gradient**2).reshape(-1, len(touched)).mean(axis=0)
            return gradient / (np.sqrt(slots["accumulator"]) + optimizer.epsilon)
        beta_1, beta_2 = optimizer.beta_1, optimizer.beta_2
        slots["second_moment"] = beta_2 * slots["second_moment"] + (1 - beta_2) * gradient.T**2
        first = beta_1 * slots["first_moment"] + (1 - beta_1) * gradient.T
        slots["first_moment"][touched] = first[touched]
        slots["num_updates"][touched] += 1
        slots["last_step"][touched] = t
        root = np.sqrt(slots["second_moment"].T / (1 - beta_2**t)) + optimizer.epsilon
        return first.T / (1 - beta_1 ** np.maximum(slots["num_updates"], 1)) / root

    def assert_equals(self, table, *, steps):
        values = _logical(table)
        for name, weights in self.weights.items():
            np.testing.assert_allclose(values[name], weights, rtol=1e-5, atol=1e-5, err_msg=name)
            for slot_name, slot in self.slots[name].items():
                actual = values[f"{name}/{slot_name}"].astype(np.float64)
                if slot_name == "second_moment":
                    # A row's decay is caught up when it is next touched.
                    behind = steps - values[f"{name}/last_step"]
                    actual = (self.optimizer.beta_2**behind * actual.T).T
                np.testing.assert_allclose(actual, slot, rtol=1e-5, atol=1e-6, err_msg=f"{name}/{slot_name}")


@pytest.mark.parametrize("num_replicas", [1, 2, 3])
@pytest.mark.parametrize("vocab_size", [VOCAB_SIZE, 2])
def test_pull_returns_the_rows_of_the_ids(mirrored, num_replicas, vocab_size):
    strategy = mirrored(num_replicas)
    table = _make_table(strategy, vocab_size=vocab_size)
    values = _logical(table)
    (push,) = _pushes(num_replicas, 1, vocab_size=vocab_size)

    def pull():
        pulled = table.pull(tf.constant(push.ids)[collectives.replica_id()], tf.constant(push.shared_ids))
        return _tensors(pulled)

    @tf.function
    def compiled_pull():
        return strategy.run(pull)

    for replica, pulled in enumerate(_run(strategy, pull)):
        np.testing.assert_array_equal(pulled["ids"], push.ids[replica])
        np.testing.assert_array_equal(pulled["embedding"], values["embedding"][push.ids[replica]])
        np.testing.assert_array_equal(pulled["bias"], values["bias"][push.ids[replica]])
        np.testing.assert_array_equal(pulled["shared_ids"], push.shared_ids)
        np.testing.assert_array_equal(pulled["shared_embedding"], values["embedding"][push.shared_ids])
        np.testing.assert_array_equal(pulled["shared_bias"], values["bias"][push.shared_ids])
    compiled = compiled_pull()
    for replica, rows in enumerate(strategy.experimental_local_results(compiled["embedding"])):
        assert rows.shape == [BATCH, TIME, EMBED_DIM]
        np.testing.assert_array_equal(rows, values["embedding"][push.ids[replica]])


@pytest.mark.parametrize("num_replicas", [1, 3])
def test_pull_without_shared_ids_and_without_bias(mirrored, num_replicas):
    strategy = mirrored(num_replicas)
    table = _make_table(strategy, bias=False)
    values = table.read_rows("embedding", 0, VOCAB_SIZE)
    ids = np.arange(7 * num_replicas).reshape(num_replicas, 7) * 11

    def pull():
        pulled = table.pull(tf.constant(ids)[collectives.replica_id()])
        assert pulled.bias is None
        assert pulled.shared_bias is None
        return pulled.embedding, pulled.shared_embedding

    for replica, (rows, shared) in enumerate(_run(strategy, pull)):
        np.testing.assert_array_equal(rows, values[ids[replica]])
        assert shared.shape == (0, EMBED_DIM)
    assert table.local_parameter("bias") is None


@pytest.mark.parametrize("num_replicas", [1, 2, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_push_sums_duplicates_and_updates_each_row_once_as_the_dense_rule(mirrored, name, num_replicas):
    steps = 5
    strategy = mirrored(num_replicas)
    table = _make_table(strategy, update_rule=OPTIMIZERS[name])
    reference = DenseReference(_logical(table), OPTIMIZERS[name])
    run = _compiled_push(strategy, table, num_replicas=num_replicas)
    for step, push in enumerate(_pushes(num_replicas, steps)):
        before = _logical(table)
        results = run(push, step=step)
        after = _logical(table)
        touched, dense = push.touched(), push.dense(VOCAB_SIZE)
        reference.update(dense, touched, step=step)

        untouched = np.delete(np.arange(VOCAB_SIZE), touched)
        for key in after:
            np.testing.assert_array_equal(after[key][untouched], before[key][untouched], err_msg=key)
        for shard_id, result in enumerate(results):
            assert result["num_rows"] == np.sum(touched % num_replicas == shard_id)
            for parameter, gradient in dense.items():
                np.testing.assert_allclose(
                    result[parameter], np.sum(gradient[shard_id::num_replicas] ** 2), rtol=1e-5
                )
    reference.assert_equals(table, steps=steps)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_vocabulary_smaller_than_the_number_of_devices(mirrored, name):
    steps = 3
    strategy = mirrored(3)
    table = _make_table(strategy, vocab_size=2, update_rule=OPTIMIZERS[name])
    reference = DenseReference(_logical(table), OPTIMIZERS[name])
    run = _compiled_push(strategy, table, num_replicas=3)
    for step, push in enumerate(_pushes(3, steps, vocab_size=2)):
        results = run(push, step=step)
        reference.update(push.dense(2), push.touched(), step=step)
        assert [result["num_rows"] for result in results] == [1, 1, 0]
    reference.assert_equals(table, steps=steps)
    # The third shard has nothing but padding and scratch.
    for parameter in ("embedding", "bias"):
        np.testing.assert_array_equal(_physical(strategy, table)[parameter][2], 0.0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_scratch_and_padding_rows_stay_zero(mirrored, name):
    strategy = mirrored(3)
    table = _make_table(strategy, update_rule=OPTIMIZERS[name])
    run = _compiled_push(strategy, table, num_replicas=3)
    for step, push in enumerate(_pushes(3, 3)):
        run(push, step=step, keep=step != 1)
    values = _physical(strategy, table)
    for parameter in ("embedding", "bias"):
        for shard_id in range(3):
            behind = table.placement.num_valid_rows(shard_id)
            np.testing.assert_array_equal(values[parameter][shard_id, behind:], 0.0)
    assert table.placement.num_valid_rows(2) < table.placement.scratch_row


@pytest.mark.parametrize("num_replicas", [1, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_keep_false_changes_nothing_even_where_gradients_are_not_finite(mirrored, name, num_replicas):
    strategy = mirrored(num_replicas)
    table = _make_table(strategy, update_rule=OPTIMIZERS[name])
    run = _compiled_push(strategy, table, num_replicas=num_replicas)
    first, second, third = _pushes(num_replicas, 3)
    run(first, step=0)
    before = _logical(table)
    second.embedding[0, 0, 0, 0] = np.nan
    second.shared_bias[-1, 1] = np.inf
    results = run(second, step=1, scale=np.nan, keep=False)
    for parameter in ("embedding", "bias"):
        assert not np.isfinite(sum(result[parameter] for result in results))
    after = _logical(table)
    for key in before:
        np.testing.assert_array_equal(after[key], before[key], err_msg=key)
    run(third, step=2)
    for key, value in _physical(strategy, table).items():
        assert np.isfinite(value).all(), key


def test_scale_multiplies_the_gradients(mirrored):
    strategy = mirrored(2)
    tables = [_make_table(strategy, update_rule=OPTIMIZERS["adagrad"]) for _ in range(2)]
    runs = [_compiled_push(strategy, table, num_replicas=2) for table in tables]
    # A power of two: exact.
    (push,) = _pushes(2, 1)
    fields = {name: x if "ids" in name else x * np.float32(0.25) for name, x in vars(push).items()}
    runs[0](push, scale=0.25)
    runs[1](Push(**fields))
    for name, value in _logical(tables[0]).items():
        np.testing.assert_array_equal(value, _logical(tables[1])[name])


@pytest.mark.parametrize("num_replicas", [1, 2, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_dense_gradients_update_every_row(mirrored, name, num_replicas):
    steps = 3
    strategy = mirrored(num_replicas)
    table = _make_table(strategy, update_rule=OPTIMIZERS[name])
    reference = DenseReference(_logical(table), OPTIMIZERS[name])
    allocated = table.placement.allocated_rows
    rng = np.random.default_rng(5)

    @tf.function
    def update(arrays, dense, step, keep):
        def replica_update():
            pulled, gradients = _replica_gradients(table, Push(**arrays))
            own = {name: values[collectives.replica_id()] for name, values in dense.items()}
            collected = table.collect(pulled, gradients, dense=own)
            table.apply(collected, step=step, keep=keep)
            return collected.squared_norm, collected.num_rows

        return strategy.run(replica_update)

    for step, push in enumerate(_pushes(num_replicas, steps)):
        dense = {"embedding": rng.normal(size=[VOCAB_SIZE, EMBED_DIM]), "bias": rng.normal(size=[VOCAB_SIZE])}
        dense = {name: x.astype(np.float32) for name, x in dense.items()}
        by_shard = {}
        for parameter, values in dense.items():
            by_shard[parameter] = np.zeros([num_replicas, allocated, *values.shape[1:]], np.float32)
            for shard_id in range(num_replicas):
                own = values[shard_id::num_replicas]
                by_shard[parameter][shard_id, : len(own)] = own
        total = {name: push.dense(VOCAB_SIZE)[name] + dense[name] for name in dense}
        arrays = {name: tf.constant(x) for name, x in vars(push).items()}

        before = _logical(table)
        update(arrays, by_shard, tf.constant(step), tf.constant(False))
        for key, value in _logical(table).items():
            np.testing.assert_array_equal(value, before[key], err_msg=key)

        squared_norm, num_rows = update(arrays, by_shard, tf.constant(step), tf.constant(True))
        reference.update(total, np.arange(VOCAB_SIZE), step=step)
        for parameter, gradient in total.items():
            for shard_id, norm in enumerate(strategy.experimental_local_results(squared_norm[parameter])):
                np.testing.assert_allclose(norm, np.sum(gradient[shard_id::num_replicas] ** 2), rtol=1e-5)
        assert sum(int(x) for x in strategy.experimental_local_results(num_rows)) == VOCAB_SIZE
    reference.assert_equals(table, steps=steps)
    for parameter in ("embedding", "bias"):
        np.testing.assert_array_equal(_physical(strategy, table)[parameter][:, -1], 0.0)


@pytest.mark.parametrize("num_replicas", [1, 3])
def test_gradients_left_out_stand_for_zero(mirrored, num_replicas):
    strategy = mirrored(num_replicas)
    table = _make_table(strategy, update_rule=OPTIMIZERS["sgd"])
    before = _logical(table)
    (push,) = _pushes(num_replicas, 1)

    def update():
        pulled, gradients = _replica_gradients(table, push)
        table.push(pulled, dataclasses.replace(gradients, bias=None, shared_bias=None), step=tf.constant(0))

    strategy.run(update)
    after = _logical(table)
    np.testing.assert_array_equal(after["bias"], before["bias"])
    expected = before["embedding"] - LEARNING_RATE * push.dense(VOCAB_SIZE)["embedding"]
    np.testing.assert_allclose(after["embedding"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_replicas", [1, 2, 3])
def test_push_without_compilation_equals_compiled(mirrored, num_replicas):
    strategy = mirrored(num_replicas)
    eager, compiled = (_make_table(strategy, update_rule=OPTIMIZERS["adam"]) for _ in range(2))
    run = _compiled_push(strategy, compiled, num_replicas=num_replicas)
    for step, push in enumerate(_pushes(num_replicas, 2)):

        def update(push=push, step=step):
            eager.push(*_replica_gradients(eager, push), step=tf.constant(step))

        strategy.run(update)
        run(push, step=step)
    for name, value in _logical(eager).items():
        np.testing.assert_allclose(value, _logical(compiled)[name], rtol=1e-6, atol=1e-7, err_msg=name)


def test_table_without_a_strategy(mirrored):
    optimizer = OPTIMIZERS["adagrad"]
    table = ShardedTable(vocab_size=VOCAB_SIZE, embed_dim=EMBED_DIM, update_rule=optimizer)
    reference = DenseReference(_logical(table), optimizer)
    (push,) = _pushes(1, 1)
    table.push(*_replica_gradients(table, push), step=tf.constant(0))
    reference.update(push.dense(VOCAB_SIZE), push.touched(), step=0)
    reference.assert_equals(table, steps=1)
    assert table.placement.num_shards == 1


def test_bias_is_optional_in_updates(mirrored):
    strategy = mirrored(2)
    table = _make_table(strategy, update_rule=OPTIMIZERS["sgd"], bias=False)
    before = table.read_rows("embedding", 0, VOCAB_SIZE)
    (push,) = _pushes(2, 1)
    strategy.run(lambda: table.push(*_replica_gradients(table, push), step=tf.constant(0)) and None)
    expected = before - LEARNING_RATE * push.dense(VOCAB_SIZE)["embedding"]
    np.testing.assert_allclose(table.read_rows("embedding", 0, VOCAB_SIZE), expected, rtol=1e-5, atol=1e-6)
    assert list(table.variables()) == ["embedding"]


def test_schedule_is_read_at_the_step_of_the_push(mirrored):
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([2], [1.0, 0.125])
    strategy = mirrored(2)
    table = _make_table(strategy, update_rule=update_rules.SGD(learning_rate=schedule))
    run = _compiled_push(strategy, table, num_replicas=2)
    (push,) = _pushes(2, 1)
    for step, rate in ((2, 1.0), (3, 0.125)):
        before = table.read_rows("bias", 0, VOCAB_SIZE)
        run(push, step=step)
        expected = before - rate * push.dense(VOCAB_SIZE)["bias"]
        np.testing.assert_allclose(table.read_rows("bias", 0, VOCAB_SIZE), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_replicas", [1, 2, 3])
@pytest.mark.parametrize("name", ["embedding", "bias", "bias/last_step"])
@pytest.mark.parametrize("method", ["write_rows", "send_rows"])
def test_rows_are_written_and_read_at_any_place(mirrored, num_replicas, name, method):
    vocab_size = 23
    table = _make_table(mirrored(num_replicas), vocab_size=vocab_size, update_rule=OPTIMIZERS["adam"])
    expected = table.read_rows(name, 0, vocab_size)
    rng = np.random.default_rng(3)
    for start, stop in [(0, 23), (0, 1), (22, 23), (5, 5), (1, 3), (4, 17), (7, 22), (2, 20)]:
        values = rng.integers(0, 1000, expected[start:stop].shape).astype(expected.dtype)
        getattr(table, method)(name, start, values)
        expected[start:stop] = values
        np.testing.assert_array_equal(table.read_rows(name, 0, vocab_size), expected)
        np.testing.assert_array_equal(table.read_rows(name, start, stop), values)
        actual = table.read_rows(name, start, stop)
        assert (actual.dtype, actual.shape) == (values.dtype, values.shape)


@pytest.mark.parametrize("num_replicas", [1, 2, 3])
@pytest.mark.parametrize("name", ["embedding", "bias", "embedding/second_moment"])
def test_rows_are_written_by_id_in_any_order(mirrored, num_replicas, name):
    vocab_size = 23
    table = _make_table(mirrored(num_replicas), vocab_size=vocab_size, update_rule=OPTIMIZERS["adam"])
    expected = _logical(table)
    rng = np.random.default_rng(3)
    for num_ids in (0, 1, 5, 22, 23):
        ids = rng.permutation(vocab_size)[:num_ids]
        values = rng.normal(size=expected[name][ids].shape).astype(np.float32)
        table.write_ids(name, ids, values)
        expected[name][ids] = values
        for other, rows in _logical(table).items():
            np.testing.assert_array_equal(rows, expected[other], err_msg=other)


def test_rows_by_ids_that_are_repeated_or_not_there_are_refused(mirrored):
    table = _make_table(mirrored(3))
    before = _logical(table)
    rows = np.ones([3, EMBED_DIM], np.float32)
    for name, ids, values, words in [
        ("embedding", [1, 7, 1], rows, "must be distinct.*id 1 2 times"),
        ("embedding", [1, VOCAB_SIZE, 2], rows, f"vocab_size={VOCAB_SIZE}"),
        ("embedding", [1, -1, 2], rows, "Rows must lie in"),
        ("embedding", [1, 2], rows, "for 3 values"),
        ("embedding", [[1], [2], [3]], rows, r"shape \(3, 1\)"),
        ("embedding", [1.0, 2.0, 3.0], rows, "of float64"),
        ("embedding", [1, 2, 3], rows[:, 1:], rf"\('rows', {EMBED_DIM}\)"),
        ("bias", [1, 2, 3], rows, r"\('rows',\)"),
    ]:
        with pytest.raises(ValueError, match=words):
            table.write_ids(name, ids, values)
    for name, value in before.items():
        np.testing.assert_array_equal(_logical(table)[name], value)


def test_rows_may_be_written_between_updates(mirrored):
    strategy = mirrored(3)
    table = _make_table(strategy, update_rule=OPTIMIZERS["sgd"])
    run = _compiled_push(strategy, table, num_replicas=3)
    first, second = _pushes(3, 2)
    run(first)
    values = np.random.default_rng(4).normal(size=[VOCAB_SIZE, EMBED_DIM]).astype(np.float32)
    table.write_rows("embedding", 0, values)
    run(second)
    expected = values - LEARNING_RATE * second.dense(VOCAB_SIZE)["embedding"]
    np.testing.assert_allclose(table.read_rows("embedding", 0, VOCAB_SIZE), expected, rtol=1e-5, atol=1e-6)


def test_initial_values_do_not_depend_on_devices_or_vocabulary(mirrored):
    # 65,536 rows are drawn at a time: the second block is begun here.
    large, small = 65_539, 1003
    values = {
        (n, size): _make_table(mirrored(n), vocab_size=size, embed_dim=2, seed=7).read_rows(
            "embedding", 0, size
        )
        for n, size in [(1, large), (3, large), (1, small), (2, small)]
    }
    np.testing.assert_array_equal(values[3, large], values[1, large])
    np.testing.assert_array_equal(values[2, small], values[1, small])
    np.testing.assert_array_equal(values[1, small], values[1, large][:small])
    # And no block, or row, is a copy of another.
    assert len(np.unique(values[1, large][:, 0])) > 0.99 * large
    other_seed = _make_table(mirrored(1), vocab_size=small, embed_dim=2, seed=8).read_rows(
        "embedding", 0, small
    )
    assert (other_seed != values[1, small]).all()


def test_initial_values_are_uniform_with_the_stated_bound(mirrored):
    embed_dim = 16
    table = _make_table(mirrored(3), embed_dim=embed_dim, random_bias=False)
    values = table.read_rows("embedding", 0, VOCAB_SIZE) * np.sqrt(embed_dim)
    n = values.size
    assert 0.99 < np.abs(values).max() <= 1
    # Mean and mean square of n uniform values on [-1, 1], within 5 standard deviations.
    assert abs(values.mean()) < 5 * np.sqrt(1 / 3 / n)
    assert abs((values**2).mean() - 1 / 3) < 5 * np.sqrt(4 / 45 / n)
    np.testing.assert_array_equal(table.read_rows("bias", 0, VOCAB_SIZE), 0.0)


def test_initializer_and_initial_slots_are_those_given(mirrored):
    table = _make_table(
        mirrored(2),
        initializer=keras.initializers.Constant(11.0),
        update_rule=update_rules.Adagrad(learning_rate=1.0, initial_accumulator=0.375),
    )
    np.testing.assert_array_equal(table.read_rows("embedding", 0, VOCAB_SIZE), 11.0)
    np.testing.assert_array_equal(table.read_rows("embedding/accumulator", 0, VOCAB_SIZE), 0.375)
    np.testing.assert_array_equal(table.read_rows("bias/accumulator", 0, VOCAB_SIZE), 0.375)


@pytest.mark.parametrize("num_replicas", [1, 2, 3, 4, 8])
def test_each_device_holds_its_share_of_the_bytes(mirrored, num_replicas):
    vocab_size, embed_dim = 33_278, 8
    strategy = mirrored(num_replicas)
    table = _make_table(
        strategy,
        vocab_size=vocab_size,
        embed_dim=embed_dim,
        update_rule=OPTIMIZERS["adam"],
        random_bias=False,
    )
    # The parameter and two moments per element, two numbers per row of each.
    whole = 4 * vocab_size * (3 * (embed_dim + 1) + 2 * 2)
    held = np.zeros(num_replicas)
    for variable in table.variables().values():
        components = strategy.experimental_local_results(variable)
        assert len({component.device for component in components}) == num_replicas
        held += [component.numpy().nbytes for component in components]
    np.testing.assert_allclose(held, whole / num_replicas, rtol=0.01)
    np.testing.assert_array_equal(held, sum(table.bytes_per_shard().values()))


def test_layout_names_what_a_table_makes(mirrored):
    optimizer = OPTIMIZERS["adam"]
    table = _make_table(mirrored(2), update_rule=optimizer)
    rules = dict.fromkeys(["embedding", "bias"], optimizer)
    layout = table_layout(vocab_size=VOCAB_SIZE, embed_dim=EMBED_DIM, update_rules=rules)
    variables = table.variables()
    assert {entry.name for entry in layout} == variables.keys()
    for entry in layout:
        assert variables[entry.name].shape == [table.placement.allocated_rows, *entry.row_shape]
        assert variables[entry.name].dtype == entry.dtype


def test_update_without_an_update_rule_is_refused(mirrored):
    strategy = mirrored(1)
    table = _make_table(strategy)
    (push,) = _pushes(1, 1)
    with pytest.raises(ValueError, match="Received: update_rule=None"):
        strategy.run(lambda: table.push(*_replica_gradients(table, push), step=tf.constant(0)))


@pytest.mark.parametrize(("vocab_size", "embed_dim"), [(0, 4), (7, 0)])
def test_sizes_below_one_are_refused(vocab_size, embed_dim):
    with pytest.raises(ValueError, match=re.escape(f"vocab_size={vocab_size}")):
        ShardedTable(vocab_size=vocab_size, embed_dim=embed_dim)


def test_rows_that_are_not_there_or_of_another_width_are_refused(mirrored):
    table = _make_table(mirrored(3))
    before = _logical(table)
    for name, start, values, words in [
        ("embedding", 1, np.ones([2, EMBED_DIM + 1]), rf"\('rows', {EMBED_DIM}\)"),
        ("bias", 1, np.ones([2, 1]), "values must have the shape"),
        ("embedding", VOCAB_SIZE - 1, np.ones([2, EMBED_DIM]), f"vocab_size={VOCAB_SIZE}"),
        ("embedding", -1, np.ones([1, EMBED_DIM]), "Rows must lie in"),
        ("momentum", 0, np.ones([1, EMBED_DIM]), "name must be one of"),
    ]:
        with pytest.raises(ValueError, match=words):
            table.write_rows(name, start, values.astype(np.float32))
    with pytest.raises(ValueError, match="Rows must lie in"):
        table.read_rows("embedding", 0, VOCAB_SIZE + 1)
    for name, value in before.items():
        np.testing.assert_array_equal(_logical(table)[name], value)


def test_table_made_outside_the_scope_is_refused(mirrored):
    strategy = mirrored(2)
    table = ShardedTable(vocab_size=7, embed_dim=3)
    with pytest.raises(ValueError, match=r"a table of 1 shard\(s\) on 2 replica\(s\)"):
        strategy.run(lambda: table.pull(tf.constant([1, 2])).embedding)


def test_gradients_left_out_are_zero(mirrored):
    strategy = mirrored(2)
    table = _make_table(strategy, update_rule=update_rules.SGD(learning_rate=1.0))
    before = _logical(table)

    def push():
        pulled = table.pull(tf.constant([1, 2]), tf.constant([3]))
        table.push(pulled, RowGradients(shared_embedding=tf.ones([1, EMBED_DIM], tf.bfloat16)), step=0)

    strategy.run(push)
    before["embedding"][3] -= 2  # One from each replica.
    for name, value in before.items():
        np.testing.assert_allclose(_logical(table)[name], value, rtol=1e-6)
