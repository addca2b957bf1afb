"""Decoding token by token against the whole text at once, for every kind of body."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

from lmscale.bodies.body import Body, keras_body, write_at
from lmscale.bodies.encoder import Encoder
from lmscale.bodies.gru import GruBody
from lmscale.bodies.lstm import lstm_body
from lmscale.bodies.transformer import transformer_body

BATCH, LENGTH, DIM = 3, 11, 8
BODIES = {
    "lstm": functools.partial(lstm_body, num_layers=2, hidden_dim=6),
    "lstm_with_projection": functools.partial(
        lstm_body, num_layers=1, hidden_dim=6, recurrent_projection_dim=4
    ),
    "gru": functools.partial(GruBody, num_layers=1, hidden_dim=6),
    "transformer": functools.partial(transformer_body, num_layers=2, hidden_dim=DIM, num_heads=2),
    "convolution": functools.partial(
        keras_body, layer=lambda: keras.layers.Conv1D(6, 4, padding="causal", activation="tanh")
    ),
}


def _inputs(*, seed=0):
    return tf.constant(np.random.default_rng(seed).normal(size=[BATCH, LENGTH, DIM]), tf.float32)


@pytest.fixture(scope="module", params=BODIES)
def encoder(request):
    return Encoder(BODIES[request.param](), input_dim=DIM, output_dim=5, batch_size=BATCH, window=LENGTH)


@pytest.fixture(scope="module")
def whole(encoder):
    """Outputs of the whole text at once."""
    return encoder(_inputs(), encoder.body.initial_state(BATCH), dropout=None)[0].numpy()


@pytest.mark.parametrize("sizes", [[1] * LENGTH, [4, 1, 1, 3, 2], [LENGTH]])
def test_in_pieces_of_any_size(encoder, whole, sizes):
    # Room that is not filled must not matter.
    state = encoder.body.decoding_state(BATCH, LENGTH + 2)
    found = []
    for piece in tf.split(_inputs(), sizes, axis=1):
        hidden, new_state = encoder.decode(piece, state)
        assert [(s.shape, s.dtype) for s in new_state] == [(s.shape, s.dtype) for s in state]
        found.append(hidden)
        state = new_state
    np.testing.assert_allclose(tf.concat(found, axis=1), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_in_a_loop_of_tensorflow(encoder, whole, jit_compile):
    @tf.function(autograph=False, jit_compile=jit_compile)
    def loop(inputs):
        def step(i, state, outputs):
            piece = tf.ensure_shape(tf.slice(inputs, [0, i, 0], [BATCH, 1, DIM]), [BATCH, 1, DIM])
            hidden, state = encoder.decode(piece, state)
            return i + 1, state, outputs.write(i, hidden[:, 0])

        state = encoder.body.decoding_state(BATCH, LENGTH)
        outputs = tf.TensorArray(tf.float32, size=LENGTH, element_shape=[BATCH, 5])
        *_, outputs = tf.while_loop(lambda i, *_: i < LENGTH, step, [tf.constant(0), state, outputs])
        return tf.transpose(outputs.stack(), [1, 0, 2])

    np.testing.assert_allclose(loop(_inputs()), whole, rtol=1e-5, atol=1e-5)


def test_in_a_saved_model(encoder, whole, tmp_path):
    module = tf.Module()
    module.layers = list(encoder.layers.values())
    state = encoder.body.decoding_state(BATCH, LENGTH)
    module.decode = tf.function(
        lambda inputs, *state: encoder.decode(inputs, list(state)),
        input_signature=[
            tf.TensorSpec([BATCH, 1, DIM]),
            *(tf.TensorSpec(s.shape, s.dtype) for s in state),
        ],
        autograph=False,
    )
    tf.saved_model.save(module, str(tmp_path))
    loaded = tf.saved_model.load(str(tmp_path))  # It owns the variables.
    for t in range(LENGTH):
        hidden, state = loaded.decode(_inputs()[:, t : t + 1], *state)
        np.testing.assert_allclose(hidden[:, 0], whole[:, t], rtol=1e-5, atol=1e-5)


def test_values_are_written_at_a_place_of_each_example():
    buffer = np.arange(2 * 5 * 3, dtype=np.float32).reshape(2, 5, 3)
    values = -1 - np.arange(2 * 2 * 3, dtype=np.float32).reshape(2, 2, 3)
    expected = buffer.copy()
    expected[0, 1:3] = values[0]
    expected[1, 4:] = values[1, :1]  # Beyond the end: dropped.
    np.testing.assert_array_equal(write_at(buffer, tf.constant([1, 4]), tf.constant(values)), expected)


def test_more_than_there_is_room_for_is_refused():
    with pytest.raises(ValueError, match="3 time steps, and a state of the length 2"):
        write_at(tf.zeros([1, 2, 1]), tf.constant([0]), tf.zeros([1, 3, 1]))


def test_a_body_that_sees_the_future_is_refused():
    layer = functools.partial(keras.layers.Conv1D, 4, 3, padding="same")
    body = keras_body(layer=layer, causal=False)
    for call in (lambda: body.decoding_state(1, 2), lambda: body.decode(tf.zeros([1, 1, 4]), [])):
        with pytest.raises(ValueError, match="KerasBody, whose causal is False"):
            call()


def test_a_body_that_is_not_built_is_refused():
    class Same(Body):
        def __call__(self, inputs, state, *, dropout):
            return inputs, state

    with pytest.raises(ValueError, match="Same, whose input_dim is None"):
        Same({}).decoding_state(1, 2)
