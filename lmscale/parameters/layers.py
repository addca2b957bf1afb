"""The Keras layers of a task: their variables under paths that say what they are, and a call of all of them as one."""

import collections
import contextlib
import re
from collections.abc import Mapping

import keras
import tensorflow as tf

from lmscale.parameters import keras_layers

# A recurrent layer of Keras holds its weights in a cell, of which it has one, unless it stacks them.
_CELL = re.compile(r"(lstm|gru|simple_rnn)_cell(_\d+)?")
_MANY_CELLS = re.compile("stacked_rnn_cells")


class Layers:
    """Layers by name, built.

    Attributes:
      layers: {name: Keras layer}.
      variables: {path: Keras variable}, trained or not (seed generators of Keras layers included). A path is
        `layers/NAME/...`, and below it the names of inner layers; those that Keras numbers over the whole process
        (dense_3) are numbered anew within what holds them, so that it depends on nothing else.
      trainable_variables: {path: Keras variable} of those that training updates.
      statistics: {path: Keras variable} of those that layers gather while they train, by themselves on each device.
    """

    def __init__(self, layers: Mapping[str, keras.layers.Layer], *, num_replicas: int):
        """Args:
          layers: the layers, built.
          num_replicas: devices that each have a copy.

        Raises:
          ValueError: for settings of layers that would have no effect, and for layers that gather statistics on several
            devices.
        """
        self.layers = dict(layers)
        every = list(self.layers.values())
        keras_layers.check_settings(every)
        keras_layers.freeze_what_is_frozen(every)
        self.variables = layer_paths(self.layers)
        self.trainable_variables = {path: v for path, v in self.variables.items() if v.trainable}
        gathered = {id(variable) for variable in keras_layers.statistics(every)}
        self.statistics = {path: v for path, v in self.variables.items() if id(v) in gathered}
        if num_replicas > 1 and self.statistics:
            raise ValueError(
                "Layers on several devices must not gather statistics, which would differ between them. Received: "
                f"{', '.join(self.statistics)}. Use LayerNormalization in place of BatchNormalization, say, or one "
                "device."
            )
        self._call = _OneCall(every)

    def call(self, run, inputs, *, training):
        """Runs `run()`, which calls the layers however often, as one call to Keras; returns what it returns.

        Args:
          run: function of no arguments.
          inputs: tensors that it reads, for Keras to see.
          training: whether layers that are not told otherwise behave as in training.
        """
        return self._call(inputs, run=run, training=training)

    def penalties(self):
        """What the layers of the last call add to the loss: regularisers and `add_loss`, as a list of scalars.

        To be asked for within the same tape, and in the same replica, as the call.
        """
        return [tf.reduce_sum(tf.cast(loss, tf.float32)) for loss in self._call.losses]


def check_all_listed(watched, *, layers, reader):
    """Checks that every trainable variable that was read belongs to a listed layer.

    Args:
      watched: the `watched_variables()` of a tape around a call.
      layers: {name: Keras layer} that are listed.
      reader: the body or the task that read them, for the message.

    Raises:
      ValueError: for a trainable variable of another layer.
    """
    strategy = tf.distribute.get_strategy()
    listed = set()
    for variable in (v for layer in layers.values() for v in layer.variables):
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
            "Every layer that is read must be listed in `layers`, since what is not listed is neither trained nor "
            f"saved. Received: {type(reader).__name__}, which reads {', '.join(missing)}. List that layer too."
        )


class _OneCall(keras.layers.Layer):
    """Makes a call of many layers one call to Keras, however many there are, and however often.

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


def layer_paths(layers):
    """{path: variable}: a variable of several layers once, under the first."""
    named: dict[str, keras.Variable] = {}
    seen: collections.Counter = collections.Counter()
    known: set[int] = set()
    for name, layer in layers.items():
        numbered = _Numbering(layer)
        for variable in layer.variables:
            if id(variable) in known:
                continue
            known.add(id(variable))
            *inner, last = variable.path.split("/")[1:] or [variable.path]
            path = "/".join(["layers", name, *numbered.names(inner), last])
            named[f"{path}_{seen[path]}" if seen[path] else path] = variable
            seen[path] += 1
    return named


def name_of(layer, *, number=0):
    """`lstm_0` for an LSTM layer that Keras has named by itself, with whatever number; else the name it was given."""
    kind = re.sub(r"_\d+$", "", layer.name)
    return f"{kind}_{number}" if _is_own_name(kind, layer) else layer.name


def _is_own_name(kind, layer):
    """Whether Keras makes this name (without its number) from the layer's class."""
    return kind.replace("_", "") == type(layer).__name__.lower()


class _Numbering:
    """Names of the layers inside a layer that depend on nothing outside it."""

    def __init__(self, layer):
        self._inner = {inner.name: inner for inner in keras_layers.flatten([layer])}
        # (names above, name without number) -> names in the process, in the order in which they are met.
        self._siblings: dict[tuple, list[str]] = {}

    def names(self, parts):
        """`parts` of a variable's path between its layer and its own name, numbered anew; cells left out."""
        if parts and _CELL.fullmatch(parts[-1]) and not (parts[1:] and _MANY_CELLS.match(parts[-2])):
            parts = parts[:-1]
        return [self._name(tuple(parts[:i]), part) for i, part in enumerate(parts)]

    def _name(self, above, part):
        kind = re.sub(r"_\d+$", "", part)
        siblings = self._siblings.setdefault((above, kind), [])
        if part not in siblings:
            siblings.append(part)
        number = siblings.index(part)
        layer = self._inner.get(part)
        if layer is not None and _is_own_name(kind, layer):
            return f"{kind}_{number}"
        # Keras derives some names from numbered ones (forward_lstm_3), and numbers what is no layer (seed_generator_3).
        derived = layer is None or kind.replace("_", "").endswith(type(layer).__name__.lower())
        if not derived:
            return part
        return f"{kind}_{number}" if number else kind
