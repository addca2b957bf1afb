"""Plain float64 references that several tests compare with."""

import numpy as np


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def log_softmax(logits):
    """[..., classes] -> [..., classes]."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def lstm(inputs, *, kernel, recurrent_kernel, bias, h, c, projection=None):
    """One LSTM layer with the gates in the order input, forget, cell, output.

    Args:
      inputs: [batch, time, input_dim].
      kernel, recurrent_kernel, bias: [input_dim, 4 * units], [units, 4 * units], [4 * units].
      h, c: [batch, units], the state at the start.
      projection: [units, width]; then h, and what comes out, is [..., width], and recurrent_kernel [width, 4 * units].

    Returns:
      (hidden [batch, time, units], h, c at the end).
    """
    hidden = []
    for x in np.moveaxis(inputs, 1, 0):
        i, f, g, o = np.split(x @ kernel + h @ recurrent_kernel + bias, 4, axis=1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        h = h if projection is None else h @ projection
        hidden.append(h)
    return np.stack(hidden, axis=1), h, c


def gru(inputs, *, kernel, recurrent_kernel, bias, h):
    """One GRU layer with the gates in the order update, reset, candidate; the reset gate acts after the product.

    Args:
      inputs: [batch, time, input_dim].
      kernel, recurrent_kernel, bias: [input_dim, 3 * units], [units, 3 * units], [2, 3 * units], of both products.
      h: [batch, units], the state at the start.

    Returns:
      (hidden [batch, time, units], h at the end).
    """
    hidden = []
    for x in np.moveaxis(inputs, 1, 0):
        from_inputs = np.split(x @ kernel + bias[0], 3, axis=1)
        from_state = np.split(h @ recurrent_kernel + bias[1], 3, axis=1)
        z, r = (sigmoid(a + b) for a, b in zip(from_inputs[:2], from_state[:2], strict=True))
        h = z * h + (1 - z) * np.tanh(from_inputs[2] + r * from_state[2])
        hidden.append(h)
    return np.stack(hidden, axis=1), h


def simple_rnn(inputs, *, kernel, recurrent_kernel, bias, h):
    """One layer h_t = tanh(x_t W + h_{t-1} U + b); arguments and results as of `gru`, for one gate."""
    hidden = []
    for x in np.moveaxis(inputs, 1, 0):
        h = np.tanh(x @ kernel + h @ recurrent_kernel + bias)
        hidden.append(h)
    return np.stack(hidden, axis=1), h


def lstm_weights(layer):
    """The keyword arguments of `lstm` for a Keras LSTM layer."""
    names = ("kernel", "recurrent_kernel", "bias")
    return dict(zip(names, (np.asarray(w, np.float64) for w in layer.get_weights()), strict=True))
