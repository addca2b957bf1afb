"""Gumbel noise that is a function of where it is used: the same for a row whichever shard holds it.

    argmax_v(logits[v] / temperature + noise[v]) is distributed as softmax(logits / temperature)

so that a row can be drawn from a softmax that is streamed, on any number of shards, by a search for the best row.

Source: Maddison et al. 2014, arXiv:1411.0030, section 2; the bits are those of Threefry-2x32 with 20 rounds (Salmon et
al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 4.3).
"""

import tensorflow as tf

_ROTATIONS = (13, 15, 26, 6), (17, 29, 16, 24)
_PARITY = 0x1BD11BDA


def threefry(key, counter):
    """Threefry-2x32 with 20 rounds.

    Args:
      key, counter: pairs of uint32 tensors, of shapes that broadcast.

    Returns:
      Pair of uint32 tensors.

    Communication: none.
    """
    keys = [*key, key[0] ^ key[1] ^ tf.constant(_PARITY, tf.uint32)]
    x0, x1 = counter[0] + keys[0], counter[1] + keys[1]
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            x0 += x1
            rotated = tf.bitwise.left_shift(x1, tf.constant(rotation, tf.uint32)) | tf.bitwise.right_shift(
                x1, tf.constant(32 - rotation, tf.uint32)
            )
            x1 = rotated ^ x0
        x0 += keys[(group + 1) % 3]
        x1 += keys[(group + 2) % 3] + tf.constant(group + 1, tf.uint32)
    return x0, x1


@tf.function(jit_compile=True, autograph=False)
def gumbel(keys, ids):
    """Standard Gumbel noise of rows, from 32 random bits for each.

    Args:
      keys: [n, 3] int32: seed, number of the text, and number of the token in it, of each token.
      ids: [m] or [n, m] int32, rows of the vocabulary.

    Returns:
      [n, m] float32, finite.

    Communication: none.
    """
    seeds, texts, positions = (tf.bitcast(x, tf.uint32)[:, tf.newaxis] for x in tf.unstack(keys, axis=1))
    ids = tf.bitcast(ids, tf.uint32)
    if ids.shape.rank == 1:
        ids = ids[tf.newaxis]
    bits, _ = threefry((seeds, texts), (positions, ids))
    # -log of a uniform number in (0, 1) is exponential. It is small, and the noise large, for numbers near 1, of which
    # float32 has few: so of one minus it.
    uniform = tf.minimum((tf.cast(bits, tf.float32) + 0.5) * 2.0**-32, 1 - 2.0**-24)
    return -tf.math.log(-tf.math.log1p(-uniform))
