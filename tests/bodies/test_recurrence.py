"""The recurrence against Keras's LSTM layer, values and gradients; the float64 reference is in test_lstm.py."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from lmscale.bodies.recurrence import lstm_sequence

NAMES = ("inputs", "h", "c", "kernel", "recurrent_kernel", "bias")


def arguments(batch, time, dim, hidden, *, seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((batch, time, dim), (batch, hidden), (batch, hidden), (dim, 4 * hidden), (hidden, 4 * hidden))
    scales = (1.0, 0.5, 0.5, dim**-0.5, hidden**-0.5, 0.5)
    return {
        name: tf.constant(scale * rng.normal(size=shape), tf.float32)
        for name, shape, scale in zip(NAMES, (*shapes, (4 * hidden,)), scales, strict=True)
    }


def by_keras(inputs, h, c, kernel, recurrent_kernel, bias):
    layer = keras.layers.LSTM(h.shape[1], return_sequences=True, return_state=True)
    layer.build(inputs.shape)
    layer.set_weights([kernel, recurrent_kernel, bias])
    variables = [v.value for v in layer.trainable_variables]
    return lambda: layer(inputs, initial_state=[h, c]), [inputs, h, c, *variables]


def value_and_gradients(function, sources, upstream):
    with tf.GradientTape() as tape:
        tape.watch(sources)
        results = function()
        total = tf.add_n([tf.reduce_sum(r * u) for r, u in zip(results, upstream, strict=True)])
    return [*results, *tape.gradient(total, sources)]


def upstreams(batch, time, hidden):
    rng = np.random.default_rng(1)
    shapes = (batch, time, hidden), (batch, hidden), (batch, hidden)
    return [tf.constant(rng.normal(size=shape), tf.float32) for shape in shapes]


SIZES = [(3, 7, 5, 4), (1, 1, 1, 1), (5, 2, 3, 11), (2, 35, 17, 13)]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("how", ["eager", "graph", "xla"])
def test_values_and_gradients_against_keras(sizes, how):
    batch, time, _, hidden = sizes
    given = arguments(*sizes)
    upstream = upstreams(batch, time, hidden)
    expected = value_and_gradients(*by_keras(**given), upstream)

    def ours(given):
        return value_and_gradients(lambda: lstm_sequence(**given), list(given.values()), upstream)

    if how != "eager":
        ours = tf.function(ours, autograph=False, jit_compile=how == "xla")
    # Sums of `time` terms of order 1 in another order.
    for actual, wanted in zip(ours(given), expected, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("dtype", "least", "most"), [("bfloat16", 1e-5, 0.05), ("float16", 1e-6, 0.006)])
def test_narrow_products_are_near(dtype, least, most):
    sizes = batch, time, _, hidden = 4, 9, 6, 10
    given, upstream = arguments(*sizes), upstreams(batch, time, hidden)
    sources = list(given.values())
    exact = value_and_gradients(lambda: lstm_sequence(**given), sources, upstream)
    narrow = value_and_gradients(lambda: lstm_sequence(**given, compute_dtype=dtype), sources, upstream)
    for name, actual, wanted in zip(("outputs", "h", "c", *NAMES), narrow, exact, strict=True):
        assert actual.dtype == tf.float32
        error = np.abs(actual - wanted).max() / np.abs(wanted).max()
        # Products round to 8 or 11 bits; not to have rounded at all would be a test of nothing.
        assert least < error < most, name


def test_layers_of_one_shape_share_a_trace():
    from lmscale.bodies import recurrence

    recurrence._layer.cache_clear()
    for seed in (1, 2):
        lstm_sequence(**arguments(3, 4, 6, 6, seed=seed))
    assert recurrence._layer.cache_info().misses == 1
    lstm_sequence(**arguments(3, 5, 6, 6))
    assert recurrence._layer.cache_info().misses == 2


def test_debugging_runs_the_python_code_and_leaves_no_trace_behind():
    sizes = batch, time, _, hidden = 3, 4, 5, 2
    given, upstream = arguments(*sizes), upstreams(batch, time, hidden)

    def run():
        return value_and_gradients(lambda: lstm_sequence(**given), list(given.values()), upstream)

    tf.config.run_functions_eagerly(True)
    try:
        debugged = run()
    finally:
        tf.config.run_functions_eagerly(False)
    for actual, wanted in zip(run(), debugged, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-5, atol=1e-6)


def test_batch_of_unknown_size_is_refused():
    given = arguments(3, 4, 5, 6)
    inputs = given.pop("inputs")

    @tf.function(input_signature=[tf.TensorSpec([None, 4, 5])])
    def run(inputs):
        return lstm_sequence(inputs, **given)

    with pytest.raises(ValueError, match=r"static shape .* Received: \(None, 4, 5\)"):
        run(inputs)


@pytest.mark.parametrize(
    ("name", "cut", "message"),
    [
        ("h", np.s_[:, :-1], r"h must .* \[3, 6\].* Received: \(3, 5\)"),
        ("h", np.s_[:-1], r"h must .* \[3, 6\].* Received: \(2, 6\)"),
        ("c", np.s_[:, :-1], r"c must .* \[3, 6\].* Received: \(3, 5\)"),
        ("c", np.s_[0], r"c must .* \[3, 6\].* Received: \(6,\)"),
        ("kernel", np.s_[:, :-1], r"kernel must .* \[5, 24\].* Received: \(5, 23\)"),
        ("kernel", np.s_[:-1], r"kernel must .* \[5, 24\].* Received: \(4, 24\)"),
        ("recurrent_kernel", np.s_[:, :-1], r"recurrent_kernel must .* \[6, 24\].* Received: \(6, 23\)"),
        ("bias", np.s_[:-1], r"bias must .* \[24\].* Received: \(23,\)"),
    ],
)
def test_shapes_that_disagree_are_refused(name, cut, message):
    given = arguments(3, 4, 5, 6)
    given[name] = given[name][cut]
    with pytest.raises(ValueError, match="^" + message):
        lstm_sequence(**given)
