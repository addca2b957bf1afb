"""What sits between the embedding and the softmax.

To add a body, add a file here with a function that returns a `Body`, or wrap a Keras layer in `keras_body`; name it in
the gin file as the task's body. The task knows nothing else about it.
"""

import abc
from collections.abc import Callable, Mapping

import keras
import tensorflow as tf

from lmscale.parameters.layers import name_of


class Body(abc.ABC):
    """[batch, time, embed_dim] -> [batch, time, hidden], perhaps with a state carried from window to window.

    Attributes:
      layers: {name: Keras layer} of those whose variables are trained and saved; the names are part of their paths.
      stateful: whether consecutive windows must continue the same streams of text.
      causal: whether no output may depend on later inputs, which a probe checks when the body is built. False only for
        a task that shows the whole text, such as classification: a language model would predict what it has seen.
      input_dim: embed_dim of the inputs; None until an `Encoder` is built around the body.
    """

    stateful = False
    causal = True
    input_dim: int | None = None

    def __init__(self, layers: Mapping[str, keras.layers.Layer]):
        self.layers = dict(layers)

    def initial_state(self, batch_size):
        """State at the start of a text: a list of [batch_size, ...] tensors, empty for a stateless body."""
        del batch_size
        return []

    @abc.abstractmethod
    def __call__(self, inputs, state, *, dropout):
        """Args:
          inputs: [batch, time, embed_dim].
          state: as `initial_state` returns it.
          dropout: `DropoutStream` in training, None in evaluation.

        Returns:
          (hidden [batch, time, hidden], new state).
        """

    def decoding_state(self, batch_size, length):
        """What decoding carries from token to token, before the first one.

        That of a stateful body is its `initial_state`. For any other it is the inputs seen, from which `decode`
        computes anew: right for every causal body, in time that grows with `length`. A body with a better way has its
        own `decoding_state` and `decode`.

        Args:
          batch_size: texts side by side.
          length: tokens of each that there must be room for, in all calls of `decode` together.

        Returns:
          List of [batch_size, ...] tensors, of shapes that stay as they are: fit for `tf.while_loop`.

        Raises:
          ValueError: if an output depends on later inputs, or the width of the inputs is not known.
        """
        _check_causal(self)
        if self.stateful:
            return self.initial_state(batch_size)
        if self.input_dim is None:
            raise ValueError(
                "A body must know the width of its inputs before it decodes. Received: "
                f"{type(self).__name__}, whose input_dim is None. Build an Encoder around it first."
            )
        return [
            tf.zeros([batch_size, length, self.input_dim]),
            tf.zeros([batch_size], tf.int32),
        ]

    def decode(self, inputs, state):
        """The outputs of the next time steps, those that `__call__` without dropout gives there for the whole text.

        Args:
          inputs: [batch, time, embed_dim], static shape: what follows the inputs of the calls before.
          state: as `decoding_state` or the call before returned it. What goes beyond its length is not kept, and the
            outputs there mean nothing.

        Returns:
          (hidden [batch, time, hidden], new state).

        Raises:
          ValueError: if an output depends on later inputs, or `inputs` alone are longer than the length.
        """
        _check_causal(self)
        if self.stateful:
            return self(inputs, state, dropout=None)
        seen, position = state
        seen = write_at(seen, position, tf.cast(inputs, seen.dtype))
        hidden, _ = self(seen, [], dropout=None)
        places = position[:, tf.newaxis] + tf.range(inputs.shape[1])
        hidden = tf.gather(hidden, tf.minimum(places, hidden.shape[1] - 1), batch_dims=1)
        return hidden, [seen, position + inputs.shape[1]]


def write_at(buffer, position, values):
    """A buffer of decoding with new values in it.

    Args:
      buffer: [batch, length, dim].
      position: [batch] int32, place of the first value in each example.
      values: [batch, time, dim], static shape.

    Returns:
      As buffer. Values beyond its end are dropped.

    Raises:
      ValueError: if there are more values than places.
    """
    length, time = buffer.shape[1], values.shape[1]
    if time > length:
        raise ValueError(
            f"There must be room for the inputs. Received: {time} time steps, and a state of the length {length}. Ask "
            "decoding_state for a greater length."
        )
    # Of each place, the number among the values; no scatter, which is slow on some devices.
    number = tf.range(length) - position[:, tf.newaxis]
    new = tf.gather(values, tf.clip_by_value(number, 0, time - 1), batch_dims=1)
    is_new = (number >= 0) & (number < time)
    return tf.where(is_new[:, :, tf.newaxis], new, buffer)


def _check_causal(body):
    if not body.causal:
        raise ValueError(
            "A body that decodes must not depend on later inputs, which are not there yet. Received: "
            f"{type(body).__name__}, whose causal is False. Train with a causal body to generate text."
        )


class KerasBody(Body):
    """Any Keras layer [batch, time, embed_dim] -> [batch, time, hidden], without carried state.

    Dropout layers of Keras draw the same masks on every replica, so that with them, unlike with a
    `DropoutStream`, the loss depends on the number of devices.
    """

    def __init__(self, layer, *, causal=True):
        super().__init__({name_of(layer): layer})
        self._layer = layer
        self.causal = causal

    def __call__(self, inputs, state, *, dropout):
        return self._layer(inputs, training=dropout is not None), state


def keras_body(*, layer: Callable[[], keras.layers.Layer], causal: bool = True) -> Body:
    """Body factory for gin: `keras_body.layer = @SomeLayer` names a Keras layer class or factory.

    Args:
      layer: returns the layer.
      causal: False lets it see later inputs (`Body.causal`).
    """
    return KerasBody(layer(), causal=causal)
