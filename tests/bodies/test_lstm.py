import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from references import lstm, lstm_weights

from lmscale.bodies import recurrent
from lmscale.bodies.dropout import DropoutStream
from lmscale.bodies.encoder import Encoder
from lmscale.bodies.lstm import lstm_body
from lmscale.parameters.layers import Layers

BATCH, TIME, EMBED_DIM = 3, 7, 5


def _inputs(*, time=TIME, seed=0):
    return np.random.default_rng(seed).normal(size=[BATCH, time, EMBED_DIM]).astype(np.float32)


def _state(body, *, seed=1):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=s.shape).astype(np.float32) for s in body.initial_state(BATCH)]


def _built(**kwargs):
    """A body with random weights, the biases too."""
    body = lstm_body(**kwargs)
    body(tf.zeros([1, 1, EMBED_DIM]), body.initial_state(1), dropout=None)
    rng = np.random.default_rng(2)
    for layer in body.layers.values():
        layer.set_weights([rng.normal(scale=0.5, size=w.shape) for w in layer.get_weights()])
    return body


def _reference(weights, inputs, state, masks=None):
    """The stack in float64; `masks`, one more than layers, multiply what goes in and what comes out."""
    masks = masks or [1.0] * (len(weights) + 1)
    x, new_state = inputs, []
    for i, layer in enumerate(weights):
        x, h, c = lstm(x * masks[i], **layer, h=state[2 * i], c=state[2 * i + 1])
        new_state += [h, c]
    return x * masks[-1], new_state


def _as_float64(arrays):
    return [np.asarray(x, np.float64) for x in arrays]


def _assert_close(actual, expected):
    for a, b in zip(tf.nest.flatten(actual), tf.nest.flatten(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(("num_layers", "last_hidden_dim"), [(1, None), (2, 3), (3, None)])
def test_values_against_numpy(num_layers, last_hidden_dim):
    body = _built(num_layers=num_layers, hidden_dim=4, last_hidden_dim=last_hidden_dim)
    inputs, state = _inputs(), _state(body)
    weights = [lstm_weights(layer) for layer in body.layers.values()]
    expected = _reference(weights, inputs.astype(np.float64), _as_float64(state))
    _assert_close(body(tf.constant(inputs), [tf.constant(s) for s in state], dropout=None), expected)
    assert expected[0].shape == (BATCH, TIME, last_hidden_dim or 4)


@pytest.mark.parametrize("over_time", [False, True])
def test_a_window_in_parts_is_the_window(monkeypatch, over_time):
    """Values, state, gradients and masks, for parts that do not divide the window."""
    body = _built(num_layers=3, hidden_dim=4, dropout=0.4, dropout_over_time=over_time)
    inputs, state = tf.constant(_inputs(time=11)), [tf.constant(s) for s in _state(body)]
    variables = [v.value for layer in body.layers.values() for v in layer.trainable_variables]

    def run(least_steps):
        monkeypatch.setattr(recurrent, "_LEAST_STEPS_OF_A_PART", least_steps)
        stream = DropoutStream(seed=5, step=tf.constant(2), first_example=0)
        with tf.GradientTape() as tape:
            tape.watch([inputs, state])
            outputs, new_state = body(inputs, state, dropout=stream)
            loss = tf.reduce_sum(outputs * tf.sin(tf.reshape(tf.range(44.0 * BATCH), outputs.shape)))
        return outputs, new_state, tape.gradient(loss, [inputs, state, variables])

    whole = run(12)
    for least_steps in (1, 2, 4):
        _assert_close(run(least_steps), whole)


def test_gradients_against_differences_of_the_float64_reference():
    body = _built(num_layers=2, hidden_dim=4, last_hidden_dim=3)
    inputs, state = tf.constant(_inputs()), [tf.constant(s) for s in _state(body)]
    rng = np.random.default_rng(3)
    upstream = rng.normal(size=[BATCH, TIME, 3])
    variables = [v for layer in body.layers.values() for v in layer.trainable_variables]
    with tf.GradientTape() as tape:
        tape.watch([inputs, state])
        hidden, _ = body(inputs, state, dropout=None)
        loss = tf.reduce_sum(hidden * tf.constant(upstream, tf.float32))
    gradients = tf.nest.flatten(tape.gradient(loss, [inputs, state, [v.value for v in variables]]))

    point = _as_float64([inputs, *state, *(v.numpy() for v in variables)])

    def reference(point):
        names = ("kernel", "recurrent_kernel", "bias")
        weights = [dict(zip(names, point[start : start + 3], strict=True)) for start in (5, 8)]
        return np.sum(_reference(weights, point[0], point[1:5])[0] * upstream)

    # Along directions that move one tensor each; the error of a central difference at this size is about 1e-9.
    for i, gradient in enumerate(gradients):
        for _ in range(3):
            direction = rng.normal(size=point[i].shape)
            ends = []
            for size in (-1e-4, 1e-4):
                moved = list(point)
                moved[i] = point[i] + size * direction
                ends.append(reference(moved))
            expected = (ends[1] - ends[0]) / 2e-4
            actual = np.sum(np.asarray(gradient, np.float64) * direction)
            np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


def test_two_windows_with_the_state_carried_are_one_long_window():
    body = _built(num_layers=2, hidden_dim=4)
    inputs = tf.constant(_inputs(time=11))
    whole, whole_state = body(inputs, body.initial_state(BATCH), dropout=None)
    first, state = body(inputs[:, :4], body.initial_state(BATCH), dropout=None)
    second, state = body(inputs[:, 4:], state, dropout=None)
    _assert_close([tf.concat([first, second], axis=1), *state], [whole, *whole_state])
    # The state matters: without it the second window differs.
    afresh, _ = body(inputs[:, 4:], body.initial_state(BATCH), dropout=None)
    assert np.abs(afresh - second).max() > 0.01


def test_initial_state_is_zeros():
    body = lstm_body(num_layers=2, hidden_dim=4, last_hidden_dim=3)
    assert body.stateful
    state = body.initial_state(BATCH)
    assert [s.shape.as_list() for s in state] == [[BATCH, 4], [BATCH, 4], [BATCH, 3], [BATCH, 3]]
    for s in state:
        np.testing.assert_array_equal(s, 0.0)


@pytest.mark.parametrize("over_time", [False, True])
def test_dropout_is_on_embeddings_between_layers_and_on_the_output(over_time):
    rates = {"embedding_dropout": 0.2, "dropout": 0.3, "output_dropout": 0.4}
    body = _built(num_layers=3, hidden_dim=4, dropout_over_time=over_time, **rates)
    inputs, state = _inputs(), _state(body)

    def stream():
        return DropoutStream(seed=5, step=tf.constant(6), first_example=7)

    masks = stream()
    sizes_and_rates = [(EMBED_DIM, 0.2), (4, 0.3), (4, 0.3), (4, 0.4)]
    masks = [
        masks.dropout(tf.ones([BATCH, TIME, size]), rate, over_time=over_time).numpy().astype(np.float64)
        for size, rate in sizes_and_rates
    ]
    weights = [lstm_weights(layer) for layer in body.layers.values()]
    expected = _reference(weights, inputs.astype(np.float64), _as_float64(state), masks)
    arguments = tf.constant(inputs), [tf.constant(s) for s in state]
    _assert_close(body(*arguments, dropout=stream()), expected)
    # Without a stream, as in evaluation, nothing is dropped.
    undropped = _reference(weights, inputs.astype(np.float64), _as_float64(state))
    _assert_close(body(*arguments, dropout=None), undropped)


def test_embedding_and_output_dropout_are_the_same_as_between_layers_unless_given():
    def run(**rates):
        body = _built(num_layers=2, hidden_dim=4, **rates)
        dropout = DropoutStream(seed=5, step=tf.constant(6), first_example=0)
        return body(tf.constant(_inputs()), body.initial_state(BATCH), dropout=dropout)[0].numpy()

    spelt_out = run(dropout=0.3, embedding_dropout=0.3, output_dropout=0.3)
    np.testing.assert_array_equal(run(dropout=0.3), spelt_out)
    assert np.mean(run(dropout=0.3, output_dropout=0.0) == 0) < np.mean(spelt_out == 0)


def test_bfloat16_products_keep_a_float32_state():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        body = _built(num_layers=2, hidden_dim=4)
    finally:
        keras.config.set_dtype_policy("float32")
    hidden, state = body(tf.constant(_inputs()), body.initial_state(BATCH), dropout=None)
    assert all(s.dtype == tf.float32 for s in state)
    weights = [lstm_weights(layer) for layer in body.layers.values()]
    expected, _ = _reference(weights, _inputs().astype(np.float64), [np.zeros([BATCH, 4])] * 4)
    # Eight bits, in every product of 14 dependent steps.
    error = np.abs(tf.cast(hidden, tf.float32) - expected).max()
    assert 1e-4 < error < 0.05


def test_a_frozen_layer_runs_as_before_and_is_not_trained():
    body = _built(num_layers=2, hidden_dim=4)
    inputs, state = tf.constant(_inputs()), body.initial_state(BATCH)
    before, _ = body(inputs, state, dropout=None)
    body.layers["lstm_0"].trainable = False
    after, _ = body(inputs, state, dropout=None)
    np.testing.assert_array_equal(after, before)
    encoder = Encoder(body, input_dim=EMBED_DIM, output_dim=EMBED_DIM, batch_size=BATCH, window=TIME)
    trained = Layers(encoder.layers, num_replicas=1).trainable_variables
    kernels = [f"layers/lstm_1/{name}" for name in ("kernel", "recurrent_kernel", "bias")]
    assert list(trained) == [*kernels, "layers/projection/kernel"]


def test_compute_dtype_of_the_layers_goes_before_the_experiments():
    inputs = tf.constant(_inputs())
    run = {}
    for policy, compute_dtype in [
        ("float32", "bfloat16"),
        ("mixed_bfloat16", None),
        ("float32", None),
    ]:
        keras.config.set_dtype_policy(policy)
        try:
            body = _built(num_layers=1, hidden_dim=4, compute_dtype=compute_dtype)
        finally:
            keras.config.set_dtype_policy("float32")
        run[policy, compute_dtype] = body(inputs, body.initial_state(BATCH), dropout=None)[0].numpy()
    narrow = run["float32", "bfloat16"]
    np.testing.assert_array_equal(narrow, run["mixed_bfloat16", None])
    assert np.abs(narrow - run["float32", None]).max() > 1e-5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_layers": 0, "hidden_dim": 4}, "num_layers=0"),
        ({"num_layers": 1, "hidden_dim": 0}, "hidden_dim=0"),
        ({"num_layers": 1, "hidden_dim": 4, "last_hidden_dim": 0}, "last_hidden_dim=0"),
        ({"num_layers": 1, "hidden_dim": 4, "dropout": 1.0}, "dropout=1.0"),
        ({"num_layers": 1, "hidden_dim": 4, "compute_dtype": "float16"}, "compute_dtype='float16'"),
        ({"num_layers": 1, "hidden_dim": 4, "embedding_dropout": -0.5}, "embedding_dropout=-0.5"),
        ({"num_layers": 1, "hidden_dim": 4, "output_dropout": 1.5}, "output_dropout=1.5"),
    ],
)
def test_values_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        lstm_body(**arguments)
