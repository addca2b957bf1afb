"""GRU, simple RNN and LSTM with projection against loops in float64; the stack that they share is in test_lstm.py."""

import functools
import re

import numpy as np
import pytest
import tensorflow as tf
from references import gru, lstm, simple_rnn

from lmscale.bodies import recurrent
from lmscale.bodies.dropout import DropoutStream
from lmscale.bodies.gru import GruBody
from lmscale.bodies.lstm import ProjectedLstm, lstm_body
from lmscale.bodies.simple_rnn import SimpleRnnBody

BATCH, TIME, EMBED_DIM = 3, 7, 5
# {name: (body, layer in float64, tensors of a layer's state)}.
KINDS = {
    "gru": (GruBody, gru, ("h",)),
    "simple_rnn": (SimpleRnnBody, simple_rnn, ("h",)),
    "lstm_with_projection": (
        functools.partial(lstm_body, recurrent_projection_dim=6),
        lstm,
        ("h", "c"),
    ),
}
WEIGHTS = ("kernel", "recurrent_kernel", "bias", "projection")


class Built:
    """A body of two layers with random weights, inputs, a state, and the stack in float64."""

    def __init__(self, kind, **settings):
        make, self.layer, self.state_names = KINDS[kind]
        self.body = make(num_layers=2, hidden_dim=4, last_hidden_dim=3, **settings)
        rng = np.random.default_rng(0)
        self.inputs = tf.constant(rng.normal(size=[BATCH, TIME, EMBED_DIM]), tf.float32)
        self.state = [
            tf.constant(rng.normal(size=s.shape), tf.float32) for s in self.body.initial_state(BATCH)
        ]
        self.body(self.inputs, self.state, dropout=None)
        for layer in self.body.layers.values():
            layer.set_weights([rng.normal(scale=0.5, size=w.shape) for w in layer.get_weights()])
        self.variables = [v for layer in self.body.layers.values() for v in layer.trainable_variables]
        # Inputs, state and variables, in float64.
        self.point = [np.asarray(x, np.float64) for x in (self.inputs, *self.state, *self.variables)]

    def reference(self, point, masks=(1.0, 1.0, 1.0)):
        """(outputs, new state) at other values of inputs, state and variables."""
        size = len(self.state) // 2
        x, rest = point[0] * masks[0], point[1:]
        state, weights = rest[: 2 * size], rest[2 * size :]
        new_state = []
        for i in range(2):
            of_layer = weights[i * len(weights) // 2 : (i + 1) * len(weights) // 2]
            given = dict(zip(WEIGHTS, of_layer, strict=False)) | dict(
                zip(self.state_names, state[i * size : (i + 1) * size], strict=True)
            )
            x, *after = self.layer(x, **given)
            x = x * masks[i + 1]
            new_state += after
        return x, new_state


@pytest.fixture(scope="module", params=KINDS)
def built(request):
    return Built(request.param)


def _assert_close(actual, expected):
    for a, b in zip(tf.nest.flatten(actual), tf.nest.flatten(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6)


def test_values_against_numpy(built):
    expected = built.reference(built.point)
    _assert_close(built.body(built.inputs, built.state, dropout=None), expected)
    projected = isinstance(built.body.layers.get("lstm_0"), ProjectedLstm)
    assert expected[0].shape == (BATCH, TIME, 6 if projected else 3)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_gradients_against_differences_of_the_float64_reference(built, jit_compile):
    """Of outputs and new state, with respect to inputs, state and weights; compiled too."""
    rng = np.random.default_rng(3)
    upstream = [rng.normal(size=x.shape) for x in tf.nest.flatten(built.reference(built.point))]

    @tf.function(autograph=False, jit_compile=jit_compile)
    def gradients():
        sources = [built.inputs, *built.state]
        with tf.GradientTape() as tape:
            tape.watch(sources)
            hidden, state = built.body(built.inputs, built.state, dropout=None)
            parts = zip([hidden, *state], upstream, strict=True)
            loss = tf.add_n([tf.reduce_sum(x * tf.constant(u, tf.float32)) for x, u in parts])
        return tape.gradient(loss, [*sources, *(v.value for v in built.variables)])

    def reference(point):
        parts = zip(tf.nest.flatten(built.reference(point)), upstream, strict=True)
        return sum(np.sum(x * u) for x, u in parts)

    # Along directions that move one tensor each; the error of a central difference at this size is about 1e-9.
    for i, gradient in enumerate(gradients()):
        for _ in range(3):
            direction = rng.normal(size=built.point[i].shape)
            ends = []
            for size in (-1e-4, 1e-4):
                moved = list(built.point)
                moved[i] = built.point[i] + size * direction
                ends.append(reference(moved))
            expected = (ends[1] - ends[0]) / 2e-4
            actual = np.sum(np.asarray(gradient, np.float64) * direction)
            np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


def test_two_windows_with_the_state_carried_are_one_long_window(built):
    whole = built.body(built.inputs, built.state, dropout=None)
    first, state = built.body(built.inputs[:, :3], built.state, dropout=None)
    second, state = built.body(built.inputs[:, 3:], state, dropout=None)
    _assert_close([tf.concat([first, second], axis=1), *state], [whole[0], *whole[1]])


def test_a_window_in_parts_is_the_window(built, monkeypatch):
    whole = built.body(built.inputs, built.state, dropout=None)
    monkeypatch.setattr(recurrent, "_LEAST_STEPS_OF_A_PART", 2)
    _assert_close(built.body(built.inputs, built.state, dropout=None), whole)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_on_embeddings_between_layers_and_on_the_output(kind):
    built = Built(kind, embedding_dropout=0.2, dropout=0.3, output_dropout=0.4)

    def stream():
        return DropoutStream(seed=5, step=tf.constant(6), first_example=7)

    between, after = (6, 6) if "projection" in kind else (4, 3)
    masks = stream()
    masks = [
        masks.dropout(tf.ones([BATCH, TIME, size]), rate).numpy()
        for size, rate in ((EMBED_DIM, 0.2), (between, 0.3), (after, 0.4))
    ]
    expected = built.reference(built.point, masks)
    _assert_close(built.body(built.inputs, built.state, dropout=stream()), expected)


def test_initial_state_is_zeros(built):
    assert built.body.stateful
    for before, given in zip(built.body.initial_state(BATCH), built.state, strict=True):
        np.testing.assert_array_equal(before, np.zeros(given.shape, np.float32))


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_products_keep_a_float32_state(kind):
    built = Built(kind, compute_dtype="bfloat16")
    hidden, state = built.body(built.inputs, built.state, dropout=None)
    assert all(s.dtype == tf.float32 for s in state)
    expected, _ = built.reference(built.point)
    # Eight bits, in every product of 14 dependent steps.
    error = np.abs(tf.cast(hidden, tf.float32) - expected).max()
    assert 1e-4 < error < 0.1


def test_first_weights_of_a_projected_layer():
    layer = ProjectedLstm(4, 3)
    layer.build([None, None, EMBED_DIM])
    np.testing.assert_array_equal(layer.bias, np.repeat([0, 1, 0, 0], 4))
    np.testing.assert_allclose(
        layer.recurrent_kernel @ tf.transpose(layer.recurrent_kernel), np.eye(3), atol=1e-5
    )
    assert [w.shape for w in layer.get_weights()] == [(5, 16), (3, 16), (16,), (4, 3)]


def test_a_projection_of_nothing_is_refused():
    with pytest.raises(ValueError, match="recurrent_projection_dim=0"):
        lstm_body(num_layers=1, hidden_dim=4, recurrent_projection_dim=0)


@pytest.mark.parametrize("body", [GruBody, SimpleRnnBody])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"num_layers": 0}, "num_layers=0"), ({"dropout": 1.0}, "dropout=1.0")],
)
def test_values_out_of_range_are_refused(body, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        body(**({"num_layers": 1, "hidden_dim": 4} | arguments))
