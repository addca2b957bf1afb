"""The transformer against float64, values and gradients; its cache is in test_decoding.py."""

import math
import re

import numpy as np
import pytest
import tensorflow as tf

from lmscale.bodies import attention
from lmscale.bodies.dropout import DropoutStream
from lmscale.bodies.encoder import Encoder
from lmscale.bodies.transformer import transformer_body

BATCH, TIME, DIM, HEADS, LAYERS = 2, 7, 8, 2, 2
_erf = np.vectorize(math.erf)


def _inputs(*, time=TIME):
    return tf.constant(np.random.default_rng(0).normal(size=[BATCH, time, DIM]), tf.float32)


def _built(**settings):
    """A body with random weights."""
    body = transformer_body(
        **({"num_layers": LAYERS, "hidden_dim": DIM, "num_heads": HEADS, "feed_forward_dim": 12} | settings)
    )
    body(tf.zeros([1, 1, DIM]), [], dropout=None)
    rng = np.random.default_rng(2)
    for layer in body.layers.values():
        layer.set_weights([rng.normal(size=w.shape) / math.sqrt(w.shape[0]) for w in layer.get_weights()])
    return body


@pytest.fixture(scope="module")
def body():
    return _built()


def _variables(body):
    return [v for layer in body.layers.values() for v in layer.trainable_variables]


def _reference(inputs, weights, masks=None):
    """[batch, time, DIM] float64; weights in the order of `_variables`, `masks` of embeddings, layers and output."""
    masks = iter(masks or [1.0] * (2 * LAYERS + 2))
    weights = iter(weights)

    def normalised(x):
        gamma, beta = next(weights), next(weights)
        centred = x - x.mean(axis=-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5) * gamma + beta

    def turned(x):
        half = x.shape[-1] // 2
        angles = np.arange(x.shape[1])[:, None, None] * 10_000.0 ** (-np.arange(half) / half)
        pairs = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)
        return np.concatenate([pairs.real, pairs.imag], axis=-1)

    def attended(x):
        heads = [part.reshape(*x.shape[:2], HEADS, -1) for part in np.split(x @ next(weights), 3, axis=-1)]
        queries, keys, values = turned(heads[0]), turned(heads[1]), heads[2]
        result = np.zeros_like(values)
        for t in range(x.shape[1]):  # One query after another, over what it may see.
            logits = np.einsum("bhd,bshd->bhs", queries[:, t], keys[:, : t + 1]) / np.sqrt(DIM / HEADS)
            share = np.exp(logits - logits.max(axis=-1, keepdims=True))
            share /= share.sum(axis=-1, keepdims=True)
            result[:, t] = np.einsum("bhs,bshd->bhd", share, values[:, : t + 1])
        return result.reshape(x.shape) @ next(weights)

    def fed_forward(x):
        x = x @ next(weights) + next(weights)
        x = x * (1 + _erf(x / math.sqrt(2))) / 2
        return x @ next(weights) + next(weights)

    stream = inputs * math.sqrt(DIM) * next(masks)
    for _ in range(LAYERS):
        stream = stream + attended(normalised(stream)) * next(masks)
        stream = stream + fed_forward(normalised(stream)) * next(masks)
    return normalised(stream) * next(masks)


def _point(body, inputs):
    return [np.asarray(x, np.float64) for x in (inputs, *_variables(body))]


@pytest.mark.parametrize("block", [attention.BLOCK, 3])
def test_values_against_numpy(body, block, monkeypatch):
    """All at once, and a window longer than a block."""
    monkeypatch.setattr(attention, "BLOCK", block)
    point = _point(body, _inputs())
    hidden, state = body(_inputs(), [], dropout=None)
    assert state == []
    np.testing.assert_allclose(hidden, _reference(point[0], point[1:]), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("block", [attention.BLOCK, 3])
def test_gradients_against_differences_of_the_float64_reference(body, block, monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", block)
    rng = np.random.default_rng(3)
    inputs, upstream = _inputs(), rng.normal(size=[BATCH, TIME, DIM])
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        loss = tf.reduce_sum(body(inputs, [], dropout=None)[0] * tf.constant(upstream, tf.float32))
    gradients = tape.gradient(loss, [inputs, *(v.value for v in _variables(body))])
    point = _point(body, inputs)
    for i, gradient in enumerate(gradients):
        direction = rng.normal(size=point[i].shape)
        ends = []
        for size in (-1e-5, 1e-5):
            moved = list(point)
            moved[i] = point[i] + size * direction
            ends.append(np.sum(_reference(moved[0], moved[1:]) * upstream))
        expected = (ends[1] - ends[0]) / 2e-5
        actual = np.sum(np.asarray(gradient, np.float64) * direction)
        np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-3)


def test_dropout_is_on_embeddings_on_what_layers_add_and_on_the_output():
    body = _built(embedding_dropout=0.2, dropout=0.3, output_dropout=0.4)

    def stream():
        return DropoutStream(seed=5, step=tf.constant(6), first_example=7)

    masks = stream()
    masks = [
        masks.dropout(tf.ones([BATCH, TIME, DIM]), rate).numpy() for rate in (0.2, *[0.3] * (2 * LAYERS), 0.4)
    ]
    point = _point(body, _inputs())
    hidden, _ = body(_inputs(), [], dropout=stream())
    np.testing.assert_allclose(hidden, _reference(point[0], point[1:], masks), rtol=1e-4, atol=2e-5)


def test_bfloat16_products():
    body = _built(compute_dtype="bfloat16")
    hidden, _ = body(_inputs(), [], dropout=None)
    point = _point(body, _inputs())
    error = np.abs(tf.cast(hidden, tf.float32) - _reference(point[0], point[1:])).max()
    # Eight bits, in about ten products after each other, of values about 1.
    assert 1e-3 < error < 0.2


def test_paths_of_parameters_and_first_weights():
    body = transformer_body(num_layers=8, hidden_dim=64, num_heads=HEADS)
    encoder = Encoder(body, input_dim=64, output_dim=64, batch_size=1, window=3)
    assert encoder.projection is None
    kernels = {name: layer.kernel.numpy() for name, layer in body.layers.items() if "norm" not in name}
    # What is added 16 times to the stream has a sixteenth of the variance.
    for name, towards_stream in (("queries_keys_values", False), ("attention_output", True)):
        kernel = kernels[f"block_7/{name}"]
        glorot = 2 / sum(kernel.shape)
        assert kernel.var() == pytest.approx(glorot / 16 if towards_stream else glorot, rel=0.1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_layers": 0}, "num_layers=0"),
        ({"num_heads": 3}, "hidden_dim=8, num_heads=3"),
        ({"num_heads": 8}, "hidden_dim=8, num_heads=8"),
        ({"feed_forward_dim": 0}, "feed_forward_dim=0"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"compute_dtype": "float16"}, "compute_dtype='float16'"),
    ],
)
def test_values_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        _built(**settings)


def test_inputs_of_another_width_are_refused(body):
    with pytest.raises(ValueError, match=r"the width 6, hidden_dim=8. .*input_dim = 8"):
        body(tf.zeros([1, 2, 6]), [], dropout=None)
