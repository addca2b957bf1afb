"""LSTM stack, the body of the word-level literature; with a recurrent projection, if asked for."""

from typing import Literal

import keras

from lmscale.bodies.recurrence import lstm_sequence
from lmscale.bodies.recurrent import RecurrentBody
from lmscale.distribution.strategies import runs_on_cpu


class LstmBody(RecurrentBody):
    """Keras LSTM layers, or `ProjectedLstm` ones; the state is [h, c] of each layer."""

    kind = "lstm"

    def __init__(self, *, recurrent_projection_dim, **settings):
        """`settings` are those of `RecurrentBody`."""
        if recurrent_projection_dim is not None and recurrent_projection_dim < 1:
            raise ValueError(
                "recurrent_projection_dim must be at least 1, or None for no projection. Received: "
                f"recurrent_projection_dim={recurrent_projection_dim}. Set it to EMBED_DIM, say."
            )
        self._projection_dim = recurrent_projection_dim
        super().__init__(**settings)

    def _make_layer(self, dim, policy):
        if self._projection_dim is not None:
            return ProjectedLstm(dim, self._projection_dim, dtype=policy)
        return keras.layers.LSTM(dim, return_sequences=True, return_state=True, dtype=policy)

    def _state_dims(self, dim):
        return [self._projection_dim or dim, dim]

    def _run_layer(self, layer, inputs, state):
        if self._projection_dim is not None:
            return layer(inputs, initial_state=state)
        if not runs_on_cpu():
            return super()._run_layer(layer, inputs, state)
        if not layer.built:
            layer.build(inputs.shape)
        weights = (layer.cell.kernel, layer.cell.recurrent_kernel, layer.cell.bias)
        kernel, recurrent_kernel, bias = (w.value for w in weights)
        return lstm_sequence(
            inputs,
            *state,
            kernel=kernel,
            recurrent_kernel=recurrent_kernel,
            bias=bias,
            compute_dtype=layer.compute_dtype,
        )


class ProjectedLstm(keras.layers.Layer):
    """An LSTM layer whose outputs, also those that it reads itself, are a projection of its hidden state.

    Its products with the outputs are as wide as the projection, however wide the cell: 4 * hidden * (dim + width) +
    hidden * width weights. Weights start as those of `keras.layers.LSTM`, the projection as that of a Dense layer.

    Source: Sak et al. 2014 (arXiv:1402.1128), the recurrent projection.
    """

    def __init__(self, units, projection_dim, *, dtype=None):
        # The state is float32, whatever the products are.
        super().__init__(dtype=dtype, autocast=False)
        self._units = units
        self._projection_dim = projection_dim

    def build(self, shape):
        """Adds the weights, for inputs [batch, time, dim]."""

        def forget_gate_of_one(shape, dtype=None):
            i, f, g, o = keras.ops.split(keras.ops.zeros(shape, dtype), 4)
            return keras.ops.concatenate([i, keras.ops.ones_like(f), g, o])

        width, gates = self._projection_dim, 4 * self._units

        def weight(name, shape, initializer):
            # Never cast: `lstm_sequence` does that where it takes products.
            return self.add_weight(shape, initializer=initializer, name=name, autocast=False)

        self.kernel = weight("kernel", [shape[-1], gates], "glorot_uniform")
        self.recurrent_kernel = weight("recurrent_kernel", [width, gates], "orthogonal")
        self.bias = weight("bias", [gates], forget_gate_of_one)
        self.projection = weight("projection", [self._units, width], "glorot_uniform")

    def call(self, inputs, initial_state):
        """[batch, time, dim] -> (outputs [batch, time, projection_dim], last output, last cell)."""
        return lstm_sequence(
            inputs,
            *initial_state,
            kernel=self.kernel.value,
            recurrent_kernel=self.recurrent_kernel.value,
            bias=self.bias.value,
            projection=self.projection.value,
            compute_dtype=self.compute_dtype,
        )


def lstm_body(
    *,
    num_layers: int,
    hidden_dim: int,
    last_hidden_dim: int | None = None,
    recurrent_projection_dim: int | None = None,
    dropout: float = 0.0,
    embedding_dropout: float | None = None,
    output_dropout: float | None = None,
    dropout_over_time: bool = False,
    compute_dtype: Literal["float32", "bfloat16", "float16"] | None = None,
) -> LstmBody:
    """LSTM stack.

    Args:
      recurrent_projection_dim: width to which each layer projects its hidden state, for the next time step and for
        what comes after it (`ProjectedLstm`); embed_dim here saves the projection behind the body. None for none.
      num_layers, hidden_dim, last_hidden_dim, dropout, embedding_dropout, output_dropout, dropout_over_time,
      compute_dtype: as of `RecurrentBody`.
    """
    return LstmBody(
        num_layers=num_layers,
        hidden_dim=hidden_dim,
        last_hidden_dim=last_hidden_dim,
        recurrent_projection_dim=recurrent_projection_dim,
        dropout=dropout,
        embedding_dropout=embedding_dropout,
        output_dropout=output_dropout,
        dropout_over_time=dropout_over_time,
        compute_dtype=compute_dtype,
    )
