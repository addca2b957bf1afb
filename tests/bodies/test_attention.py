"""Attention, plain and in blocks, against float64; positions by what they are for; memory by measuring it."""

import functools
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from lmscale.bodies.attention import causal_attention, rotary

BATCH, HEADS, DIM = 2, 3, 4


def arguments(time, *, seed=0):
    """Queries, keys, values and the gradient of the result; products large enough for a softmax that is not flat."""
    rng = np.random.default_rng(seed)
    return [2 * rng.normal(size=[BATCH, HEADS, time, DIM]).astype(np.float32) for _ in range(4)]


def reference(queries, keys, values, d_result):
    """(result, d_queries, d_keys, d_values), float64."""
    queries, keys, values, d_result = (x.astype(np.float64) for x in (queries, keys, values, d_result))
    time = queries.shape[2]
    logits = queries @ keys.swapaxes(2, 3) / np.sqrt(DIM)
    logits = np.where(np.tri(time, dtype=bool), logits, -np.inf)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    d_weights = d_result @ values.swapaxes(2, 3)
    d_logits = weights * (d_weights - (weights * d_weights).sum(axis=-1, keepdims=True)) / np.sqrt(DIM)
    return (
        weights @ values,
        d_logits @ keys,
        d_logits.swapaxes(2, 3) @ queries,
        weights.swapaxes(2, 3) @ d_result,
    )


def value_and_gradients(*given, block, dtype=tf.float32):
    queries, keys, values, d_result = (tf.cast(x, dtype) for x in given)
    with tf.GradientTape() as tape:
        tape.watch([queries, keys, values])
        result = causal_attention(queries, keys, values, block=block)
    return result, *tape.gradient(result, [queries, keys, values], output_gradients=d_result)


# All of the window at once; blocks that divide it, that do not, of one step, and two that are nearly the window.
CASES = [(7, 7), (1, 1), (12, 4), (13, 4), (5, 1), (9, 8)]


@pytest.mark.parametrize(("time", "block"), CASES)
@pytest.mark.parametrize("how", ["eager", "xla"])
def test_values_and_gradients_against_float64(time, block, how):
    given = arguments(time)
    run = functools.partial(value_and_gradients, block=block)
    if how == "xla":
        run = tf.function(run, autograph=False, jit_compile=True)
    for actual, expected in zip(run(*given), reference(*given), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=2e-5)


def test_large_logits_in_blocks():
    """A softmax that is one on a key of an earlier or of a later block, where exp of the logits overflows."""
    queries, keys, values, d_result = arguments(11, seed=1)
    given = 10 * queries, 10 * keys, values, d_result
    for actual, expected in zip(value_and_gradients(*given, block=4), reference(*given), strict=True):
        scale = max(1.0, np.abs(expected).max())
        np.testing.assert_allclose(actual / scale, expected / scale, atol=2e-5)


def test_narrow_blocks_are_near():
    given = arguments(13)
    for actual, expected in zip(
        value_and_gradients(*given, block=4, dtype=tf.bfloat16), reference(*given), strict=True
    ):
        assert actual.dtype == tf.bfloat16
        error = np.abs(tf.cast(actual, tf.float32) - expected).max() / np.abs(expected).max()
        # Eight bits; not to have rounded at all would be a test of nothing.
        assert 1e-4 < error < 0.05


def test_rotation_against_complex_numbers():
    x = np.random.default_rng(0).normal(size=[2, 5, 3, 8]).astype(np.float32)
    positions = np.array([[0, 1, 2, 3, 4], [7, 8, 9, 100, 2000]], np.int32)
    pairs = x[..., :4].astype(np.float64) + 1j * x[..., 4:]
    angles = positions[:, :, None, None] * 10_000.0 ** (-np.arange(4) / 4)
    turned = pairs * np.exp(1j * angles)
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    np.testing.assert_allclose(
        rotary(x, tf.constant(positions)), expected, atol=5e-4
    )  # Of an angle of 2,000.
    np.testing.assert_allclose(rotary(x[:1], tf.constant(positions[0])), expected[:1], atol=2e-6)


def test_products_depend_on_distances_alone():
    rng = np.random.default_rng(1)
    query, key = (tf.constant(rng.normal(size=[1, 6]), tf.float32) for _ in range(2))

    def product(of_query, of_key):
        q, k = (
            rotary(tf.reshape(x, [1, 1, 1, 6]), tf.constant([position]))
            for x, position in ((query, of_query), (key, of_key))
        )
        return float(tf.reduce_sum(q * k))

    assert product(3, 1) == pytest.approx(product(42, 40), abs=1e-4)
    assert abs(product(3, 1) - product(3, 2)) > 1e-2


def peak(time, how):
    script = pathlib.Path(__file__).with_name("attention_peak_memory.py")
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(script.parents[2]),
        "MALLOC_MMAP_THRESHOLD_": str(2**20),  # What is in use, not what the allocator keeps of it.
    }
    command = [sys.executable, str(script), str(time), how]
    completed = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert completed.returncode == 0, completed.stderr
    print(time, how, completed.stdout)
    return json.loads(completed.stdout)


def test_memory_grows_with_the_window_and_not_with_its_square():
    """Forward and backward at 8,192 steps: the logits of two heads would be 512 MiB, each of the several times."""
    measured = peak(8192, "blocks")
    assert measured["arguments_mib"] == 6
    # Copies of arguments, results and gradients, in blocks and not.
    assert measured["peak_mib"] < 20 * measured["arguments_mib"]
