"""Memory of a host that the messages between processes take: of TensorFlow's collectives, by gRPC.

A piece that is sent is first copied into strings of a page each, then into the message, then into buffers of gRPC's; on
the other side it goes the same way back. The message is given back when it has been dealt with. Strings and buffers are
small: what they have taken stays with the allocator of the C library (`graphs.py`).
"""

import dataclasses

import numpy as np

from lmscale.distribution.all_to_all import size_step

# Copies of a piece that are small, of which the memory stays; and those together with the message.
_KEPT_COPIES, _ALL_COPIES = 2, 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Messages:
    """Pieces that a process sends, and as many that it receives, at once in one collective.

    Attributes:
      piece_bytes: of all that is on its way from the process at one time.
    """

    piece_bytes: int

    @property
    def kept_bytes(self):
        """That stay with the process after the collective."""
        return 2 * _KEPT_COPIES * self.piece_bytes

    @property
    def all_bytes(self):
        """While the collective runs."""
        return 2 * _ALL_COPIES * self.piece_bytes


def padded_rows(longest, *, max_size):
    """Rows of every piece of an all-to-all whose longest has `longest` of at most `max_size`."""
    step = size_step(max_size)
    return -(-longest // step) * step


def longest_piece(ids, shared_ids, placement):
    """Most different ids that one device asks of one shard: ids of a table as in `Step.ids`."""
    return max(
        int(np.bincount(placement.owner(np.union1d(own, shared_ids)), minlength=placement.num_shards).max())
        for own in ids
    )


def of_all_to_all(piece_bytes, *, num_devices):
    """A piece to each other device at once."""
    return Messages(piece_bytes=(num_devices - 1) * piece_bytes)


def of_all_gather(own_bytes, *, num_devices):
    """Around a ring, the values of one device at a time."""
    return Messages(piece_bytes=own_bytes if num_devices > 1 else 0)


def of_all_reduce(num_bytes, *, num_devices):
    """Around a ring, one part of num_devices at a time."""
    return Messages(piece_bytes=num_bytes // num_devices if num_devices > 1 else 0)
