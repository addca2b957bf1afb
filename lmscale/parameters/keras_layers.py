"""What Keras layers are told, and what of it can have no effect here: refused rather than ignored."""

from collections.abc import Iterable, Sequence

import keras
import tensorflow as tf


def flatten(layers: Iterable[keras.layers.Layer]) -> list[keras.layers.Layer]:
    """Layers and the layers inside them, each once."""
    found = {id(inner): inner for layer in layers for inner in layer._flatten_layers()}
    return list(found.values())


def describe(layers: Sequence[keras.layers.Layer]) -> str:
    """`the layer 'gru' (GRU)`, for messages; several joined by commas, none empty."""
    return ", ".join(f"the layer {layer.name!r} ({type(layer).__name__})" for layer in layers)


def freeze_what_is_frozen(layers: Sequence[keras.layers.Layer]) -> None:
    """Lets `trainable=False` of a layer reach the variables of the layers inside it.

    Keras passes it on to what exists where it is set, and not at all in a `Sequential`, which would go on learning.
    """
    for layer in flatten(layers):
        if not layer.trainable:
            for inner in flatten([layer]):
                inner.trainable = False


def statistics(layers: Sequence[keras.layers.Layer]) -> list[keras.Variable]:
    """The variables that layers gather while they train, such as the means of a BatchNormalization."""
    return [
        variable
        for layer in flatten(layers)
        if layer.trainable
        for variable in layer._non_trainable_variables
        if tf.as_dtype(variable.dtype).is_floating
    ]


def check_settings(layers: Sequence[keras.layers.Layer]) -> None:
    """Checks layers, built or not, for settings that a run could not follow.

    Raises:
      ValueError: naming the layer and the argument: a state of Keras's own (stateful=True), weights of another type
        than float32, products in float16, or quantisation.
    """
    for layer in flatten(layers):
        if getattr(layer, "stateful", False):
            raise ValueError(
                "A Keras layer must not carry a state of its own: windows come in shuffled order, and each device has "
                f"its own examples. Received: {describe([layer])} with stateful=True. Leave it out; a body that "
                "carries a state is a class with stateful = True and initial_state, such as LstmBody."
            )
        if layer.dtype_policy.quantization_mode is not None or (
            layer.compute_dtype == "float16" and keras.config.dtype_policy().compute_dtype != "float16"
        ):
            raise ValueError(
                "A Keras layer must compute in float32 or bfloat16: small gradients vanish in float16 without the loss "
                "scaling that comes with Experiment.compute_dtype = 'float16', and quantised weights have none. "
                f"Received: {describe([layer])} with dtype={layer.dtype_policy.name!r}. Use dtype='mixed_bfloat16'."
            )
        variables = layer._trainable_variables + layer._non_trainable_variables
        dtypes = {tf.as_dtype(dtype) for dtype in (layer.variable_dtype, *(v.dtype for v in variables))}
        if narrow_or_wide := [d.name for d in dtypes if d.is_floating and d != tf.float32]:
            raise ValueError(
                f"Weights must be float32. Received: {describe([layer])} with dtype={layer.dtype_policy.name!r}, whose "
                f"weights are {narrow_or_wide[0]}. Use dtype='mixed_bfloat16' for products in bfloat16."
            )
