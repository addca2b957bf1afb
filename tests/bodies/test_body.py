import functools
import re

import keras
import numpy as np
import pytest
import tensorflow as tf

from lmscale.bodies.body import Body, KerasBody, keras_body
from lmscale.bodies.dropout import DropoutStream
from lmscale.bodies.encoder import Encoder
from lmscale.bodies.lstm import lstm_body
from lmscale.parameters.layers import Layers

BATCH, TIME, EMBED_DIM = 3, 7, 5


def _encoder(body, **changes):
    shape = {"input_dim": EMBED_DIM, "output_dim": EMBED_DIM, "batch_size": BATCH, "window": TIME}
    return Encoder(body, **(shape | changes))


def _variables(encoder):
    return Layers(encoder.layers, num_replicas=1).variables


def _inputs():
    return tf.constant(np.random.default_rng(0).normal(size=[BATCH, TIME, EMBED_DIM]).astype(np.float32))


def _stack():
    """A Keras model of nested layers: several of a kind, two of them with generators of random numbers."""
    return keras.Sequential(
        [
            keras.layers.Dense(4, activation="tanh"),
            keras.layers.Dropout(0.5),
            keras.layers.LayerNormalization(),
            keras.layers.Dense(EMBED_DIM),
            keras.layers.Dropout(0.5),
        ]
    )


class _Constant(Body):
    """Returns a tensor of a given shape, whatever it is given."""

    def __init__(self, shape):
        super().__init__({})
        self._shape = shape

    def __call__(self, inputs, state, *, dropout):
        return tf.zeros(self._shape), state


def test_body_of_the_width_of_the_table_has_no_projection():
    encoder = _encoder(lstm_body(num_layers=2, hidden_dim=8, last_hidden_dim=EMBED_DIM))
    assert encoder.projection is None
    state = encoder.body.initial_state(BATCH)
    hidden, new_state = encoder(_inputs(), state, dropout=None)
    expected, expected_state = encoder.body(_inputs(), state, dropout=None)
    for a, b in zip([hidden, *new_state], [expected, *expected_state], strict=True):
        np.testing.assert_array_equal(a, b)


def test_body_of_another_width_is_projected_without_bias():
    encoder = _encoder(lstm_body(num_layers=1, hidden_dim=8))
    state = encoder.body.initial_state(BATCH)
    hidden, new_state = encoder(_inputs(), state, dropout=None)
    inside, expected_state = encoder.body(_inputs(), state, dropout=None)
    variables = _variables(encoder)
    kernel = variables["layers/projection/kernel"].numpy().astype(np.float64)
    assert kernel.shape == (8, EMBED_DIM)
    assert "layers/projection/bias" not in variables
    np.testing.assert_allclose(hidden, inside.numpy().astype(np.float64) @ kernel, rtol=1e-5, atol=1e-6)
    for a, b in zip(new_state, expected_state, strict=True):
        np.testing.assert_array_equal(a, b)


def test_any_keras_layer_is_a_body():
    layer = keras.layers.Conv1D(6, 3, padding="causal", activation="relu")
    encoder = _encoder(keras_body(layer=lambda: layer))
    assert not encoder.body.stateful
    assert encoder.body.initial_state(BATCH) == []
    hidden, state = encoder(_inputs(), [], dropout=None)
    assert state == []
    kernel, bias = (w.astype(np.float64) for w in layer.get_weights())
    padded = np.pad(_inputs().numpy().astype(np.float64), [(0, 0), (2, 0), (0, 0)])
    convolved = sum(padded[:, i : i + TIME] @ kernel[i] for i in range(3)) + bias
    expected = np.maximum(convolved, 0) @ encoder.projection.kernel.numpy()
    np.testing.assert_allclose(hidden, expected, rtol=1e-5, atol=1e-6)


def test_keras_layer_is_told_whether_it_trains():
    encoder = _encoder(KerasBody(keras.layers.Dropout(0.5)))
    inputs = tf.ones([BATCH, TIME, EMBED_DIM])
    np.testing.assert_array_equal(encoder(inputs, [], dropout=None)[0], inputs)
    stream = DropoutStream(seed=0, step=tf.constant(0), first_example=0)
    assert set(np.unique(encoder(inputs, [], dropout=stream)[0])) == {0.0, 2.0}


@pytest.mark.parametrize(
    "make_body",
    [functools.partial(lstm_body, num_layers=2, hidden_dim=8), lambda: KerasBody(_stack())],
    ids=["lstm", "keras"],
)
def test_names_do_not_depend_on_what_else_was_built(make_body):
    first = _encoder(make_body())
    _stack()(_inputs())
    second = _encoder(make_body())
    first, second = _variables(first), _variables(second)
    assert list(first) == list(second)
    for path, variable in first.items():
        assert second[path].shape == variable.shape


def test_every_variable_has_a_path_and_the_trainable_ones_are_marked():
    layer = _stack()
    layers = Layers(_encoder(KerasBody(layer)).layers, num_replicas=1)
    # Two generators of random numbers among them: without either a resumed run draws other masks.
    assert [id(v) for v in layers.variables.values()] == [id(v) for v in layer.variables]
    assert [id(v) for v in layers.trainable_variables.values()] == [id(v) for v in layer.trainable_variables]
    assert len(layers.variables) == len(layers.trainable_variables) + 2


def test_variables_that_share_a_name_are_kept_apart():
    class Twice(keras.layers.Layer):
        def build(self, shape):
            self.first = self.add_weight(shape=[2], name="scale")
            self.second = self.add_weight(shape=[3], name="scale")

        def call(self, inputs):
            return inputs * self.first[0] * self.second[0]

    encoder = _encoder(KerasBody(Twice()))
    variables = _variables(encoder)
    assert list(variables) == ["layers/twice_0/scale", "layers/twice_0/scale_1"]
    assert [v.shape for v in variables.values()] == [(2,), (3,)]


@pytest.mark.parametrize("shape", [[1, 2], [2, 1, EMBED_DIM], [1, 2, 3, EMBED_DIM]])
def test_body_that_changes_batch_or_time_is_refused(shape):
    message = f"a body that maps [1, 2, {EMBED_DIM}] to {shape}"
    with pytest.raises(ValueError, match=re.escape(message)):
        _encoder(_Constant(shape), batch_size=1, window=2)


class _Tied(keras.layers.Layer):
    """Multiplies by the transpose of another layer's kernel, which it holds."""

    def __init__(self, other):
        super().__init__(name="tied")
        self.other = other

    def call(self, x):
        return tf.matmul(x, self.other.kernel, transpose_b=True)


def test_a_variable_of_two_layers_is_there_once():
    dense = keras.layers.Dense(EMBED_DIM, use_bias=False, name="dense")

    class Both(Body):
        def __init__(self):
            super().__init__({"dense": dense, "tied": _Tied(dense), "again": dense})

        def __call__(self, inputs, state, *, dropout):
            return self.layers["tied"](self.layers["dense"](inputs)), state

    variables = _variables(_encoder(Both()))
    assert list(variables) == ["layers/dense/kernel"]
    assert variables["layers/dense/kernel"] is dense.kernel
