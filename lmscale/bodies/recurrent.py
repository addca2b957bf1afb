"""Stacks of recurrent layers: what LSTM, GRU and simple RNN have in common, dropout and the carried state."""

import abc
from typing import Literal

import numpy as np
import tensorflow as tf

from lmscale.bodies.body import Body
from lmscale.bodies.dropout import check_rate
from lmscale.distribution.strategies import runs_on_cpu
from lmscale.keras_settings import POLICIES, check_compute_dtype

_LEAST_STEPS_OF_A_PART = 11


class RecurrentBody(Body):
    """Layers with dropout on the embeddings, between them and on the output; the state is carried across windows.

    Attributes:
      kind: the word for a layer in paths of parameters.
    """

    stateful = True
    kind: str

    def __init__(
        self,
        *,
        num_layers: int,
        hidden_dim: int,
        last_hidden_dim: int | None = None,
        dropout: float = 0.0,
        embedding_dropout: float | None = None,
        output_dropout: float | None = None,
        dropout_over_time: bool = False,
        compute_dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    ):
        """Args:
          num_layers: layers, at least 1.
          hidden_dim: width of each.
          last_hidden_dim: width of the last one; None for hidden_dim. embed_dim here saves the projection.
          dropout: rate between layers.
          embedding_dropout, output_dropout: rates on the embeddings and on the last layer's output; None for `dropout`.
          dropout_over_time: keep one mask over the time steps of a window (`DropoutStream.dropout`).
          compute_dtype: of the layers' products; None for the experiment's.

        Source: Zaremba et al. 2014 (arXiv:1409.2329): dropout on the non-recurrent connections only; windows that
        continue each other, the state carried and not differentiated through.
        """
        if num_layers < 1 or hidden_dim < 1 or (last_hidden_dim is not None and last_hidden_dim < 1):
            raise ValueError(
                f"num_layers and hidden dims must be at least 1. Received: num_layers={num_layers}, "
                f"hidden_dim={hidden_dim}, last_hidden_dim={last_hidden_dim}. Set each to 1 or more; the "
                "shipped configurations have NUM_LAYERS and HIDDEN_DIM for them."
            )
        check_compute_dtype(compute_dtype)
        embedding_dropout = dropout if embedding_dropout is None else embedding_dropout
        output_dropout = dropout if output_dropout is None else output_dropout
        check_rate(dropout=dropout, embedding_dropout=embedding_dropout, output_dropout=output_dropout)
        self._hidden_dims = [hidden_dim] * (num_layers - 1) + [last_hidden_dim or hidden_dim]
        policy = None if compute_dtype is None else POLICIES[compute_dtype]
        super().__init__(
            {f"{self.kind}_{i}": self._make_layer(dim, policy) for i, dim in enumerate(self._hidden_dims)}
        )
        self._dropout = dropout
        self._embedding_dropout = embedding_dropout
        self._output_dropout = output_dropout
        self._dropout_over_time = dropout_over_time

    @abc.abstractmethod
    def _make_layer(self, dim, policy):
        """A Keras layer of this width and dtype policy that returns sequence and state."""

    def _state_dims(self, dim):
        """Widths of the tensors of a layer's state."""
        return [dim]

    def _run_layer(self, layer, inputs, state):
        """(outputs [batch, time, dim], *new state) of a layer. Keras knows cuDNN."""
        return layer(inputs, initial_state=[tf.cast(s, inputs.dtype) for s in state])

    def initial_state(self, batch_size):
        """The state of each layer, zeros."""
        return [tf.zeros([batch_size, size]) for dim in self._hidden_dims for size in self._state_dims(dim)]

    def __call__(self, inputs, state, *, dropout):
        def drop(x, rate):
            return x if dropout is None else dropout.dropout(x, rate, over_time=self._dropout_over_time)

        x, state = self._run_layers(drop(inputs, self._embedding_dropout), state, dropout)
        return drop(x, self._output_dropout), [tf.cast(s, tf.float32) for s in state]

    def _run_layers(self, inputs, state, dropout):
        """Takes a window through all layers; returns the last one's outputs and the new state.

        Part of it after part: while a layer is at one part, another core can take the layer below through the next.
        """
        batch, time, _ = inputs.shape
        size_of_state = len(state) // len(self.layers)
        state, factors, outputs = list(state), {}, []
        num_parts = max(1, time // _LEAST_STEPS_OF_A_PART) if runs_on_cpu() and len(self.layers) > 1 else 1
        sizes = [len(steps) for steps in np.array_split(np.arange(time), num_parts)]
        for part, x in enumerate(tf.split(inputs, sizes, axis=1)):
            for i, layer in enumerate(self.layers.values()):
                if i and dropout is not None:
                    if i not in factors:  # One mask for the whole window.
                        drawn = dropout.factors(
                            [batch, time, x.shape[2]],
                            self._dropout,
                            dtype=x.dtype,
                            over_time=self._dropout_over_time,
                        )
                        if drawn is None or self._dropout_over_time:
                            factors[i] = [drawn] * num_parts
                        else:
                            factors[i] = tf.split(drawn, sizes, axis=1)
                    if factors[i][part] is not None:
                        x *= factors[i][part]
                of_layer = slice(size_of_state * i, size_of_state * (i + 1))
                x, *state[of_layer] = self._run_layer(layer, x, state[of_layer])
            outputs.append(x)
        return tf.concat(outputs, axis=1), state
