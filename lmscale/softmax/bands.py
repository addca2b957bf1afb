"""Hidden states with several labels each: the neighbours of their places."""

import dataclasses

import tensorflow as tf


@dataclasses.dataclass(frozen=True)
class Neighbours:
    """Which neighbours of each hidden state are its labels: those next to its place, that itself left out.

    Attributes:
      before, after: [n] int32, how many labels before and after, 0 to `window`.
      state_ids: [n] int32; states of the same id are equal. What depends on a state alone is computed once for each id.
      window: int.
    """

    before: tf.Tensor
    after: tf.Tensor
    state_ids: tf.Tensor
    window: int

    def num_labels(self):
        """[n] float32, of each hidden state."""
        return tf.cast(self.before + self.after, tf.float32)

    def examples(self, num_labels):
        """How many examples hold so many labels: each has `window` labels more at either end than hidden states.

        Raises:
          ValueError: if these are not whole examples.
        """
        num_states = self.before.shape[0]
        num_examples, rest = divmod(num_labels - num_states, 2 * self.window)
        if num_examples < 1 or rest or num_states % num_examples:
            raise ValueError(
                "An example must have as many labels as hidden states, and `window` more at either end. Received: "
                f"{num_states} hidden states, {num_labels} labels, window={self.window}. Repeat none, leave none out."
            )
        return num_examples


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
        (offsets >= -before[..., tf.newaxis])
        & (offsets <= after[..., tf.newaxis])
        & tf.not_equal(offsets, 0)
    )
