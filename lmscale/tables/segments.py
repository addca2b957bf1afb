"""Sums of rows by segment, as fast as the device has them."""

import tensorflow as tf


def segment_sum(values, segments, num_segments):
    """Sums the entries of each segment, in their order on CPUs.

    TensorFlow's kernel for CPUs takes 300 ns for each row of 100 float32, XLA's a fifth of that: it needs static
    shapes, so it sums into as many segments as there are entries, of which the first are taken.

    Args:
      values: [n, ...] float32, of static shape.
      segments: [n] int32, in 0 .. num_segments - 1.
      num_segments: int32 scalar tensor, at most n.

    Returns:
      [num_segments, ...] float32.

    Communication: none.
    """
    if tf.config.functions_run_eagerly() or tf.config.list_logical_devices("GPU"):
        return tf.math.unsorted_segment_sum(values, segments, num_segments)
    return _padded_segment_sum(values, segments)[:num_segments]


@tf.function(jit_compile=True, autograph=False)
def _padded_segment_sum(values, segments):
    return tf.math.unsorted_segment_sum(values, segments, values.shape[0])
