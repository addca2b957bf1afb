"""Hidden states with several labels each: the neighbours of their places."""

import dataclasses

import tensorflow as tf


@dataclasses.dataclass(frozen=True)
class Neighbours:
    """Which neighbours of each hidden state are its labels: those next to its place, that itself left out.

    Attributes:
      before, after: [n] int32, how many labels before and after, 0 to `window`.
      state_ids: [n] int32, the ids at their own places.
      num_examples: int; each has `window` labels more at either end than it has hidden states.
      window: int.
    """

    before: tf.Tensor
    after: tf.Tensor
    state_ids: tf.Tensor
    num_examples: int
    window: int

    def num_labels(self):
        """[n] float32, of each hidden state."""
        return tf.cast(self.before + self.after, tf.float32)

    def part(self, cut, *, num_parts):
        """Those of one of `num_parts` equal parts of the examples, which `cut` takes out of a tensor."""
        return Neighbours(
            cut(self.before),
            cut(self.after),
            cut(self.state_ids),
            num_examples=self.num_examples // num_parts,
            window=self.window,
        )

    def in_examples(self, x):
        """[n, ...] of hidden states or labels to [examples, n / examples, ...]."""
        return tf.reshape(x, [self.num_examples, -1, *x.shape[1:]])


def flat(x):
    """The inverse of `Neighbours.in_examples`."""
    return tf.reshape(x, [-1, *x.shape[2:]])


def band_mask(before, after, *, window):
    """Which labels of its example a hidden state has.

    Args:
      before, after: [examples, chunk] int32.
      window: int.

    Returns:
      [examples, chunk, chunk + 2 * window] bool.
    """
    chunk = before.shape[1]
    offsets = [[column - row - window for column in range(chunk + 2 * window)] for row in range(chunk)]
    offsets = tf.constant(offsets, tf.int32)
    return (
        (offsets >= -before[..., tf.newaxis]) & (offsets <= after[..., tf.newaxis]) & tf.not_equal(offsets, 0)
    )
