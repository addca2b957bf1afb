import itertools
import re

import numpy as np
import pytest
import tensorflow as tf

from lmscale.bodies.dropout import DropoutStream, check_rate
from lmscale.distribution import collectives

BATCH, TIME, DIM = 6, 5, 7  # 35 values an example: Philox yields four at a time.


def _mask(*, seed=3, step=4, first_example=0, batch=BATCH, time=TIME, dim=DIM, rate=0.3, skip=0, **kwargs):
    """[batch, time, dim] bool, True where kept: the mask that follows `skip` others."""
    stream = DropoutStream(seed=seed, step=tf.constant(step), first_example=first_example)
    for _ in range(skip):
        stream.dropout(tf.ones([1, 1, 1]), rate)
    return stream.dropout(tf.ones([batch, time, dim]), rate, **kwargs).numpy() > 0


@pytest.mark.parametrize("over_time", [False, True])
def test_mask_of_a_slice_is_the_slice_of_the_mask(over_time):
    whole = _mask(over_time=over_time)
    for num_replicas in (2, 3):
        size = BATCH // num_replicas
        for first in range(0, BATCH, size):
            part = _mask(first_example=first, batch=size, over_time=over_time)
            np.testing.assert_array_equal(part, whole[first : first + size])
            as_tensor = _mask(first_example=tf.constant(first), batch=size, over_time=over_time)
            np.testing.assert_array_equal(as_tensor, part)


def test_replicas_compute_the_masks_of_the_whole_batch(mirrored):
    strategy, rate = mirrored(3), 0.4
    x = tf.random.stateless_normal([BATCH, TIME, DIM], [1, 2])
    per_replica = BATCH // 3

    def drop(x, first, step):
        stream = DropoutStream(seed=5, step=step, first_example=first)
        return stream.dropout(x, rate), stream.dropout(x, rate, over_time=True)

    @tf.function
    def step_function(step):
        def replica_step():
            first = collectives.replica_id() * per_replica
            return drop(x[first : first + per_replica], first, step)

        return strategy.run(replica_step)

    for expected, actual in zip(drop(x, 0, tf.constant(9)), step_function(tf.constant(9)), strict=True):
        parts = strategy.experimental_local_results(actual)
        np.testing.assert_array_equal(np.concatenate([part.numpy() for part in parts]), expected)


@pytest.mark.parametrize("over_time", [False, True])
def test_xla_draws_the_same_bits(over_time):
    x = tf.random.stateless_normal([BATCH, TIME, DIM], [1, 2])

    def drop(step, first):
        stream = DropoutStream(seed=5, step=step, first_example=first)
        return [stream.dropout(x, rate, over_time=over_time) for rate in (0.5, 0.25)]

    expected = drop(tf.constant(7), tf.constant(12))
    for jit_compile in (False, True):
        compiled = tf.function(drop, jit_compile=jit_compile)(tf.constant(7), tf.constant(12))
        for a, b in zip(compiled, expected, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("rate", [0.01, 0.2, 0.5, 0.65, 0.9])
@pytest.mark.parametrize("over_time", [False, True])
def test_rate_is_the_fraction_dropped(rate, over_time):
    kept = _mask(batch=301, time=53, dim=31, rate=rate, over_time=over_time)[:, : 1 if over_time else None]
    z = (kept.mean() - (1 - rate)) / np.sqrt(rate * (1 - rate) / kept.size)
    assert abs(z) < 4
    # Alike in every example, at every time step and in every dimension: of these normal deviates none exceeds 5.
    for axes in ((1, 2), (0, 2), (0, 1)):
        size = np.prod([kept.shape[axis] for axis in axes])
        deviations = (kept.mean(axis=axes) - (1 - rate)) / np.sqrt(rate * (1 - rate) / size)
        assert np.abs(deviations).max() < 5


def test_kept_values_are_scaled_and_the_expectation_is_the_input():
    rate, draws = 0.3, 400
    x = tf.random.stateless_normal([BATCH, TIME, DIM], [1, 2])
    total = np.zeros(x.shape)
    for step in range(draws):
        y = DropoutStream(seed=3, step=tf.constant(step), first_example=0).dropout(x, rate).numpy()
        np.testing.assert_allclose(y[y != 0], x.numpy()[y != 0] / (1 - rate), rtol=1e-6)
        total += y
    # The standard deviation of a mean of `draws` values, each x / (1 - rate) with probability 1 - rate.
    deviation = np.abs(x) * np.sqrt(rate / (1 - rate) / draws)
    assert np.max(np.abs(total / draws - x) / deviation) < 5


def test_masks_of_other_steps_layers_seeds_and_examples_are_independent():
    rate, shape = 0.5, {"batch": 40, "time": 11, "dim": 17}
    masks = {
        "first": _mask(rate=rate, **shape),
        "next step": _mask(rate=rate, step=5, **shape),
        "far step": _mask(rate=rate, step=2**31 - 1, **shape),
        "next layer": _mask(rate=rate, skip=1, **shape),
        "layer after": _mask(rate=rate, skip=2, **shape),
        "next seed": _mask(rate=rate, seed=4, **shape),
        "largest seed": _mask(rate=rate, seed=2**31 - 1, **shape),
        "further examples": _mask(rate=rate, first_example=40, **shape),
    }
    n = masks["first"].size
    for (a, mask_a), (b, mask_b) in itertools.combinations(masks.items(), 2):
        # Agreements of independent fair masks: binomial(n, 1/2), within 5 standard deviations.
        assert abs(np.mean(mask_a == mask_b) - 0.5) < 5 * 0.5 / np.sqrt(n), (a, b)
    examples = masks["first"].reshape(40, -1)
    for i, j in itertools.combinations(range(40), 2):
        assert abs(np.mean(examples[i] == examples[j]) - 0.5) < 5 * 0.5 / np.sqrt(examples.shape[1])


def test_the_same_arguments_give_the_same_mask():
    np.testing.assert_array_equal(_mask(), _mask())
    np.testing.assert_array_equal(_mask(skip=2), _mask(skip=2))


def test_over_time_keeps_one_mask_over_the_window():
    kept = _mask(over_time=True, rate=0.5)
    np.testing.assert_array_equal(kept, np.broadcast_to(kept[:, :1], kept.shape))
    assert not np.array_equal(kept[0], kept[1])
    fresh = _mask(rate=0.5)
    assert not np.array_equal(fresh, np.broadcast_to(fresh[:, :1], fresh.shape))


def test_rate_zero_returns_the_input_and_leaves_the_later_masks_alone():
    x = tf.ones([BATCH, TIME, DIM])
    stream = DropoutStream(seed=3, step=tf.constant(4), first_example=0)
    assert stream.dropout(x, 0.0) is x
    np.testing.assert_array_equal(stream.dropout(x, 0.3).numpy() > 0, _mask(skip=1))


def test_gradient_is_the_scaled_mask():
    rate = 0.3
    x = tf.random.stateless_normal([BATCH, TIME, DIM], [1, 2])
    upstream = tf.random.stateless_normal(x.shape, [3, 4])
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = DropoutStream(seed=3, step=tf.constant(4), first_example=0).dropout(x, rate)
    expected = np.where(_mask(rate=rate), upstream / (1 - rate), 0)
    np.testing.assert_allclose(tape.gradient(y, x, output_gradients=upstream), expected, rtol=1e-6)


def test_dtype_of_the_input_is_kept():
    x = tf.ones([BATCH, TIME, DIM], tf.bfloat16)
    y = DropoutStream(seed=3, step=tf.constant(4), first_example=0).dropout(x, 0.5)
    assert y.dtype == tf.bfloat16
    np.testing.assert_array_equal(y.numpy().astype(np.float32), 2.0 * _mask(rate=0.5))


@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan")])
def test_rates_out_of_range_are_refused(rate):
    check_rate(first=0.0, second=0.999)
    with pytest.raises(ValueError, match=re.escape(f"second must be in [0, 1). Received: second={rate}.")):
        check_rate(first=0.1, second=rate)
