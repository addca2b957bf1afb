"""Dropout as a pure function of (seed, step, example): nothing to checkpoint, and the same on any number of devices."""

import tensorflow as tf

_PHILOX = 1  # tf.random.Algorithm.PHILOX: the same bits on every kind of device.
_WORDS_PER_COUNT = 4  # Philox yields four 32-bit words a counter value.


class DropoutStream:
    """The dropout masks of one training step on one replica.

    Every call of `dropout` or `factors` takes the next of a fixed sequence of independent masks, so call them in the
    same order at each step. A mask depends on the example's number in the global batch, not on the replica that
    computes it.
    """

    def __init__(self, *, seed, step, first_example):
        """Args:
        seed: int.
        step: int scalar tensor.
        first_example: number, in the global batch, of this replica's first example; int or scalar tensor.
        """
        self._seed = seed
        self._step = step
        self._first_example = first_example
        self._num_masks = 0

    def dropout(self, x, rate, *, over_time=False):
        """Zeroes elements of `x` with probability `rate` and scales the others by 1 / (1 - rate).

        Args:
          x: [batch, time, dim] float.
          rate: float in [0, 1); 0 returns `x`.
          over_time: False for a fresh mask at each time step; True for one mask, [batch, 1, dim], kept over the time
            steps of the window.

        Returns:
          [batch, time, dim], the dtype of `x`.

        Source: Srivastava et al. 2014; over_time: Gal & Ghahramani 2016 (arXiv:1512.05287).
        """
        factors = self.factors(x.shape, rate, dtype=x.dtype, over_time=over_time)
        return x if factors is None else x * factors

    def factors(self, shape, rate, *, dtype, over_time=False):
        """What `dropout` multiplies an x of this shape by, for x that comes in parts: broadcasts to it; None for 1."""
        mask_number = self._num_masks
        self._num_masks += 1
        if rate == 0:
            return None
        batch, time, dim = shape
        mask_shape = [batch, 1 if over_time else time, dim]
        size = mask_shape[1] * dim
        counts = -(-size // _WORDS_PER_COUNT)
        bits = tf.raw_ops.StatelessRandomUniformFullIntV2(
            shape=[batch, counts * _WORDS_PER_COUNT],
            key=tf.constant([(self._seed * 2**16 + mask_number) % 2**64], tf.uint64),
            counter=tf.stack(
                [tf.cast(self._first_example * counts, tf.uint64), tf.cast(self._step, tf.uint64)]
            ),
            alg=_PHILOX,
            dtype=tf.uint32,
        )
        keep = tf.reshape(bits[:, :size] >= tf.constant(int(rate * 2**32), tf.uint32), mask_shape)
        return tf.where(keep, tf.constant(1 / (1 - rate), dtype), tf.constant(0, dtype))


def check_rate(**rates):
    """Raises ValueError unless every rate is in [0, 1)."""
    for name, rate in rates.items():
        if not 0 <= rate < 1:
            raise ValueError(
                f"{name} must be in [0, 1). Received: {name}={rate}. Set it to a fraction, such as 0.2; the shipped "
                "configurations have the macro DROPOUT for dropout."
            )
