"""Bodies that see the future are refused when they are built, by the layer's name."""

import re

import keras
import numpy as np
import pytest
import tensorflow as tf

from lmscale.bodies.body import Body, KerasBody
from lmscale.bodies.encoder import Encoder
from lmscale.bodies.lstm import lstm_body

EMBED_DIM, WINDOW = 6, 11


def build(layer, *, batch_size=3, window=WINDOW, causal=True):
    body = layer if isinstance(layer, Body) else KerasBody(layer, causal=causal)
    return Encoder(body, input_dim=EMBED_DIM, output_dim=EMBED_DIM, batch_size=batch_size, window=window)


class Gated(keras.layers.Layer):
    """x + gate * convolution, which sees the next step unless it is causal."""

    def __init__(self, *, shape, start, squash=False, padding="same", dtype=None):
        super().__init__(dtype=dtype)
        self.convolution = keras.layers.Conv1D(EMBED_DIM, 3, padding=padding, dtype=dtype)
        self.gate = self.add_weight(shape=shape, initializer=keras.initializers.Constant(start))
        self.squash = tf.sigmoid if squash else tf.identity

    def call(self, x):
        return x + self.squash(tf.cast(self.gate, x.dtype)) * self.convolution(x)


class Function(keras.layers.Layer):
    """A function of the inputs, as a layer."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def call(self, x):
        return self.function(x)


def following(x, steps=1):
    """x of `steps` later, zero behind the end."""
    return tf.pad(x[:, steps:], [[0, 0], [0, steps], [0, 0]])


def one_unit_among_large_ones(x):
    return tf.concat([1e4 * x[..., :-1], following(x)[..., -1:]], axis=-1)


def not_a_number_at_the_start(x):
    start = tf.one_hot(0, x.shape[1])[tf.newaxis, :, tf.newaxis]
    return tf.where(start > 0, np.float32("nan"), following(x))


def at_one_step_alone(x):
    return x + tf.one_hot(5, x.shape[1])[tf.newaxis, :, tf.newaxis] * following(x)


def causal_by_fourier(x):
    """A sum over earlier steps with falling weights, by way of the frequencies of all of them."""
    length = 2 * x.shape[1]
    kernel = tf.signal.rfft(0.9 ** tf.range(x.shape[1], dtype=tf.float32), [length])
    spectrum = tf.signal.rfft(tf.transpose(x, [0, 2, 1]), [length])
    return tf.transpose(tf.signal.irfft(spectrum * kernel, [length])[..., : x.shape[1]], [0, 2, 1])


def rounded_by_place(x):
    """Each example of the batch a little different, as where a kernel in bfloat16 does not sum alike for all."""
    return x * (1.0 + 2.0**-8 * tf.range(x.shape[0], dtype=tf.float32)[:, tf.newaxis, tf.newaxis])


class Attention(keras.layers.Layer):
    """Self-attention behind a gate that starts at `gate`."""

    def __init__(self, *, causal, gate, dtype=None):
        super().__init__(dtype=dtype)
        self.causal = causal
        self.attention = keras.layers.MultiHeadAttention(2, 3, dtype=dtype)
        self.gate = self.add_weight(shape=[1, EMBED_DIM], initializer=keras.initializers.Constant(gate))

    def call(self, x):
        return x + self.gate * self.attention(x, x, use_causal_mask=self.causal)


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
    "far": lambda: Function(lambda x: x + 0.01 * following(x, 9)),
    "little": lambda: Function(lambda x: x + 1e-3 * following(x)),
    "beside a large constant": lambda: Function(lambda x: following(x) + 1e4),
    "one unit among large ones": lambda: Function(one_unit_among_large_ones),
    "beside not a number": lambda: Function(not_a_number_at_the_start),
    "beside the rounding of a place": lambda: Function(lambda x: rounded_by_place(x + 1e-3 * following(x))),
    "past the largest number": lambda: Function(lambda x: 1e38 * x + 1e38 * following(x)),
    "gate of zero": lambda: Gated(shape=[], start=0.0),
    "gates near zero": lambda: Gated(shape=[EMBED_DIM], start=1e-5),
    "closed gate": lambda: Gated(shape=[], start=-20.0, squash=True),
    "gate of zero in bfloat16": lambda: Gated(shape=[], start=0.0, dtype="mixed_bfloat16"),
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
    "gated": lambda: Gated(shape=[], start=0.0, padding="causal"),
    "sums by way of frequencies": lambda: Function(causal_by_fourier),
    "mean so far": lambda: Function(
        lambda x: tf.cumsum(x, axis=1) / tf.range(1.0, x.shape[1] + 1)[:, tf.newaxis]
    ),
    "large": lambda: Function(lambda x: 1e30 * tf.cumsum(x, axis=1)),
    "small": lambda: Function(lambda x: 1e-30 * tf.cumsum(x, axis=1)),
    "infinite at the start": lambda: Function(
        lambda x: x / tf.range(x.shape[1], dtype=tf.float32)[:, tf.newaxis]
    ),
    "rounded by place": lambda: Function(rounded_by_place),
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
    inner = list(encoder.body.layers.values())
    before = [w for layer in inner for w in layer.get_weights()]
    build(encoder.body, batch_size=batch_size)
    after = [w for layer in inner for w in layer.get_weights()]
    for a, b in zip(before, after, strict=True):
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
            super().__init__({})

        def __call__(self, inputs, state, *, dropout):
            return tf.reverse(inputs, [1]), state

    with pytest.raises(ValueError, match=r"Received: Reversed, whose output at time step 0 changes"):
        build(Reversed())
    Reversed.causal = False
    build(Reversed())


def test_every_step_is_probed_where_the_batch_has_room():
    with pytest.raises(ValueError, match=r"at time step 5 changes with the inputs from time step 6 on"):
        build(Function(at_one_step_alone), batch_size=WINDOW)


def first_sees_second(x):
    return tf.concat([x[:1] + x[1:2], x[1:]], axis=0)


@pytest.mark.parametrize(
    "function",
    [lambda x: x - tf.reduce_mean(x, axis=0, keepdims=True), first_sees_second],
    ids=["mean", "one"],
)
@pytest.mark.parametrize("batch_size", [2, 5])
def test_examples_that_see_each_other_are_refused(function, batch_size):
    with pytest.raises(ValueError, match=r"must not see each other.*\(Function\)"):
        build(Function(function), batch_size=batch_size)


def test_noise_in_evaluations_is_refused():
    with pytest.raises(ValueError, match=r"same outputs for the same inputs.*\(Function\)"):
        build(Function(lambda x: x + tf.random.normal(x.shape)))


def test_a_body_without_finite_outputs_cannot_be_told(caplog):
    build(Function(lambda x: x * np.float32("nan")))
    assert "cannot be probed" in caplog.text


class Positions(keras.layers.Layer):
    """Adds a vector for each of the time steps of training."""

    def build(self, shape):
        self.vectors = keras.layers.Embedding(shape[1], shape[2])
        self.vectors.build(None)

    def call(self, x):
        return x + self.vectors(tf.range(x.shape[1]))


@pytest.mark.parametrize("layer", [Positions, lambda: Function(lambda x: x + tf.eye(WINDOW, EMBED_DIM))])
def test_layers_for_the_windows_of_training_alone_are_refused_before_the_first_step(layer):
    with pytest.raises(ValueError, match=r"shape \[3, 15, 6\], as evaluations.*fails there .*eval_window"):
        Encoder(
            KerasBody(layer()),
            input_dim=EMBED_DIM,
            output_dim=EMBED_DIM,
            batch_size=2,
            window=WINDOW,
            probe_shape=(3, WINDOW + 4),
        )
