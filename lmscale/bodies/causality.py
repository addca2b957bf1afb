"""A probe for bodies that see the future, whose losses would look excellent and mean nothing."""

import logging
import math

import keras
import numpy as np
import tensorflow as tf

from lmscale.parameters.keras_layers import describe

_logger = logging.getLogger(__name__)

# Relative to the largest value of the same feature. The same operations on the same numbers give the same bits; only
# where all time steps go through sums together (a Fourier transform) is there rounding.
_TOLERANCE = 1e-5
# A body may be as noisy as that, in the same unit (on GPUs, sums in varying order); what counts is ten times its noise.
_NOISE = 1e-2


def check_causal(encoder, *, batch_size, window):
    """Checks that no output depends on later inputs, nor on those of another example.

    Replaces the inputs from a time step on by others, for several time steps and for the near as well as the far
    future, and requires the outputs before it unchanged but for rounding. With the weights as they are, and with
    random ones, since a branch whose gate starts as nothing hides what it will see. The weights are put back.

    Args:
      encoder: `Encoder`, built.
      batch_size, window: shape of the inputs to probe with. The body is traced once for it.

    Raises:
      ValueError: naming the layer.
    """
    body = encoder.body
    shape = [batch_size, window, encoder.input_dim]

    @tf.function(autograph=False)
    def outputs(inputs):
        # Functions that are run eagerly, for debugging, get arrays.
        hidden, _ = encoder(tf.convert_to_tensor(inputs), body.initial_state(batch_size), dropout=None)
        return tf.cast(hidden, tf.float32)

    variables = {id(v): v for layer in encoder.layers.values() for v in layer.variables}
    weights = [v for v in variables.values() if tf.as_dtype(v.dtype).is_floating]
    before = [v.numpy() for v in weights]
    generator = np.random.default_rng(1)
    try:
        for variable in weights:
            variable.assign(_random_weights(variable.shape, generator))
        tolerance = _check_examples(outputs, shape, body=body)
        _check_time(outputs, shape, body=body, tolerance=tolerance)
    finally:
        for variable, value in zip(weights, before, strict=True):
            variable.assign(value)
    _check_time(outputs, shape, body=body, tolerance=tolerance)


def _random_weights(shape, generator):
    """Kernels that neither shrink nor blow up; gates, biases and statistics about 1."""
    if len(shape) < 2:
        return generator.uniform(0.5, 1.5, size=shape).astype(np.float32)
    return generator.normal(size=shape).astype(np.float32) / math.sqrt(math.prod(shape[:-1]))


def _check_examples(outputs, shape, *, body):
    """Checks that outputs depend on the inputs of their example alone. Returns the tolerance for differences."""
    inputs = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    try:
        unchanged = outputs(inputs).numpy()
    except (ValueError, tf.errors.InvalidArgumentError) as error:
        raise ValueError(
            f"A body must take inputs of the shape {shape}, as evaluations have them. Received: {_named(body)}, which "
            "fails there (--verbosity=1 shows how). Set next_token.NextToken.eval_window to the length that it is "
            "made for, or mend it."
        ) from error
    noise = _difference(outputs(inputs).numpy(), unchanged, scale=_scale(unchanged)).max()
    if noise > _NOISE:
        raise ValueError(
            "A body must give the same outputs for the same inputs in evaluations. Received: "
            f"{_named(body)}, whose outputs vary by {noise:.2g} of their size. Draw noise in training only."
        )
    tolerance = max(_TOLERANCE, 10 * noise)
    if _mixes_examples(outputs, inputs, unchanged, tolerance=tolerance):
        raise ValueError(
            "The examples of a batch must not see each other. Received: "
            f"{_named(body)}, whose output for one example changes with another one. Normalise over the features of "
            "an example, say, not over the batch."
        )
    return tolerance


def _check_time(outputs, shape, *, body, tolerance):
    """Checks that outputs depend on no later inputs."""
    seen = _first_look_ahead(outputs, shape, tolerance=tolerance)
    if seen is not None:
        raise ValueError(
            "An output of a body must not depend on later inputs. Received: "
            f"{_culprit(body, shape, tolerance=tolerance)}, whose output at time step {seen[0]} changes with the "
            f"inputs from time step {seen[1]} on. Its perplexity would mean nothing: use padding='causal', a causal "
            "mask, or a recurrence that goes forward. For a task that wants it, set body.keras_body.causal = False (in "
            "a class of your own: causal = False)."
        )


def _scale(outputs):
    """[features], the largest finite value of each."""
    return np.max(
        np.abs(outputs), axis=tuple(range(outputs.ndim - 1)), where=np.isfinite(outputs), initial=0.0
    )


def _difference(outputs, expected, *, scale):
    """[..., time]: the largest difference of any feature in units of `scale`; infinite where one of them alone is."""
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        difference = np.abs(outputs - expected) / scale
    both = np.isfinite(outputs) & np.isfinite(expected)
    same = (outputs == expected) | (np.isnan(outputs) & np.isnan(expected))
    return np.where(same, 0.0, np.where(both, difference, np.inf)).max(axis=-1)


def _first_look_ahead(outputs, shape, *, tolerance):
    """(time step, later step that it sees), both from 0, of the first difference found; None if there is none."""
    batch_size, window, _ = shape
    generator = np.random.default_rng(2)
    present, future = generator.normal(size=(2, 1, *shape[1:])).astype(np.float32)
    chosen = {1, 2, 3, window // 3, window // 2, window - 2, window - 1} & set(range(1, window))
    others = generator.permutation(sorted(set(range(1, window)) - chosen)).tolist()
    # And as many more as the same calls have room for.
    room = batch_size * math.ceil(len(chosen) / batch_size)
    cuts = sorted({*chosen, *others[: room - len(chosen)]})
    rows = np.where((np.arange(window) < np.array(cuts)[:, None])[:, :, None], present, future)
    # At every place in the batch: kernels need not sum alike for all of its examples, which narrow values show.
    expected = outputs(np.repeat(present, batch_size, axis=0)).numpy()
    results, unchanged = [], []
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        filled = np.concatenate([part, np.repeat(present, batch_size - len(part), axis=0)])
        results.extend(outputs(filled).numpy()[: len(part)])
        unchanged.extend(expected[: len(part)])
    if not np.isfinite(expected).any():
        _logger.warning("The body cannot be probed for looking ahead: none of its outputs is finite.")
    scale = _scale(expected)
    for result, same_place, cut in zip(results, unchanged, cuts, strict=True):
        different = _difference(result, same_place, scale=scale)[:cut] > tolerance
        if different.any():
            return int(different.argmax()), cut
    return None


def _mixes_examples(outputs, inputs, unchanged, *, tolerance):
    """Whether the output of any example changes with any other one."""
    examples = np.arange(len(inputs))
    others = 3 * np.random.default_rng(3).normal(size=inputs.shape).astype(np.float32)
    # Of any two examples, some bit of their numbers differs: one is changed there, and the other is not.
    for bit in range((len(inputs) - 1).bit_length()):
        for value in (0, 1):
            changed = (examples >> bit) & 1 == value
            result = outputs(np.where(changed[:, None, None], others, inputs)).numpy()
            if np.any(_difference(result, unchanged, scale=_scale(unchanged))[~changed] > tolerance):
                return True
    return False


def _culprit(body, shape, *, tolerance):
    """The first layer of a sequence whose output sees the future; of another body, its layers."""
    layers = list(body.layers.values())
    if len(layers) == 1 and isinstance(layers[0], keras.Sequential):
        for i, layer in enumerate(layers[0].layers):

            @tf.function(autograph=False)
            def outputs(x, last=i):
                x = tf.convert_to_tensor(x)
                for inner in layers[0].layers[: last + 1]:
                    x = inner(x)
                return tf.cast(x, tf.float32)

            if outputs(np.zeros(shape, np.float32)).shape[:2] != shape[:2]:
                break
            if _first_look_ahead(outputs, shape, tolerance=tolerance) is not None:
                return describe([layer])
    return _named(body)


def _named(body):
    return describe(list(body.layers.values())) or type(body).__name__
