"""Plain float64 references that several tests compare with."""

import numpy as np


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def log_softmax(logits):
    """[..., classes] -> [..., classes]."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def lstm(inputs, *, kernel, recurrent_kernel, bias, h, c):
    """One LSTM layer with the gates in the order input, forget, cell, output.

    Args:
      inputs: [batch, time, input_dim].
      kernel, recurrent_kernel, bias: [input_dim, 4 * units], [units, 4 * units], [4 * units].
      h, c: [batch, units], the state at the start.

    Returns:
      (hidden [batch, time, units], h, c at the end).
    """
    hidden = []
    for x in np.moveaxis(inputs, 1, 0):
        i, f, g, o = np.split(x @ kernel + h @ recurrent_kernel + bias, 4, axis=1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        hidden.append(h)
    return np.stack(hidden, axis=1), h, c


def lstm_weights(layer):
    """The keyword arguments of `lstm` for a Keras LSTM layer."""
    names = ("kernel", "recurrent_kernel", "bias")
    return dict(zip(names, (np.asarray(w, np.float64) for w in layer.get_weights()), strict=True))
