"""Causal attention over whole windows, long ones block by block, and over a cache; rotary positions."""

import functools

import tensorflow as tf

# Longer windows are taken block by block. A block of logits, [256, 256] of each head, stays in a core's cache.
BLOCK = 256


def rotary(x, positions, *, base=10_000.0):
    """Turns pairs of features by angles that grow with the position, so that products tell distances alone.

    Feature i of the first half is paired with feature i of the second; pair i of position p is turned by
    p * base ** (-2 * i / dim). The paper pairs neighbours, which is the same up to the order of the features.

    Args:
      x: [batch, time, heads, dim] float, dim even.
      positions: [time] or [batch, time] int32.
      base: of the geometric sequence of wavelengths.

    Returns:
      As x, computed in float32 and rounded to its type.

    Source: Su et al. 2021 (arXiv:2104.09864), equation 34.
    """
    dim = x.shape[-1]
    frequencies = base ** (-tf.range(0, dim, 2, dtype=tf.float32) / dim)
    angles = tf.cast(positions, tf.float32)[..., tf.newaxis, tf.newaxis] * frequencies
    cosines, sines = tf.cos(angles), tf.sin(angles)
    first, second = tf.split(tf.cast(x, tf.float32), 2, axis=-1)
    turned = tf.concat([first * cosines - second * sines, first * sines + second * cosines], axis=-1)
    return tf.cast(turned, x.dtype)


def causal_attention(queries, keys, values, *, block=None):
    """Softmax attention of each time step to itself and those before: softmax(q k' / sqrt(dim)) v.

    Windows longer than `block` are taken block by block, forward and backward, with a running maximum and sum for each
    query: memory beside arguments and result is that of a few blocks, however long the window. The backward pass
    computes the blocks of logits anew, twice.

    Args:
      queries, keys, values: [batch, heads, time, dim] float, static shape. Their type is that of the products; logits,
        softmax and sums are float32.
      block: time steps of a block; None for `BLOCK`.

    Returns:
      [batch, heads, time, dim], the type of values.

    Communication: none.
    Source: Rabe & Staats 2021 (arXiv:2112.05682); gradients: Dao et al. 2022 (arXiv:2205.14135), appendix B.2.
    """
    block = BLOCK if block is None else block
    if queries.shape[2] > block:
        return _blockwise(queries, keys, values, block=block)
    steps = tf.range(queries.shape[2])
    return attention(queries, keys, values, seen=steps[:, tf.newaxis] >= steps)


def attention(queries, keys, values, *, seen):
    """Softmax attention, all logits at once.

    Args:
      queries: [batch, heads, time, dim].
      keys, values: [batch, heads, length, dim].
      seen: bool, broadcasts to [batch, heads, time, length]: which keys a query sees, at least one.

    Returns:
      [batch, heads, time, dim], the type of values.
    """
    logits = _logits(queries, keys)
    probabilities = tf.nn.softmax(tf.where(seen, logits, logits.dtype.min), axis=-1)
    return tf.matmul(tf.cast(probabilities, values.dtype), values)


def _logits(queries, keys):
    products = tf.cast(tf.matmul(queries, keys, transpose_b=True), tf.float32)
    return products * queries.shape[-1] ** -0.5


def _blockwise(queries, keys, values, *, block):
    """`causal_attention` in blocks; padding at the end is in every query's future."""
    batch, heads, time, dim = queries.shape
    num_blocks = -(-time // block)
    padding = num_blocks * block - time

    def to_blocks(x):
        """[batch, heads, time, ...] -> [blocks, batch, heads, block, ...]."""
        rest = x.shape[3:]
        x = tf.pad(x, [[0, 0], [0, 0], [0, padding]] + [[0, 0]] * len(rest))
        x = tf.reshape(x, [batch, heads, num_blocks, block, *rest])
        return tf.transpose(x, [2, 0, 1, 3, *range(4, 4 + len(rest))])

    def from_blocks(x):
        x = tf.transpose(x, [1, 2, 0, 3, 4])
        return tf.reshape(x, [batch, heads, num_blocks * block, dim])[:, :, :time]

    row = [batch, heads, block]
    scale = dim**-0.5
    in_block = tf.range(block)

    def masked_logits(query_block, key_block, i, j):
        """Those of query block i with key block j <= i; -inf where the key comes later."""
        seen = i * block + in_block[:, tf.newaxis] >= j * block + in_block
        return tf.where(seen, _logits(query_block, key_block), -float("inf"))

    @tf.custom_gradient
    def attend(queries, keys, values):
        q, k, v = (to_blocks(x) for x in (queries, keys, values))

        def of_query_block(i):
            def add_key_block(j, highest, total, summed):
                logits = masked_logits(q[i], k[j], i, j)
                new_highest = tf.maximum(highest, tf.reduce_max(logits, axis=-1))
                weights = tf.exp(logits - new_highest[..., tf.newaxis])
                rescale = tf.exp(highest - new_highest)
                products = tf.cast(tf.matmul(tf.cast(weights, v.dtype), v[j]), tf.float32)
                return (
                    j + 1,
                    new_highest,
                    total * rescale + tf.reduce_sum(weights, axis=-1),
                    summed * rescale[..., tf.newaxis] + products,
                )

            start = [tf.constant(0), tf.fill(row, -float("inf")), tf.zeros(row), tf.zeros([*row, dim])]
            _, highest, total, summed = _loop(lambda j, *_: j <= i, add_key_block, start)
            return tf.cast(summed / total[..., tf.newaxis], v.dtype), highest + tf.math.log(total)

        out, logsumexp = _map_blocks(of_query_block, num_blocks)
        result = from_blocks(out)

        def gradient(d_result):
            d_out = to_blocks(d_result)
            # Of each query, the sum over keys of probability times its gradient.
            centre = tf.reduce_sum(tf.cast(d_out, tf.float32) * tf.cast(out, tf.float32), axis=-1)

            def of_pair(i, j):
                """(probabilities, gradients of the products of queries and keys) of query block i and key block j."""
                probabilities = tf.exp(masked_logits(q[i], k[j], i, j) - logsumexp[i][..., tf.newaxis])
                d_probabilities = tf.cast(tf.matmul(d_out[i], v[j], transpose_b=True), tf.float32)
                d_products = probabilities * (d_probabilities - centre[i][..., tf.newaxis]) * scale
                return tf.cast(probabilities, v.dtype), tf.cast(d_products, q.dtype)

            def of_query_block(i):
                def add_key_block(j, d_query):
                    _, d_products = of_pair(i, j)
                    return j + 1, d_query + tf.cast(tf.matmul(d_products, k[j]), tf.float32)

                _, d_query = _loop(
                    lambda j, *_: j <= i, add_key_block, [tf.constant(0), tf.zeros([*row, dim])]
                )
                return (tf.cast(d_query, q.dtype),)

            def of_key_block(j):
                def add_query_block(i, d_key, d_value):
                    probabilities, d_products = of_pair(i, j)
                    d_key += tf.cast(tf.matmul(d_products, q[i], transpose_a=True), tf.float32)
                    d_value += tf.cast(tf.matmul(probabilities, d_out[i], transpose_a=True), tf.float32)
                    return i + 1, d_key, d_value

                zeros = tf.zeros([*row, dim])
                _, d_key, d_value = _loop(lambda i, *_: i < num_blocks, add_query_block, [j, zeros, zeros])
                return tf.cast(d_key, k.dtype), tf.cast(d_value, v.dtype)

            (d_queries,) = _map_blocks(of_query_block, num_blocks)
            return [from_blocks(x) for x in (d_queries, *_map_blocks(of_key_block, num_blocks))]

        return result, gradient

    return attend(queries, keys, values)


# One block at a time: it is memory that is to be saved.
_loop = functools.partial(tf.while_loop, parallel_iterations=1)


def _map_blocks(function, num_blocks):
    """The results of function(0), function(1), ..., each stacked."""
    first = function(tf.constant(0))
    arrays = [tf.TensorArray(x.dtype, size=num_blocks, element_shape=x.shape).write(0, x) for x in first]

    def write(i, arrays):
        return i + 1, [array.write(i, x) for array, x in zip(arrays, function(i), strict=True)]

    _, arrays = _loop(lambda i, _: i < num_blocks, write, [tf.constant(1), arrays])
    return [
        tf.ensure_shape(array.stack(), [num_blocks, *x.shape]) for array, x in zip(arrays, first, strict=True)
    ]
