"""A probe for bodies that see the future, whose losses would look excellent and mean nothing."""

import keras
import numpy as np
import tensorflow as tf

from lmscale.models.keras_layers import describe

# Relative to the largest output. Rounding stays far below it, an output that sees the future far above.
_TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2}


def check_causal(encoder, *, batch_size, window):
    """Checks that no output depends on later inputs, nor on those of another example.

    Replaces the inputs from a time step on by others, for several time steps and for the near as well as the far
    future, and requires the outputs before it unchanged but for rounding. Where weights start as constants (a branch
    that begins as zero hides what it will see), once more with weights that are moved at random and then put back.

    Args:
      encoder: `Encoder`, built.
      batch_size, window: shape of the inputs to probe with: those of the steps to come, whose traces it shares.

    Raises:
      ValueError: naming the layer.
    """
    _check(encoder, batch_size=batch_size, window=window)
    weights = [v for v in encoder.variables.values() if tf.as_dtype(v.dtype).is_floating]
    before = [v.numpy() for v in weights]
    if any(value.ndim > 1 and np.ptp(value) == 0 for value in before):
        generator = np.random.default_rng(1)
        try:
            for variable, value in zip(weights, before, strict=True):
                variable.assign(value + 0.1 * generator.random(value.shape).astype(np.float32))
            _check(encoder, batch_size=batch_size, window=window)
        finally:
            for variable, value in zip(weights, before, strict=True):
                variable.assign(value)


def _check(encoder, *, batch_size, window):
    body = encoder.body

    def outputs(inputs):
        state = body.initial_state(batch_size)
        return encoder(tf.constant(inputs), state, dropout=None)[0]

    shape = [batch_size, window, encoder.embed_dim]
    tolerance = _TOLERANCE.get(encoder.compute_dtype, _TOLERANCE["float32"])
    if batch_size > 1 and _mixes_examples(outputs, shape, tolerance=tolerance):
        raise ValueError(
            "The examples of a batch must not see each other. Received: "
            f"{describe(body.layers) or type(body).__name__}, whose output for one example changes with another one. "
            "Normalise over the features of an example, say, not over the batch."
        )
    seen = _first_look_ahead(outputs, shape, tolerance=tolerance)
    if seen is not None:
        raise ValueError(
            "An output of a body must not depend on later inputs. Received: "
            f"{_culprit(body, shape, tolerance=tolerance)}, whose output at time step {seen[0]} changes with the "
            f"inputs from time step {seen[1]} on. Its perplexity would mean nothing: use padding='causal', a causal "
            "mask, or a recurrence that goes forward. For a task that wants it, set body.keras_body.causal = False (in "
            "a class of your own: causal = False)."
        )


def _first_look_ahead(outputs, shape, *, tolerance):
    """(time step, later step that it sees), both from 0, of the first difference found; None if there is none."""
    batch_size, window, _ = shape
    generator = np.random.default_rng(0)
    present, future = generator.normal(size=(2, 1, *shape[1:])).astype(np.float32)
    cuts = sorted({1, 2, 3, window // 3, window // 2, window - 2, window - 1} & set(range(1, window)))
    # The last one is never changed.
    cuts_of_rows = np.array([*cuts, window])
    rows = np.where((np.arange(window) < cuts_of_rows[:, None])[:, :, None], present, future)
    results = []
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        filled = np.concatenate([part, np.repeat(present, batch_size - len(part), axis=0)])
        results.append(tf.cast(outputs(filled), tf.float32).numpy()[: len(part)])
    results = np.concatenate(results)
    unchanged = results[-1]
    allowed = tolerance * np.max(np.abs(unchanged))
    if not np.isfinite(allowed):
        return None  # Nothing can be told; training will say what it meets.
    for result, cut in zip(results, cuts, strict=False):
        different = np.abs(result - unchanged).max(axis=-1)[:cut] > allowed
        if different.any():
            return int(different.argmax()), cut
    return None


def _mixes_examples(outputs, shape, *, tolerance):
    """Whether the outputs of the first examples change with the last one."""
    generator = np.random.default_rng(0)
    inputs = generator.normal(size=shape).astype(np.float32)
    before = tf.cast(outputs(inputs), tf.float32).numpy()[:-1]
    inputs[-1] = 10 * generator.normal(size=shape[1:])
    after = tf.cast(outputs(inputs), tf.float32).numpy()[:-1]
    return bool(np.any(np.abs(after - before) > tolerance * np.max(np.abs(before))))


def _culprit(body, shape, *, tolerance):
    """The first layer of a sequence whose output sees the future; of another body, its layers."""
    layers = body.layers
    if len(layers) == 1 and isinstance(layers[0], keras.Sequential):
        for i, layer in enumerate(layers[0].layers):

            def outputs(x, last=i):
                for inner in layers[0].layers[: last + 1]:
                    x = inner(x)
                return x

            if outputs(tf.zeros(shape)).shape[:2] != shape[:2]:
                break
            if _first_look_ahead(outputs, shape, tolerance=tolerance) is not None:
                return describe([layer])
    return describe(layers) or type(body).__name__
