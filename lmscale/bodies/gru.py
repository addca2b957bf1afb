"""GRU stack."""

import keras

from lmscale.bodies.recurrent import RecurrentBody


class GruBody(RecurrentBody):
    """Keras GRU layers; arguments as of `RecurrentBody`.

    Source: Cho et al. 2014 (arXiv:1406.1078); the reset gate after the product, as cuDNN has it.
    """

    kind = "gru"

    def _make_layer(self, dim, policy):
        return keras.layers.GRU(dim, return_sequences=True, return_state=True, dtype=policy)
