"""Products of each hidden state with the rows of its neighbours, as small dense matrix products along the diagonal.

Hidden states and rows come in examples: `chunk` states, and the chunk's rows with `window` more at either end. State i
is compared with rows i - window .. i + window of its example (counted from the chunk's start), a band of the matrix of
all states by all rows. The band is cut into tiles: `TILE` states by the TILE + 2 * window rows that they reach. A tile
computes TILE columns more than the band has, in one product that is fast; the mask takes them out.
"""

import dataclasses

import tensorflow as tf

from lmscale.softmax.products import float32_product

# States of a tile: fewer compute less that is masked out, more make faster products.
TILE = 32


@dataclasses.dataclass(frozen=True)
class Reach:
    """Which neighbours of each hidden state are its labels: those next to it, itself left out.

    Attributes:
      before, after: [n] int32, how many labels before and after, 0 to `window`.
      window: int.
    """

    before: tf.Tensor
    after: tf.Tensor
    window: int

    def num_labels(self):
        """[n] int32, of each hidden state."""
        return self.before + self.after


@dataclasses.dataclass(frozen=True)
class Band:
    """The shape of a band, and its mask.

    Attributes:
      num_examples, chunk, window: ints; the last state of an example is followed by padding up to whole tiles.
      mask: [num_examples, tiles, TILE, TILE + 2 * window] bool: where a row is a label of the state.
    """

    num_examples: int
    chunk: int
    window: int
    mask: tf.Tensor

    @classmethod
    def of(cls, reach, *, num_labels):
        """The band of `Reach` over [n] hidden states, and of `num_labels` rows.

        Raises:
          ValueError: if these are not whole examples.
        """
        num_states, halo = reach.before.shape[0], 2 * reach.window
        num_examples, rest = divmod(num_labels - num_states, halo)
        if num_examples < 1 or rest or num_states % num_examples:
            raise ValueError(
                "An example must have as many labels as hidden states, and `window` more at either end. Received: "
                f"{num_states} hidden states, {num_labels} labels, window={reach.window}. Repeat none, leave none out."
            )
        band = cls(num_examples, num_states // num_examples, reach.window, mask=None)
        before, after = (band._padded(x)[..., tf.newaxis] for x in (reach.before, reach.after))
        offsets = tf.range(TILE + halo) - tf.range(TILE)[:, tf.newaxis] - reach.window
        mask = (offsets >= -before) & (offsets <= after) & tf.not_equal(offsets, 0)
        return dataclasses.replace(band, mask=mask)

    @property
    def num_tiles(self):
        """Tiles of an example."""
        return -(-self.chunk // TILE)

    def _padded(self, x):
        """[n, ...] of states to [num_examples, tiles, TILE, ...]."""
        rest = x.shape[1:]
        x = tf.reshape(x, [self.num_examples, self.chunk, *rest])
        padding = self.num_tiles * TILE - self.chunk
        if padding:
            x = tf.pad(x, [[0, 0], [0, padding]] + [[0, 0]] * len(rest))
        return tf.reshape(x, [self.num_examples, self.num_tiles, TILE, *rest])

    def tiles_of_states(self, hidden):
        """[n, dim] to [num_examples * tiles, TILE, dim]."""
        return tf.reshape(self._padded(hidden), [-1, TILE, hidden.shape[-1]])

    def states_of_tiles(self, tiles):
        """The inverse of `tiles_of_states`, of any width."""
        width = tiles.shape[-1]
        x = tf.reshape(tiles, [self.num_examples, self.num_tiles * TILE, width])
        return tf.reshape(x[:, : self.chunk], [-1, width])

    def tiles_of_rows(self, rows):
        """[labels, dim] to [num_examples * tiles, TILE + 2 * window, dim]: the rows at the ends of tiles are in both."""
        dim, halo = rows.shape[-1], 2 * self.window
        x = tf.reshape(rows, [self.num_examples, self.chunk + halo, dim])
        x = tf.gather(x, self._places(), axis=1)
        return tf.reshape(x, [-1, TILE + halo, dim])

    def _places(self):
        """[tiles, TILE + 2 * window]: the row of an example at each place of its tiles; the last one for padding."""
        width = TILE + 2 * self.window
        places = [[tile * TILE + i for i in range(width)] for tile in range(self.num_tiles)]
        return tf.minimum(tf.constant(places), self.chunk + 2 * self.window - 1)

    def rows_of_tiles(self, tiles):
        """The transpose of `tiles_of_rows`: [num_examples * tiles, TILE + 2 * window, dim] summed to [labels, dim]."""
        dim, halo = tiles.shape[-1], 2 * self.window
        x = tf.reshape(tiles, [self.num_examples, self.num_tiles, TILE + halo, dim])
        # Shares of a width of TILE: the first starts at the tile's own place, the next ones a tile further each.
        parts = -(-(TILE + halo) // TILE)
        x = tf.pad(x, [[0, 0], [0, 0], [0, parts * TILE - TILE - halo], [0, 0]])
        x = tf.reshape(x, [self.num_examples, self.num_tiles, parts, TILE, dim])
        total = tf.add_n(
            [
                tf.pad(x[:, :, part], [[0, 0], [part, parts - 1 - part], [0, 0], [0, 0]])
                for part in range(parts)
            ]
        )
        total = tf.reshape(total, [self.num_examples, (self.num_tiles + parts - 1) * TILE, dim])
        return tf.reshape(total[:, : self.chunk + halo], [-1, dim])
