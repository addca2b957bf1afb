"""Matrix products of narrow values with float32 sums, and what is compiled around products."""

import functools

import keras
import tensorflow as tf

from lmscale.keras_settings import check_compute_dtype


def resolved_compute_dtype(name):
    """The dtype of a part's products: `name`, of `keras_settings.POLICIES`; None for the experiment's: Keras's."""
    check_compute_dtype(name)
    return tf.as_dtype(name or keras.config.dtype_policy().compute_dtype)


def float32_product(x, y, *, transpose_b=False):
    """x y, or x y^T with transpose_b, summed in float32 and never rounded to less.

    Args:
      x, y: matrices of one dtype, float32, bfloat16 or float16.

    Returns:
      float32 matrix.

    Communication: none.
    """
    if x.dtype == tf.float32:
        return tf.matmul(x, y, transpose_b=transpose_b)
    if (
        tf.config.functions_run_eagerly()
    ):  # For debugging: nothing is compiled then. The same values, only slower.
        return tf.matmul(tf.cast(x, tf.float32), tf.cast(y, tf.float32), transpose_b=transpose_b)
    return _narrow_product(x, y, transpose_b=transpose_b)


@tf.function(jit_compile=True, autograph=False)
def _narrow_product(x, y, *, transpose_b):
    # tf.matmul returns its inputs' dtype, and this op, which can widen, has kernels for narrow ones in XLA only.
    return tf.raw_ops.BatchMatMulV3(x=x, y=y, Tout=tf.float32, adj_y=transpose_b)


def compiled(function):
    """`function`, of tensors of static shapes, compiled by XLA: its passes over memory become few.

    Not where functions run eagerly, for debugging.
    """
    return function if tf.config.functions_run_eagerly() else _compiled(function)


@functools.cache
def _compiled(function):
    return tf.function(function, jit_compile=True, autograph=False)
