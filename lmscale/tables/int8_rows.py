"""Rows in a byte a number and a scale a row: for what is served, not for what is trained."""

import numpy as np
import tensorflow as tf

_LARGEST = 127


def quantize(rows):
    """Rows in int8, each with the scale by which its largest number is 127.

    Args:
      rows: [n, dim] float32 array.

    Returns:
      (values [n, dim] int8, scales [n] float32): rows are nearly values * scales; a row of zeros is exactly that.
    """
    scales = (np.max(np.abs(rows), axis=1) / _LARGEST).astype(np.float32)
    inverse = np.divide(1.0, scales, out=np.zeros_like(scales), where=scales > 0)
    return np.rint(rows * inverse[:, None]).astype(np.int8), scales


class Int8Rows(tf.Module):
    """A [rows, dim] matrix in int8 with a scale a row, read by `gather` alone.

    Attributes:
      shape: `TensorShape` of the matrix.
    """

    def __init__(self, values, scales):
        """`values` [rows, dim] int8, `scales` [rows] float32, as of `quantize`."""
        super().__init__()
        self.values = tf.Variable(values, trainable=False, name="values")
        self.scales = tf.Variable(scales, trainable=False, name="scales")

    @property
    def shape(self):
        return self.values.shape

    def gather(self, ids):
        """[*ids.shape, dim] float32."""
        return tf.cast(tf.gather(self.values, ids), tf.float32) * tf.gather(self.scales, ids)[..., tf.newaxis]


def gather_rows(rows, ids):
    """Rows of a matrix: a tensor or variable [rows, dim], or `Int8Rows`."""
    return rows.gather(ids) if isinstance(rows, Int8Rows) else tf.gather(rows, ids)
