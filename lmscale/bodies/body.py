"""What sits between the embedding and the softmax.

To add a body, add a file here with a function that returns a `Body`, or wrap a Keras layer in `keras_body`; name it in
the gin file as the task's body. The task knows nothing else about it.
"""

import abc
from collections.abc import Callable, Mapping

import keras

from lmscale.parameters.layers import name_of


class Body(abc.ABC):
    """[batch, time, embed_dim] -> [batch, time, hidden], perhaps with a state carried from window to window.

    Attributes:
      layers: {name: Keras layer} of those whose variables are trained and saved; the names are part of their paths.
      stateful: whether consecutive windows must continue the same streams of text.
      causal: whether no output may depend on later inputs, which a probe checks when the body is built. False only for
        a task that shows the whole text, such as classification: a language model would predict what it has seen.
    """

    stateful = False
    causal = True

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
