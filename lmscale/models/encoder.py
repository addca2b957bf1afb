"""A body together with the projection to the table's width, and the names of their variables."""

import collections
import re

import keras
import tensorflow as tf


class Encoder:
    """A body and, where its width is not the table's, the projection to it: [..., hidden] -> [..., embed_dim]."""

    def __init__(self, body, *, embed_dim):
        self.body = body
        state = body.initial_state(1)
        if not isinstance(state, list) or any(s.shape.rank == 0 or s.shape[0] != 1 for s in state):
            raise ValueError(
                "The initial_state of a body must be a list of [batch_size, ...] tensors. Received, for a batch of 1: "
                f"{state}."
            )
        example, _ = body(tf.zeros([1, 2, embed_dim]), state, dropout=None)
        if example.shape[:2] != [1, 2] or len(example.shape) != 3:
            raise ValueError(
                "A body must map [batch, time, embed_dim] to [batch, time, hidden]. Received: a body that maps "
                f"[1, 2, {embed_dim}] to {example.shape.as_list()}."
            )
        self.projection = None
        if example.shape[-1] != embed_dim:
            self.projection = keras.layers.Dense(embed_dim, use_bias=False, name="projection")
            self.projection.build(example.shape)

    @property
    def variables(self):
        """{name: Keras variable}, trained or not (seed generators of Keras layers included); names do not depend on
        what else the process has built."""
        layers = self.body.layers + ([self.projection] if self.projection else [])
        named = {}
        seen = collections.Counter()
        for i, layer in enumerate(layers):
            for variable in layer.variables:
                path = variable.path.split("/", 1)[-1]
                # Keras numbers layers over the whole process (dense_3), and repeats itself (seed_generator_state).
                name = f"{i}/{re.sub(r'_[0-9]+(?=/|$)', '', path)}"
                named[f"{name}_{seen[name]}" if seen[name] else name] = variable
                seen[name] += 1
        return named

    @property
    def trainable_variables(self):
        """{name: Keras variable} of those that training updates."""
        return {name: v for name, v in self.variables.items() if v.trainable}

    def __call__(self, inputs, state, *, dropout):
        """[batch, time, embed_dim] -> ([batch, time, embed_dim], new state); arguments as `Body.__call__`."""
        hidden, state = self.body(inputs, state, dropout=dropout)
        return (self.projection(hidden) if self.projection else hidden), state
