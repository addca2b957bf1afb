"""Stack of simple recurrent layers, h_t = tanh(x_t W + h_{t-1} U + b)."""

import keras

from lmscale.bodies.recurrent import RecurrentBody


class SimpleRnnBody(RecurrentBody):
    """Keras SimpleRNN layers; arguments as of `RecurrentBody`.

    Source: Elman 1990, "Finding structure in time"; as a language model Mikolov et al. 2010.
    """

    kind = "simple_rnn"

    def _make_layer(self, dim, policy):
        return keras.layers.SimpleRNN(dim, return_sequences=True, return_state=True, dtype=policy)
