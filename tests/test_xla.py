"""The whole step compiles for devices that run nothing but XLA; here XLA for the CPU stands in."""

import functools

import numpy as np
import pytest
import tensorflow as tf
from tiny_experiments import values
from traced_graphs import devices, with_dynamic_shape, without_kernel
from xla_cases import CASES, arguments, make_trainer, step_of, tensors

from lmscale.evaluation import Evaluator

NUM_STEPS = 4
# Evaluated as well. The exact loss is computed by the same function whatever was trained.
EVALUATED = ("lstm, untied, with replacement", "gru, tied, full softmax")
# Float32 that is summed in another order: measured at most 2.1e-7 on losses, 1.4e-7 on norms of gradients. A number
# next to the middle between two bfloat16s may be rounded to either by products that differ in their last bits.
TOLERANCES = dict.fromkeys(CASES, 1e-6) | {"lstm, tied, bfloat16": 1e-3}


def check_operations(concrete):
    """XLA has a kernel for each operation, and shapes do not depend on values."""
    for device in devices():
        assert without_kernel(concrete, device=device) == []
    assert with_dynamic_shape(concrete) == []


def train(strategy, case, *, compiled):
    """(`Trainer`, metrics of each step, {path: value} after the last)."""
    run = make_trainer(strategy, case, static_shapes=compiled)
    step = step_of(run, compiled=compiled)
    if compiled:
        check_operations(step.get_concrete_function(*arguments(run, 0)))
    metrics = []
    for number in range(NUM_STEPS):
        results = step(*arguments(run, number))
        metrics.append({name: value.numpy() for name, value in results.items()})
    return run, metrics, values(run.parameters())


def evaluate(run, *, compiled):
    """{name: sums [2, ...] of two batches}, the state carried between them."""
    evaluator = Evaluator.of_experiment(run.experiment, run.model, strategy=run.strategy)

    @functools.partial(tf.function, autograph=False, jit_compile=compiled)
    def step(state, features, number):
        return evaluator._step(state, features, number, with_training_loss=True)

    batches, state, sums = run.task.evaluation_batches("valid"), evaluator._initial_state(), []
    if compiled:
        number = tf.constant(0)
        check_operations(step.get_concrete_function(state, tensors(batches.at(0)), number))
    for number in range(2):
        of_batch, state = step(state, tensors(batches.at(number)), tf.constant(number))
        sums.append({name: x.numpy() for name, x in of_batch.items()})
    return {name: np.array([of_batch[name] for of_batch in sums]) for name in sums[0]}


@pytest.mark.parametrize("case", CASES)
def test_compiled_step_equals_the_plain_one(mirrored, case):
    plain_run, plain, plain_values = train(mirrored(1), case, compiled=False)
    compiled_run, compiled, compiled_values = train(mirrored(1), case, compiled=True)
    tolerance = TOLERANCES[case]
    for actual, expected in zip(compiled, plain, strict=True):
        assert actual.keys() == expected.keys()
        assert expected["is_finite"]
        assert expected["gradient_norm"] > 0.1  # It is clipped.
        for name in expected:
            np.testing.assert_allclose(actual[name], expected[name], rtol=tolerance, err_msg=name)
    assert len({float(expected["loss"]) for expected in plain}) == NUM_STEPS
    assert compiled_values.keys() == plain_values.keys()
    for path, value in plain_values.items():
        np.testing.assert_allclose(compiled_values[path], value, rtol=tolerance, atol=tolerance, err_msg=path)
    if case in EVALUATED:
        expected, actual = evaluate(plain_run, compiled=False), evaluate(compiled_run, compiled=True)
        assert actual.keys() == expected.keys() >= {"next/loss", "next/weight", "next/training_loss"}
        for name in ("next/loss", "next/training_loss"):
            assert (expected[name] > 1).all()
        for name in expected:
            np.testing.assert_allclose(actual[name], expected[name], rtol=tolerance, err_msg=name)


def test_what_xla_cannot_compile_is_found():
    """An op without a kernel in the branch of a condition, one whose shape depends on values in the body of a loop."""

    @tf.function(autograph=False)
    def function(ids):
        def count(i, total):
            return i + 1, total + tf.size(tf.unique(ids)[0])

        def draw():
            drawn = tf.random.log_uniform_candidate_sampler(tf.zeros([1, 1], tf.int64), 1, 3, True, 9)
            return tf.cast(drawn[0][0], tf.int32)

        def loop():
            return tf.while_loop(lambda i, _: i < 3, count, [tf.constant(0), tf.constant(0)])[1]

        return tf.cond(tf.reduce_sum(ids) > 0, loop, draw)

    concrete = function.get_concrete_function(tf.TensorSpec([3], tf.int32))
    for device in devices():
        assert without_kernel(concrete, device=device) == ["LogUniformCandidateSampler"]
    assert with_dynamic_shape(concrete) == ["Unique"]

    @tf.function(autograph=False)
    def of_text(words):
        return words == words

    # There is a kernel, and not for these types.
    concrete = of_text.get_concrete_function(tf.TensorSpec([3], tf.string))
    assert without_kernel(concrete) == ["Equal DT_STRING"]


def test_step_for_one_device_has_shapes_that_xla_does_not_know(mirrored):
    """`static_shapes` is what makes the difference."""
    case = "convolution, tied, in-batch"
    run = make_trainer(mirrored(1), case, static_shapes=False)
    concrete = step_of(run, compiled=False).get_concrete_function(*arguments(run, 0))
    assert "Unique" in with_dynamic_shape(concrete)
