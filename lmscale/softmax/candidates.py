"""The softmax of hidden states over candidates: all of them, or those of one shard."""

import tensorflow as tf

from lmscale.softmax.products import float32_product

# Finite, so that a token whose every sampled class is a hit has loss 0 and gradient 0 rather than NaN.
REMOVED_LOGIT = -1e30


def softmax_over_candidates(hidden, rows, offset, hits):
    """Softmax and logsumexp of the logits hidden . row + offset, those of hits removed.

    Args:
      hidden: [tokens, embed_dim].
      rows: [candidates, embed_dim], at least one; dtype of hidden.
      offset: [candidates] float32; `REMOVED_LOGIT` for one that does not count.
      hits: [tokens, candidates] bool, or None.

    Returns:
      (probabilities [tokens, candidates], logsumexp [tokens]), float32.

    Communication: none.
    """
    # bias_add rather than +: on CPUs it is fused into the product.
    logits = tf.nn.bias_add(float32_product(hidden, rows, transpose_b=True), offset)
    if hits is not None:
        logits = tf.where(hits, tf.constant(REMOVED_LOGIT, tf.float32), logits)
    probabilities = tf.nn.softmax(logits)
    # The largest probability is 1 / sum(exp(logit - max)): the logsumexp without another pass of exp.
    logsumexp = tf.reduce_max(logits, axis=1) - tf.math.log(tf.reduce_max(probabilities, axis=1))
    return probabilities, logsumexp


def true_logits(hidden, true_rows, true_offset):
    """[tokens] float32: the logit of each token's label, whose row is [tokens, embed_dim]."""
    products = tf.cast(hidden, tf.float32) * tf.cast(true_rows, tf.float32)
    return true_offset + tf.reduce_sum(products, axis=1)


def softplus_and_sigmoid(x):
    """log(1 + exp(x)) and its derivative, with one exponential for both, which cannot overflow."""
    sigmoid = tf.sigmoid(x)
    # The logarithm of a number from 0.5 to 1: of the larger of both probabilities.
    return tf.nn.relu(x) - tf.math.log(tf.maximum(sigmoid, 1.0 - sigmoid)), sigmoid
