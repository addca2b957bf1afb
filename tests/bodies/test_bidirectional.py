import re

import numpy as np
import pytest
import tensorflow as tf
from references import gru, lstm, simple_rnn

from lmscale.bodies.bidirectional import BidirectionalBody
from lmscale.bodies.dropout import DropoutStream
from lmscale.bodies.encoder import Encoder
from lmscale.parameters.layers import Layers

BATCH, TIME, DIM, HIDDEN = 2, 5, 3, 4
KINDS = {"lstm": lstm, "gru": gru, "simple_rnn": simple_rnn}
RATES = {"embedding_dropout": 0.2, "dropout": 0.3, "output_dropout": 0.4}


@pytest.fixture(scope="module", params=KINDS)
def built(request):
    """(the layer in float64, encoder with random weights, inputs)."""
    body = BidirectionalBody(num_layers=2, hidden_dim=HIDDEN, layer=request.param, **RATES)
    encoder = Encoder(body, input_dim=DIM, output_dim=2 * HIDDEN, batch_size=BATCH, window=TIME)
    rng = np.random.default_rng(0)
    for layer in body.layers.values():
        layer.set_weights([rng.normal(scale=0.5, size=w.shape) for w in layer.get_weights()])
    inputs = tf.constant(rng.normal(size=[BATCH, TIME, DIM]), tf.float32)
    return KINDS[request.param], encoder, inputs


def reference(layer, body, x, masks=(1.0, 1.0, 1.0)):
    """[batch, time, 2 * hidden] float64: each layer forward, and forward over the window turned round."""
    x = x.astype(np.float64) * masks[0]
    for of_stack, mask in zip(body.layers.values(), masks[1:], strict=True):
        weights = [np.asarray(w, np.float64) for w in of_stack.get_weights()]
        zeros = np.zeros([len(x), HIDDEN])
        state = {"h": zeros, "c": zeros} if layer is lstm else {"h": zeros}
        outputs = []
        for step, of_direction in ((1, weights[:3]), (-1, weights[3:])):
            names = ("kernel", "recurrent_kernel", "bias")
            found, *_ = layer(x[:, ::step], **dict(zip(names, of_direction, strict=True)), **state)
            outputs.append(found[:, ::step])
        x = np.concatenate(outputs, axis=-1) * mask
    return x


def test_values_against_numpy(built):
    layer, encoder, inputs = built
    hidden, state = encoder(inputs, [], dropout=None)
    assert state == []
    assert encoder.projection is None
    np.testing.assert_allclose(hidden, reference(layer, encoder.body, inputs.numpy()), rtol=1e-5, atol=2e-6)


def test_dropout(built):
    layer, encoder, inputs = built

    def stream():
        return DropoutStream(seed=1, step=tf.constant(2), first_example=3)

    masks = stream()
    sizes = zip((DIM, 2 * HIDDEN, 2 * HIDDEN), RATES.values(), strict=True)
    masks = [masks.dropout(tf.ones([BATCH, TIME, size]), rate).numpy() for size, rate in sizes]
    hidden, _ = encoder(inputs, [], dropout=stream())
    expected = reference(layer, encoder.body, inputs.numpy(), masks)
    np.testing.assert_allclose(hidden, expected, rtol=1e-5, atol=2e-6)


def test_it_says_that_it_sees_the_whole_window(built):
    _, encoder, _ = built
    assert not encoder.body.causal
    assert not encoder.body.stateful
    with pytest.raises(ValueError, match="BidirectionalBody, whose causal is False"):
        encoder.body.decoding_state(1, 2)


def test_paths_of_parameters(built):
    _, encoder, _ = built
    paths = list(Layers(encoder.layers, num_replicas=1).trainable_variables)
    assert len(paths) == len(set(paths)) == 12
    assert all(
        re.fullmatch(r"layers/bidirectional_[01]/(forward|backward)_\w+/\w+", path) for path in paths
    ), paths


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_layers": 0}, "num_layers=0"),
        ({"hidden_dim": 0}, "hidden_dim=0"),
        ({"layer": "ltsm"}, "layer='ltsm'"),
        ({"output_dropout": 1.0}, "output_dropout=1.0"),
    ],
)
def test_values_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        BidirectionalBody(**({"num_layers": 1, "hidden_dim": 2} | settings))
