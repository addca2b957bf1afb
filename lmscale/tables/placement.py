"""Which shard holds which row.

Row `id` lives on shard `id % num_shards` at local row `id // num_shards`. Ids are sorted by falling frequency, so the
stride spreads the frequent words, and the traffic for them, evenly; contiguous blocks would send nearly all of it to
shard 0. Every shard is allocated the same number of rows, one of which is scratch: the target of padding writes.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Placement:
    """Rows of a [vocab_size, ...] matrix strided over `num_shards` shards."""

    vocab_size: int
    num_shards: int

    def __post_init__(self):
        if self.vocab_size < 1 or self.num_shards < 1:
            raise ValueError(
                "vocab_size and num_shards must be at least 1. Received: "
                f"vocab_size={self.vocab_size}, num_shards={self.num_shards}."
            )

    @property
    def rows_per_shard(self):
        """Rows that a shard may have to hold: ceil(vocab_size / num_shards)."""
        return -(-self.vocab_size // self.num_shards)

    @property
    def allocated_rows(self):
        """Rows allocated on each shard: rows_per_shard and one scratch row."""
        return self.rows_per_shard + 1

    @property
    def scratch_row(self):
        """Local index of the scratch row, the same on every shard."""
        return self.rows_per_shard

    def num_valid_rows(self, shard_id):
        """Rows of `shard_id` that belong to the vocabulary; the ones behind are padding. Int or tensor, as given."""
        return (self.vocab_size - shard_id + self.num_shards - 1) // self.num_shards

    def owner(self, ids):
        """Shard of each id."""
        return ids % self.num_shards

    def local_row(self, ids):
        """Row of each id on its own shard."""
        return ids // self.num_shards
