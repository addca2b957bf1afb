"""Bodies that see the future are refused when they are built, by the layer's name."""

import re

import keras
import numpy as np
import pytest
import tensorflow as tf

from lmscale.models.body import Body, KerasBody
from lmscale.models.encoder import Encoder
from lmscale.models.lstm import lstm_body

EMBED_DIM, WINDOW = 6, 11


def build(layer, *, batch_size=3, window=WINDOW, causal=True):
    body = layer if isinstance(layer, Body) else KerasBody(layer, causal=causal)
    return Encoder(body, embed_dim=EMBED_DIM, batch_size=batch_size, window=window)


class Attention(keras.layers.Layer):
    """Self-attention behind a gate that starts at `gate`."""

    def __init__(self, *, causal, gate, dtype=None):
        super().__init__(dtype=dtype)
        self.causal = causal
        self.attention = keras.layers.MultiHeadAttention(2, 3, dtype=dtype)
        self.gate = self.add_weight(shape=[1, EMBED_DIM], initializer=keras.initializers.Constant(gate))

    def call(self, x):
        return x + self.gate * self.attention(x, x, use_causal_mask=self.causal)


class Shift(keras.layers.Layer):
    """Adds a small part of what comes `steps` later."""

    def __init__(self, steps, weight):
        super().__init__()
        self.steps, self.weight = steps, weight

    def call(self, x):
        return x + self.weight * tf.pad(x[:, self.steps :], [[0, 0], [0, self.steps], [0, 0]])


LOOKING_AHEAD = {
    "conv1d": lambda: keras.layers.Conv1D(4, 3, padding="same", name="wide"),
    "bidirectional": lambda: keras.layers.Bidirectional(
        keras.layers.GRU(4, return_sequences=True), name="both_ways"
    ),
    "backwards": lambda: keras.layers.LSTM(4, return_sequences=True, go_backwards=True, name="back"),
    "pairs": lambda: keras.Sequential(
        [keras.layers.Reshape([6, 2 * EMBED_DIM]), keras.layers.Dense(8), keras.layers.Reshape([12, 4])],
        name="pairs",
    ),
    "mean over time": lambda: keras.layers.LayerNormalization(axis=1, name="over_time"),
    "far": lambda: Shift(9, 0.01),
    "attention": lambda: Attention(causal=False, gate=1.0),
    "attention that starts as nothing": lambda: Attention(causal=False, gate=0.0),
    "attention in bfloat16": lambda: Attention(causal=False, gate=1.0, dtype="mixed_bfloat16"),
}
CAUSAL = {
    "conv1d": lambda: keras.layers.Conv1D(4, 3, padding="causal", dilation_rate=2),
    "gru": lambda: keras.layers.GRU(4, return_sequences=True),
    "attention": lambda: Attention(causal=True, gate=0.0),
    "attention in bfloat16": lambda: Attention(causal=True, gate=1.0, dtype="mixed_bfloat16"),
    "features": lambda: keras.Sequential([keras.layers.LayerNormalization(), keras.layers.Dense(4)]),
    "batch statistics, not used in evaluations": keras.layers.BatchNormalization,
    "lstm": lambda: lstm_body(num_layers=2, hidden_dim=5),
}


@pytest.mark.parametrize("kind", LOOKING_AHEAD)
def test_refused(kind):
    layer = LOOKING_AHEAD[kind]()
    window = 12 if kind == "pairs" else WINDOW
    named = re.escape(f"the layer {layer.name!r} ({type(layer).__name__})")
    with pytest.raises(ValueError, match=rf"must not depend on later inputs.*{named}.*causal = False"):
        build(layer, window=window)


@pytest.mark.parametrize("kind", CAUSAL)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_allowed_and_left_as_it_was(kind, batch_size):
    layer = CAUSAL[kind]()
    encoder = build(layer, batch_size=batch_size)
    again = Encoder(encoder.body, embed_dim=EMBED_DIM, batch_size=batch_size, window=WINDOW)
    for before, after in zip(encoder.body.layers, again.body.layers, strict=True):
        for a, b in zip(before.get_weights(), after.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)


def test_zeros_are_put_back():
    layer = Attention(causal=True, gate=0.0)
    build(layer)
    np.testing.assert_array_equal(layer.gate, 0.0)


def test_the_first_guilty_layer_of_a_sequence_is_named():
    stack = keras.Sequential(
        [
            keras.layers.Dense(5, name="first"),
            keras.layers.Conv1D(5, 2, padding="same", name="second"),
            keras.layers.GRU(4, return_sequences=True, name="third"),
        ]
    )
    with pytest.raises(ValueError, match=r"Received: the layer 'second' \(Conv1D\), whose"):
        build(stack)


def test_a_setting_allows_it():
    hidden, _ = build(LOOKING_AHEAD["bidirectional"](), causal=False)(
        tf.zeros([2, 4, EMBED_DIM]), [], dropout=None
    )
    assert hidden.shape == [2, 4, EMBED_DIM]


def test_a_class_of_the_user_is_probed_too():
    class Reversed(Body):
        def __init__(self):
            super().__init__([])

        def __call__(self, inputs, state, *, dropout):
            return tf.reverse(inputs, [1]), state

    with pytest.raises(ValueError, match=r"Received: Reversed, whose output at time step 0 changes"):
        build(Reversed())
    Reversed.causal = False
    build(Reversed())


def test_examples_that_see_each_other_are_refused():
    class OverBatch(keras.layers.Layer):
        def call(self, x):
            return x - tf.reduce_mean(x, axis=0, keepdims=True)

    with pytest.raises(ValueError, match=r"must not see each other.*OverBatch"):
        build(OverBatch(name="over_batch"))
