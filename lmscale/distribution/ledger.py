"""The bytes that collectives move, counted in the graph that runs, as it is traced.

    with ledger.recording() as moved:   # inside strategy.run: of this replica
        ...
    moved.received()                    # {part: bytes of this step}

What is counted is the payload that one device takes in (and gives away) by the algorithms that need least bandwidth,
with N replicas and b bytes of a replica's tensor: an all-gather (N - 1) b, an all-reduce 2 (N - 1) / N b, an all-to-all
what comes from others, the padding that travels included. What a device keeps costs nothing, nor do headers and
the agreement on sizes within TensorFlow. Where replicas share a host's memory, the same bytes are copied, if at all.

Source: Thakur, Rabenseifner and Gropp 2005, "Optimization of Collective Communication Operations in MPICH", section 4
(ring all-gather; pairwise all-to-all); Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters
of workstations" (ring all-reduce).
"""

import contextlib
import dataclasses
import threading
from typing import Any

import tensorflow as tf

# Of what is moved outside of any `part`.
OTHERS = "others"

# Replicas of one process are traced in threads of their own.
_of_thread = threading.local()


@dataclasses.dataclass(frozen=True)
class Movement:
    """One collective as one replica sees it.

    Attributes:
      part: of the step that it belongs to, as `part` named it.
      kind: "all_gather", "all_reduce" or "all_to_all".
      dtype: of what is moved.
      received, sent: bytes; an int where shapes are static, otherwise an int64 scalar tensor.
    """

    part: str
    kind: str
    dtype: tf.DType
    received: Any
    sent: Any


class Ledger:
    """What has been moved while it was recording.

    Attributes:
      movements: list of `Movement`.
    """

    def __init__(self):
        self.movements = []

    def received(self):
        """{part: bytes that this replica receives}, int or int64 scalar tensor."""
        return self._by_part("received")

    def sent(self):
        """{part: bytes that this replica sends}, int or int64 scalar tensor."""
        return self._by_part("sent")

    def _by_part(self, direction):
        sums: dict = {}
        for movement in self.movements:
            sums[movement.part] = sums.get(movement.part, 0) + getattr(movement, direction)
        return sums


@contextlib.contextmanager
def recording():
    """A context that yields a `Ledger` of the collectives of this thread, until it ends."""
    before, _of_thread.ledger = getattr(_of_thread, "ledger", None), Ledger()
    try:
        yield _of_thread.ledger
    finally:
        _of_thread.ledger = before


@contextlib.contextmanager
def part(name):
    """A context whose collectives belong to the part `name` of a step."""
    before, _of_thread.part = getattr(_of_thread, "part", OTHERS), name
    try:
        yield
    finally:
        _of_thread.part = before


def all_gather(x, *, num_replicas):
    """Records that `x` of every replica goes to all; for whoever does it."""
    _record("all_gather", x.dtype, lambda: ((num_replicas - 1) * _bytes(x),) * 2)


def all_reduce(tensors, *, num_replicas):
    """Records that a list of tensors is summed over the replicas; for whoever does it."""
    for x in tensors:
        _record("all_reduce", x.dtype, lambda x=x: (2 * (num_replicas - 1) * _bytes(x) // num_replicas,) * 2)


def all_to_all(dtype, *, row_bytes, rows_received, rows_sent):
    """Records an all-to-all; for whoever does it.

    Args:
      dtype: of the rows.
      row_bytes: int.
      rows_received, rows_sent: () -> number of rows from, and to, other replicas; int or int32 scalar tensor.
    """

    def count():
        return tuple(row_bytes * _number(rows()) for rows in (rows_received, rows_sent))

    _record("all_to_all", dtype, count)


def _record(kind, dtype, count):
    """Adds a movement to the ledger of this thread; without one, counts nothing."""
    ledger = getattr(_of_thread, "ledger", None)
    if ledger is not None:
        received, sent = count()
        part_name = getattr(_of_thread, "part", OTHERS)
        ledger.movements.append(Movement(part_name, kind, tf.as_dtype(dtype), received, sent))


def _bytes(x):
    size = x.shape.num_elements()
    return x.dtype.size * (tf.size(x, out_type=tf.int64) if size is None else size)


def _number(rows):
    return rows if isinstance(rows, int) else tf.cast(rows, tf.int64)
