import numpy as np
import pytest
import tensorflow as tf
from replicas import run_everywhere

from lmscale.distribution import collectives


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("num_replicas", [2, 3])
@pytest.mark.parametrize("axis", [0, 1])
def test_all_gather_concatenates_in_the_order_of_replicas(mirrored, num_replicas, axis, compiled):
    values = np.random.default_rng(0).normal(size=[num_replicas, 5, 3]).astype(np.float32)
    # Captured from outside the replica function.
    captured = tf.constant(values)

    def gather():
        return collectives.all_gather(captured[collectives.replica_id()], axis=axis)

    for result in run_everywhere(mirrored(num_replicas), gather, compiled=compiled):
        np.testing.assert_array_equal(result, np.concatenate(values, axis=axis))


@pytest.mark.parametrize("num_replicas", [2, 3])
def test_all_gather_of_a_captured_tensor_and_of_integers(mirrored, num_replicas):
    captured = tf.constant([[7, 8]], tf.int32)
    for result in run_everywhere(
        mirrored(num_replicas), lambda: collectives.all_gather(captured), compiled=True
    ):
        np.testing.assert_array_equal(result, [[7, 8]] * num_replicas)
        assert result.dtype == np.int32


@pytest.mark.parametrize("num_replicas", [2, 3])
def test_all_gather_of_nothing_is_nothing(mirrored, num_replicas):
    for result in run_everywhere(
        mirrored(num_replicas), lambda: collectives.all_gather(tf.zeros([0, 4])), compiled=True
    ):
        assert result.shape == (0, 4)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("num_replicas", [2, 3])
def test_all_reduce_sum_adds_over_the_replicas(mirrored, num_replicas, compiled):
    rng = np.random.default_rng(1)
    values = {
        "matrix": rng.integers(-9, 9, [num_replicas, 5, 3]).astype(np.float32),
        "scalar": rng.integers(-9, 9, [num_replicas]).astype(np.float32),
    }
    captured = {name: tf.constant(x) for name, x in values.items()}

    def reduce():
        own = {name: x[collectives.replica_id()] for name, x in captured.items()}
        return collectives.all_reduce_sum([own, own["matrix"]]), collectives.all_reduce_sum(own["scalar"])

    for (both, matrix), scalar in run_everywhere(mirrored(num_replicas), reduce, compiled=compiled):
        for name, x in values.items():
            np.testing.assert_array_equal(both[name], x.sum(axis=0))
        np.testing.assert_array_equal(matrix, values["matrix"].sum(axis=0))
        np.testing.assert_array_equal(scalar, values["scalar"].sum())


@pytest.mark.parametrize("in_strategy", [False, True])
def test_one_replica_exchanges_nothing(mirrored, in_strategy):
    x = tf.constant([1.0, 2.0])

    def check():
        assert collectives.num_replicas() == 1
        assert collectives.replica_id() == 0
        assert collectives.all_gather(x) is x
        assert collectives.all_reduce_sum(x) is x
        nested = [x, {"x": x}]
        assert collectives.all_reduce_sum(nested) is nested

    if in_strategy:
        mirrored(1).run(check)
    else:
        check()


@pytest.mark.parametrize("num_replicas", [1, 2, 3])
def test_replicas_are_numbered_by_python_ints(mirrored, num_replicas):
    seen = []

    def note():
        seen.append((collectives.replica_id(), collectives.num_replicas()))

    mirrored(num_replicas).run(note)
    assert sorted(seen) == [(i, num_replicas) for i in range(num_replicas)]
    assert all(type(i) is int for i, _ in seen)


def test_replica_id_outside_of_run_is_refused(mirrored):
    with (
        mirrored(2).scope(),
        pytest.raises(ValueError, match=r"inside strategy.run. Received: a cross-replica"),
    ):
        collectives.replica_id()


@pytest.mark.parametrize("num_replicas", [1, 3])
def test_local_value_is_the_component_of_the_replica(mirrored, num_replicas):
    strategy = mirrored(num_replicas)
    with strategy.scope():
        variable = tf.Variable(
            [0.0, 0.0],
            synchronization=tf.VariableSynchronization.ON_READ,
            aggregation=tf.VariableAggregation.NONE,
        )

    @tf.function
    def write():
        def replica_write():
            own = collectives.local_value(variable)
            own.assign(tf.fill([2], 10.0 + collectives.replica_id()))
            with tf.GradientTape() as tape:
                tape.watch(own)
                y = tf.reduce_sum(tf.square(own))
            return tape.gradient(y, own)

        return strategy.run(replica_write)

    gradients = strategy.experimental_local_results(write())
    for replica, component in enumerate(strategy.experimental_local_results(variable)):
        np.testing.assert_array_equal(component, [10.0 + replica] * 2)
        np.testing.assert_array_equal(gradients[replica], [20.0 + 2 * replica] * 2)


def test_all_gather_of_narrow_values_keeps_their_bits(mirrored):
    values = tf.constant([[1.0, -0.0, 3e38], [float("nan"), float("inf"), 1e-40]], tf.bfloat16)

    def gather():
        return tf.bitcast(collectives.all_gather(values[collectives.replica_id()]), tf.int16)

    expected = tf.bitcast(tf.reshape(values, [-1]), tf.int16).numpy()
    for result in run_everywhere(mirrored(2), gather, compiled=True):
        np.testing.assert_array_equal(result, expected)
