"""Processes of a run that are threads here: connected over loopback, without TensorFlow."""

import concurrent.futures
import contextlib
import socket
import threading

from lmscale.distribution.clusters.description import Cluster
from lmscale.distribution.process_group import Connection, ProcessGroup

DEADLINE_SECS = 60  # Of a test that hangs. Nothing here takes a second.


def cluster(size, rank, *, addresses=None, coordinator=None):
    return Cluster(
        size=size,
        rank=rank,
        hosts=None,
        addresses=addresses,
        local_rank=None,
        local_size=None,
        source="flags",
        coordinator=coordinator,
    )


def free_ports(count, *, host="127.0.0.1"):
    """Ports that nobody listens at just now."""
    with contextlib.ExitStack() as stack:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        sockets = [stack.enter_context(socket.socket(family)) for _ in range(count)]
        for each in sockets:
            each.bind((host, 0))
        return [each.getsockname()[1] for each in sockets]


def connected_pair():
    """Both ends of a TCP connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        far, _ = server.accept()
    return near, far


class Members:
    """The groups of all processes of a run, with what the watch of each has ended it with.

    Attributes:
      groups: `ProcessGroup` by rank.
      sockets: {rank: (the chief's end, its own)} of the connections.
      codes: {rank: exit code} of those that have been ended.
    """

    def __init__(self, size, *, silence_secs=20.0, start_silence_secs=None, start=None):
        """`start`: ranks that have a group; of the others, only the ends of the connections are there."""
        self.sockets = {rank: connected_pair() for rank in range(1, size)}
        self.codes = {}
        self._news = threading.Condition()
        connections = {0: {rank: Connection(ends[0]) for rank, ends in self.sockets.items()}}
        connections |= {rank: {0: Connection(ends[1])} for rank, ends in self.sockets.items()}
        addresses = [f"host{rank}:{7000 + rank}" for rank in range(size)]
        self.groups = {
            rank: ProcessGroup(
                cluster=cluster(size, rank, addresses=tuple(addresses)),
                addresses=addresses,
                connections=connections[rank],
                silence_secs=silence_secs,
                start_silence_secs=start_silence_secs,
                end=lambda code, rank=rank: self._note(rank, code),
            )
            for rank in (range(size) if start is None else start)
        }

    def _note(self, rank, code):
        with self._news:
            self.codes[rank] = code
            self._news.notify_all()

    def wait_for_ends(self, count):
        """{rank: exit code}, when so many have been ended."""
        with self._news:
            assert self._news.wait_for(lambda: len(self.codes) >= count, DEADLINE_SECS), self.codes
        return dict(self.codes)

    def close(self):
        for group in self.groups.values():
            group.leave()
        for ends in self.sockets.values():
            for end in ends:
                end.close()


def at_once(functions):
    """What each function returns or raises, called in a thread of its own, all at the same time."""
    pool = concurrent.futures.ThreadPoolExecutor(len(functions))
    futures = [pool.submit(function) for function in functions]
    done, running = concurrent.futures.wait(futures, timeout=DEADLINE_SECS)
    pool.shutdown(wait=False)
    assert not running, f"{len(running)} of {len(functions)} hang; others: {[f.exception() for f in done]}"
    return [future.exception() or future.result() for future in futures]
