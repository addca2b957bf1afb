"""All-to-all of pieces whose sizes depend on data: between the replicas of one process, and between processes.

TensorFlow's strategies have no all-to-all. In one process, replicas hand each other tensors (`merge_call`); between
processes, TensorFlow's collective operation moves them, which wants pieces of one size: they are padded to the longest.
"""

import abc
import functools
import itertools
import weakref

import numpy as np
import tensorflow as tf

from lmscale.distribution import collectives, ledger

# Of TensorFlow's own collectives, strategies number the groups from 1 on.
_GROUP_OF_REPLICAS, _GROUP_OF_PROCESSES = 61_000, 61_001
# A collective of another shape must be another instance. So that there are few, sizes are rounded up to one in so many.
_SIZES = 64
# By strategy: the next number of an all-to-all, for each replica; the processes trace the same, so count alike.
_numbers: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
_host_instances: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


class AllToAll(abc.ABC):
    """A way for pieces, to be gone both ways: of every replica, one to each. In `strategy.run`."""

    @abc.abstractmethod
    def send(self, *columns):
        """Sends a piece to each replica, and receives one from each; of several columns that lie side by side.

        Args:
          columns: each a list of num_replicas tensors [size, ...], the i-th for replica i, of the sizes that were
            announced; all columns of one dtype.

        Returns:
          List of as many columns, of num_replicas tensors each, the i-th from replica i.
        """

    @abc.abstractmethod
    def send_back(self, *columns):
        """Sends a piece to each replica for the one that came from there; arguments and result as of `send`."""


def all_to_all(sizes, *, max_size):
    """Announces the sizes of the pieces that this replica will send.

    Args:
      sizes: [num_replicas] int32 tensor: rows of the piece for each replica.
      max_size: int, what no size is above.

    Returns:
      `AllToAll`.

    Communication: in one process, none. Between processes an all-gather of [num_replicas] int32.
    """
    strategy = tf.distribute.get_strategy()
    if isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return _BetweenProcesses(sizes, max_size=max_size)
    return _InOneProcess()


class _InOneProcess(AllToAll):
    """Communication: each piece goes straight to its replica; a replica's own stays where it is."""

    def send(self, *columns):
        received = [self._send_column(pieces) for pieces in columns]
        ledger.all_to_all(
            columns[0][0].dtype,
            row_bytes=_row_bytes(columns),
            rows_received=lambda: _rows_of_others(received[0]),
            rows_sent=lambda: _rows_of_others(columns[0]),
        )
        return received

    send_back = send

    @staticmethod
    def _send_column(pieces):
        context = tf.distribute.get_replica_context()
        # sent[i][j] is for replica i, from replica j. Identities: one tensor that all replicas pass would arrive
        # unwrapped.
        sent = context.merge_call(
            lambda strategy, *pieces: [strategy.experimental_local_results(piece) for piece in pieces],
            args=[tf.identity(piece) for piece in pieces],
        )
        return list(sent[collectives.replica_id()])


class _BetweenProcesses(AllToAll):
    """Communication: an all-to-all of num_replicas pieces, each as long as the longest of all replicas."""

    def __init__(self, sizes, *, max_size):
        num_replicas = collectives.num_replicas()
        matrix = tf.reshape(collectives.all_gather(sizes), [num_replicas, num_replicas])
        step = size_step(max_size)
        self._sizes_out = tf.unstack(sizes, num=num_replicas)
        self._sizes_in = tf.unstack(matrix[:, collectives.replica_id()], num=num_replicas)
        self._instance = -(-tf.reduce_max(matrix) // step)  # 0 .. _SIZES
        self._padded = self._instance * step

    def send(self, *columns):
        return self._exchange(columns, self._sizes_in)

    def send_back(self, *columns):
        return self._exchange(columns, self._sizes_out)

    def _exchange(self, columns, sizes):
        row_shapes = [pieces[0].shape[1:] for pieces in columns]
        widths = [shape.num_elements() for shape in row_shapes]
        rows = [
            tf.concat([tf.reshape(x, [-1, width]) for x, width in zip(pieces, widths, strict=True)], axis=1)
            for pieces in zip(*columns, strict=True)
        ]
        padded_rows = (len(rows) - 1) * self._padded
        ledger.all_to_all(
            rows[0].dtype,
            row_bytes=_row_bytes(columns),
            rows_received=lambda: padded_rows,
            rows_sent=lambda: padded_rows,
        )
        received = tf.raw_ops.CollectiveAllToAllV2(
            input=collectives.movable(
                tf.stack([tf.pad(x, [[0, self._padded - tf.shape(x)[0]], [0, 0]]) for x in rows])
            ),
            group_size=len(rows),
            group_key=_GROUP_OF_REPLICAS,
            instance_key=_next_number() * (_SIZES + 1) + self._instance,
            ordering_token=[],
            communication_hint="auto",
            timeout_seconds=0.0,
        )
        received = tf.bitcast(received, rows[0].dtype) if rows[0].dtype == tf.bfloat16 else received
        by_replica = [tf.split(received[i, :size], widths, axis=1) for i, size in enumerate(sizes)]
        return [
            [tf.reshape(x, [-1, *shape]) for x in column]
            for column, shape in zip(zip(*by_replica, strict=True), row_shapes, strict=True)
        ]


def size_step(max_size):
    """What the sizes of pieces between processes, none above `max_size`, are rounded up to a multiple of."""
    return -(-max(max_size, 1) // _SIZES)


def _row_bytes(columns):
    """Bytes of a row of all columns together."""
    return sum(pieces[0].shape[1:].num_elements() * pieces[0].dtype.size for pieces in columns)


def _rows_of_others(pieces):
    """Rows of all pieces but this replica's own."""
    own = collectives.replica_id()
    return sum(tf.shape(x)[0] if x.shape[0] is None else x.shape[0] for i, x in enumerate(pieces) if i != own)


def reduce_scatter_sum(x):
    """Sums `x` over the replicas, of which each gets its own part.

    Args:
      x: [num_replicas * n, ...] float tensor of a static shape, the same shape on every replica. It travels as it is.

    Returns:
      [n, ...] float32: rows [replica_id * n, (replica_id + 1) * n) of the sum, whose terms are added in the order of
      the replicas.

    Communication: that of `exchange_equal_parts`: a replica receives (num_replicas - 1) / num_replicas times the bytes
    of `x`, half of what an all-reduce takes.
    """
    return functools.reduce(tf.add, [tf.cast(piece, tf.float32) for piece in exchange_equal_parts(x)])


def exchange_equal_parts(x):
    """Sends part i of `x` to replica i.

    Args:
      x: [num_replicas * n, ...] tensor of a static shape, the same shape on every replica.

    Returns:
      List of num_replicas [n, ...] tensors, the i-th from replica i.

    Communication: an all-to-all of num_replicas pieces [n, ...].
    """
    num_replicas = collectives.num_replicas()
    if num_replicas == 1:
        return [x]
    size = x.shape[0] // num_replicas
    way = all_to_all(tf.fill([num_replicas], size), max_size=size)
    (received,) = way.send(tf.split(x, num_replicas))
    return [tf.ensure_shape(piece, [size, *x.shape[1:]]) for piece in received]


def _next_number():
    counters = _numbers.setdefault(tf.distribute.get_strategy(), {})
    return next(counters.setdefault(collectives.replica_id(), itertools.count(1)))


def gather_on_hosts(strategy, x):
    """The numpy arrays of all processes, in a list; arguments, communication as of `all_to_all_on_hosts`."""
    return all_to_all_on_hosts(strategy, [x] * num_processes(strategy))


def num_processes(strategy):
    """Number of processes of a strategy."""
    if isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return strategy.cluster_resolver.cluster_spec().num_tasks("worker")
    return 1


def all_to_all_on_hosts(strategy, pieces):
    """Sends a numpy array to each process, and receives one from each. Outside `strategy.run`, in every process.

    Args:
      strategy: `tf.distribute.Strategy`.
      pieces: list of num_processes arrays, the i-th for process i; all of all processes have one shape and dtype.

    Returns:
      List of num_processes arrays, the i-th from process i.

    Communication: an all-to-all of the pieces between the hosts.
    """
    if len(pieces) == 1:
        return pieces
    shape, dtype = pieces[0].shape, pieces[0].dtype
    size = pieces[0].nbytes
    words = np.zeros([len(pieces), -(-size // 4)], np.int32)  # Of any dtype: the collective knows few.
    for row, piece in zip(words, pieces, strict=True):
        row.view(np.uint8)[:size] = np.ascontiguousarray(piece).reshape(-1).view(np.uint8)
    instances = _host_instances.setdefault(strategy, {})
    with tf.device(strategy.extended.worker_devices[0]), tf.device("CPU:0"):
        received = tf.raw_ops.CollectiveAllToAllV2(
            input=words,
            group_size=len(pieces),
            group_key=_GROUP_OF_PROCESSES,
            instance_key=instances.setdefault(words.shape, len(instances) + 1),
            ordering_token=[],
            communication_hint="auto",
            timeout_seconds=0.0,
        ).numpy()
    return [row.view(np.uint8)[:size].view(dtype).reshape(shape) for row in received]
