"""Stack of bidirectional recurrent layers: every output sees the whole window. For classifiers, not language models."""

from typing import Literal

import keras

from lmscale.bodies.body import Body
from lmscale.bodies.dropout import check_rate
from lmscale.keras_settings import POLICIES, check_compute_dtype

_LAYERS = {"lstm": keras.layers.LSTM, "gru": keras.layers.GRU, "simple_rnn": keras.layers.SimpleRNN}


class BidirectionalBody(Body):
    """Layers that each read the window both ways; outputs are [forward, backward]. No state is carried.

    Source: Schuster & Paliwal 1997, "Bidirectional recurrent neural networks".
    """

    causal = False

    def __init__(
        self,
        *,
        num_layers: int,
        hidden_dim: int,
        layer: Literal["lstm", "gru", "simple_rnn"] = "lstm",
        dropout: float = 0.0,
        embedding_dropout: float | None = None,
        output_dropout: float | None = None,
        compute_dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    ):
        """Args:
        num_layers: layers, at least 1.
        hidden_dim: width of each direction; the outputs are twice as wide.
        layer: kind of the layers.
        dropout: rate between layers.
        embedding_dropout, output_dropout: rates on the embeddings and on the last layer's output; None for `dropout`.
        compute_dtype: of the layers' products; None for the experiment's.
        """
        if num_layers < 1 or hidden_dim < 1:
            raise ValueError(
                f"num_layers and hidden_dim must be at least 1. Received: num_layers={num_layers}, "
                f"hidden_dim={hidden_dim}. Set each to 1 or more."
            )
        if layer not in _LAYERS:
            raise ValueError(f"layer must be {', '.join(map(repr, _LAYERS))}. Received: layer={layer!r}.")
        check_compute_dtype(compute_dtype)
        self._dropout = dropout
        self._embedding_dropout = dropout if embedding_dropout is None else embedding_dropout
        self._output_dropout = dropout if output_dropout is None else output_dropout
        check_rate(
            dropout=dropout,
            embedding_dropout=self._embedding_dropout,
            output_dropout=self._output_dropout,
        )
        policy = None if compute_dtype is None else POLICIES[compute_dtype]
        super().__init__(
            {
                f"bidirectional_{i}": keras.layers.Bidirectional(
                    _LAYERS[layer](hidden_dim, return_sequences=True, dtype=policy), dtype=policy
                )
                for i in range(num_layers)
            }
        )

    def __call__(self, inputs, state, *, dropout):
        x = inputs
        rates = [self._embedding_dropout, *[self._dropout] * (len(self.layers) - 1)]
        for rate, layer in zip(rates, self.layers.values(), strict=True):
            x = layer(x if dropout is None else dropout.dropout(x, rate))
        return (x if dropout is None else dropout.dropout(x, self._output_dropout)), state
