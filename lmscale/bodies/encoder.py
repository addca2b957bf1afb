"""A body and the projection to the table's width: called as one, the variables named, the settings checked."""

import collections
import contextlib
import re

import keras
import tensorflow as tf

from lmscale.bodies import keras_layers
from lmscale.bodies.causality import check_causal


class Encoder:
    """A body and, where its width is not the table's, the projection to it: [..., hidden] -> [..., embed_dim].

    Attributes:
      body: the `Body`.
      projection: the Keras layer, or None.
      embed_dim: width of the table.
    """

    def __init__(self, body, *, embed_dim, batch_size, window, probe_shape=None, num_replicas=1):
        """Builds the layers and checks what can be checked before a step.

        Args:
          body: `Body`.
          embed_dim: width of the table.
          batch_size, window: of the inputs that the layers are built for: those of the steps to come.
          probe_shape: (batch size, window) of the inputs by which the body is probed for looking ahead
            (`check_causal`): those of the evaluations to come, say. None, and for a body that carries a state, which
            takes windows of any length: as the layers are built for.
          num_replicas: devices that will each have a copy.

        Raises:
          ValueError: for a body of another shape than [batch, time, hidden], one that sees later inputs or other
            examples, one that reads variables which its `layers` do not hold, one that gathers statistics on several
            devices, and settings that would have no effect.
        """
        self.body = body
        self.embed_dim = embed_dim
        keras_layers.check_settings(body.layers)  # Before Keras fails at them in its own words.
        state = body.initial_state(batch_size)
        if not isinstance(state, list) or any(s.shape.rank == 0 or s.shape[0] != batch_size for s in state):
            raise ValueError(
                "The initial_state of a body must be a list of [batch_size, ...] tensors. Received, for a batch of "
                f"{batch_size}: {state}."
            )
        inputs = tf.zeros([batch_size, window, embed_dim])
        with tf.GradientTape() as tape:
            example, _ = body(inputs, state, dropout=None)
        _check_output(example, body=body, shape=inputs.shape.as_list())
        self.projection = None
        if example.shape[-1] != embed_dim:
            self.projection = keras.layers.Dense(embed_dim, use_bias=False, name="projection")
            self.projection.build(example.shape)
        keras_layers.check_settings(self.layers)
        keras_layers.freeze_what_is_frozen(self.layers)
        self.check_all_listed(tape.watched_variables())
        self._check_same_on_every_device(num_replicas)
        self._call = _OneCall(self.layers)
        if body.causal:
            if probe_shape is None or (body.stateful and window > 1):
                probe_shape = batch_size, window
            check_causal(self, batch_size=probe_shape[0], window=probe_shape[1])

    @property
    def layers(self):
        """The Keras layers: the body's, then the projection."""
        return self.body.layers + ([self.projection] if self.projection else [])

    @property
    def variables(self):
        """{name: Keras variable}, trained or not (seed generators of Keras layers included); names do not depend on
        what else the process has built."""
        named = {}
        seen = collections.Counter()
        known = set()
        for i, layer in enumerate(self.layers):
            for variable in layer.variables:
                if id(variable) in known:  # Shared by two layers: it is trained and saved once.
                    continue
                known.add(id(variable))
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

    @property
    def statistics(self):
        """{name: Keras variable} of those that layers gather while they train, by themselves on each device."""
        gathered = {id(variable) for variable in keras_layers.statistics(self.layers)}
        return {name: variable for name, variable in self.variables.items() if id(variable) in gathered}

    def __call__(self, inputs, state, *, dropout):
        """[batch, time, embed_dim] -> ([batch, time, embed_dim], new state); arguments as `Body.__call__`."""

        def run():
            hidden, new_state = self.body(inputs, state, dropout=dropout)
            return (self.projection(hidden) if self.projection else hidden), new_state

        return self._call(inputs, run=run, training=dropout is not None)

    def penalties(self):
        """What the layers of the last call add to the loss: regularisers and `add_loss`, as a list of scalars.

        To be asked for within the same tape, and in the same replica, as the call.
        """
        return [tf.reduce_sum(tf.cast(loss, tf.float32)) for loss in self._call.losses]

    def check_all_listed(self, watched):
        """Checks that the body lists every variable that it reads.

        Args:
          watched: the `watched_variables()` of a tape around a call.

        Raises:
          ValueError: for a trainable variable that the body reads and does not list.
        """
        strategy = tf.distribute.get_strategy()
        listed = set()
        for variable in self.variables.values():
            listed |= {
                id(part) for part in (variable.value, *strategy.experimental_local_results(variable.value))
            }
        # The last two parts of the name are the layer's and the variable's.
        missing = [
            "/".join(variable.name.removesuffix(":0").split("/")[-2:])
            for variable in watched
            if id(variable) not in listed
        ]
        if missing:
            raise ValueError(
                "A body must list all its layers, since what is not listed is neither trained nor saved. Received: "
                f"{type(self.body).__name__}, which reads {', '.join(missing)}. Pass that layer to Body.__init__ too."
            )

    def _check_same_on_every_device(self, num_replicas):
        """Raises ValueError if a layer would gather statistics of its own on each of several devices."""
        if num_replicas > 1 and self.statistics:
            raise ValueError(
                "A body on several devices must not gather statistics, which would differ between them. Received: "
                f"{', '.join(self.statistics)}. Use LayerNormalization in place of BatchNormalization, say, or one "
                "device."
            )


class _OneCall(keras.layers.Layer):
    """Makes a body's call one call to Keras, however many layers it calls, and however often.

    Keras forgets the losses of a layer at its next outermost call, and lets layers inside a call inherit `training`.
    """

    def __init__(self, layers):
        super().__init__(dtype="float32", autocast=False, name="body")
        self.inner_layers = layers  # Keras asks them for their losses.
        self.built = True

    def call(self, inputs, run, training):
        del inputs, training  # Keras wants to see tensors, and hands `training` on.
        return run()

    def _open_name_scope(self):
        # Operations keep their names, by which TensorFlow orders its rewriting of the graph.
        return contextlib.nullcontext()


def _check_output(example, *, body, shape):
    layers = keras_layers.describe(body.layers) or type(body).__name__
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
