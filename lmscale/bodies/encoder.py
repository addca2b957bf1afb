"""A body and the projection to the table's width: called as one, the variables named, the settings checked."""

import keras
import tensorflow as tf

from lmscale.bodies.causality import check_causal
from lmscale.parameters import keras_layers
from lmscale.parameters.layers import check_all_listed


class Encoder:
    """A body and, where its width is not the one asked for, a projection to it: [..., hidden] -> [..., output_dim].

    Attributes:
      body: the `Body`.
      projection: the Keras layer, or None.
      input_dim, output_dim: widths of what comes in and of what goes out.
    """

    def __init__(self, body, *, input_dim, output_dim, batch_size, window, probe_shape=None):
        """Builds the layers and checks what can be checked before a step.

        Args:
          body: the `Body`, fresh.
          input_dim: width of the embedding.
          output_dim: width of the softmax rows.
          batch_size, window: of the inputs that the layers are built for: those of the steps to come.
          probe_shape: (batch size, window) of the inputs by which the body is probed for looking ahead
            (`check_causal`): those of the evaluations to come, say. None, and for a body that carries a state, which
            takes windows of any length: as the layers are built for.

        Raises:
          ValueError: for a body of another shape than [batch, time, hidden], one that sees later inputs or other
            examples, one that reads variables which its `layers` do not hold, and settings that would have no effect.
        """
        self.body = body
        body.input_dim = input_dim
        self.input_dim = input_dim
        self.output_dim = output_dim
        keras_layers.check_settings(body.layers.values())  # Before Keras fails at them in its own words.
        state = body.initial_state(batch_size)
        if not isinstance(state, list) or any(s.shape.rank == 0 or s.shape[0] != batch_size for s in state):
            raise ValueError(
                "The initial_state of a body must be a list of [batch_size, ...] tensors. Received, for a batch of "
                f"{batch_size}: {state}."
            )
        inputs = tf.zeros([batch_size, window, input_dim])
        with tf.GradientTape() as tape:
            example, _ = body(inputs, state, dropout=None)
        _check_output(example, body=body, shape=inputs.shape.as_list())
        self.projection = None
        if example.shape[-1] != output_dim:
            self.projection = keras.layers.Dense(output_dim, use_bias=False, name="projection")
            self.projection.build(example.shape)
        check_all_listed(tape.watched_variables(), layers=body.layers, reader=body)
        if body.causal:
            if probe_shape is None or (body.stateful and window > 1):
                probe_shape = batch_size, window
            check_causal(self, batch_size=probe_shape[0], window=probe_shape[1])

    @property
    def layers(self):
        """{name: Keras layer}: the body's, then the projection."""
        return self.body.layers | ({"projection": self.projection} if self.projection else {})

    def __call__(self, inputs, state, *, dropout):
        """[batch, time, input_dim] -> ([batch, time, output_dim], new state); arguments as `Body.__call__`."""
        hidden, new_state = self.body(inputs, state, dropout=dropout)
        return (self.projection(hidden) if self.projection else hidden), new_state

    def decode(self, inputs, state):
        """As `Body.decode`, with the projection; `state` is that of the body's `decoding_state`."""
        hidden, new_state = self.body.decode(inputs, state)
        return (self.projection(hidden) if self.projection else hidden), new_state


def _check_output(example, *, body, shape):
    layers = keras_layers.describe(list(body.layers.values())) or type(body).__name__
    if not tf.is_tensor(example):
        raise ValueError(
            "A body must return (hidden, new state), hidden a tensor. Received: "
            f"{layers}, which returns {type(example).__name__} for hidden. Leave out return_state, say."
        )
    if len(example.shape) != 3 or example.shape[:2] != shape[:2]:
        raise ValueError(
            "A body must map [batch, time, embed_dim] to [batch, time, hidden]. Received: a body that maps "
            f"{shape} to {example.shape.as_list()}."
        )
    if getattr(example, "_keras_mask", None) is not None:
        raise ValueError(
            "A body must not mask time steps: the loss counts every token. Received: "
            f"{layers}, whose output has a mask. Leave out the Masking layer, or mask_zero."
        )
