"""The processes of one run: they agree on small things, and notice when one of them is lost.

TensorFlow's collectives move the tensors. What they cannot do is here: name the process that died, stop where one is
silent, agree on what is no tensor. `rendezvous.py` makes a group before TensorFlow starts. Each process has one TCP
connection to the chief, which lasts as long as the run. What goes over it is not encrypted, nor is what TensorFlow
sends: run on a network that you trust.
"""

import collections
import contextlib
import json
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lmscale.distribution.clusters.description import Cluster

EXIT_LOST = 69
_PRINT_SECS = 2.0


class LostProcessError(OSError):
    """Another process of the run did not come, or cannot be reached."""

    exit_code = EXIT_LOST


class ProcessGroup:
    """This process among all processes of a run. Of one process, every method returns at once.

    `gather`, and what is built on it, must be called by every process, in the same order. If another process is lost,
    this one ends, whatever it is doing: it may be waiting in a collective for ever.

    Attributes:
      cluster: `Cluster`, as it was found.
      rank: number of this process; 0 is the chief, which alone writes what a run has once.
      size: number of processes.
      addresses: HOST:PORT of each, where its TensorFlow listens; empty for one process.
    """

    def __init__(
        self,
        *,
        cluster: Cluster | None = None,
        addresses: Sequence[str] = (),
        connections: Mapping[int, "Connection"] | None = None,
        silence_secs: float = 20.0,
        start_silence_secs: float | None = None,
        end: Callable[[int], Any] | None = None,
    ):
        """Args:
        cluster, addresses: as the attributes; without them, one process.
        connections: {rank: `Connection`}: the chief's to all others, another one's to the chief.
        silence_secs: how long nothing may be heard of a process.
        start_silence_secs: the same until `has_started`, if that is longer: importing TensorFlow from a slow disk holds
          a process up, its threads too.
        end: function of an exit code that ends this process at once.
        """
        self.cluster = cluster or Cluster(
            size=1, rank=0, hosts=None, addresses=None, local_rank=0, local_size=1, source="none"
        )
        self.rank = self.cluster.rank
        self.addresses = tuple(addresses)
        self.size = max(1, len(self.addresses))
        self._connections = dict(connections or {})
        self._silence_secs = silence_secs
        self._start_silence_secs = max(start_silence_secs or 0.0, silence_secs)
        self._num_answered = 0
        self._end = end or _end_at_once
        self._news = threading.Condition()
        # What the chief has been given, by number and rank.
        self._given: dict[int, dict[int, Any]] = collections.defaultdict(dict)
        self._answers: dict[int, list] = {}
        self._num_gathered = 0
        self._left: set[int] = set()
        self._is_over = False
        self._is_being_ended = False  # By the watch.
        self._end_returned = threading.Event()  # Only an `end` of a test does.
        if self._connections:
            threading.Thread(target=self._watch, name="process_group", daemon=True).start()

    @property
    def is_chief(self) -> bool:
        return self.rank == 0

    @property
    def has_started(self) -> bool:
        """Whether all processes have agreed on something since they met, which is the first thing they agree on."""
        return self._num_answered > 1

    def name(self, rank: int) -> str:
        """What messages call a process: `process 1 of 4 (node3:61440)`."""
        return f"process {rank} of {self.size} ({self.addresses[rank]})" if self.addresses else "this process"

    # -- to agree ----------------------------------------------------------------------------------------------------

    def gather(self, value=None) -> list:
        """The values of all processes, by rank, at each of them; without a value, a barrier.

        Args:
          value: anything JSON holds; NaN and infinity too.
        """
        if self.size == 1:
            return [value]
        number = self._num_gathered
        self._num_gathered += 1
        if not self.is_chief:
            for connection in list(self._connections.values()):  # The chief's, unless it has left.
                connection.send({"number": number, "value": value})
            self._wait_for(lambda: () if number in self._answers else (0,))
            self._num_answered += 1
            return self._answers.pop(number)
        with self._news:
            self._given[number][0] = value
        self._wait_for(lambda: [rank for rank in range(self.size) if rank not in self._given[number]])
        self._num_answered += 1
        given = self._given.pop(number)
        answer = [given[rank] for rank in range(self.size)]
        for connection in list(self._connections.values()):
            connection.send({"number": number, "answer": answer})
        return answer

    def of_chief(self, value=None):
        """The chief's value, at every process."""
        return self.gather(value if self.is_chief else None)[0]

    def check_same(self, what: str, value) -> None:
        """Raises ValueError, at every process, unless all gave the same value.

        Args:
          what: what the message calls it.
          value: anything JSON holds. Of texts with many lines, the message shows the first lines that differ.
        """
        values = self.gather(value)
        for rank, other in enumerate(values):
            if other != values[0]:
                mine, theirs = _difference(values[0], other)
                raise ValueError(
                    f"{what} must be the same in every process of a run. Received: {mine} in {self.name(0)}, {theirs} "
                    f"in {self.name(rank)}. Start every process from the same files, with the same command."
                )

    def _wait_for(self, awaited):
        """Waits until awaited() is empty: the ranks of processes that have not said what this one needs."""
        with self._news:
            while ranks := awaited():
                for rank in self._left.intersection(ranks):
                    raise LostProcessError(
                        f"{self.name(rank)} has ended as if all was done, while this process waits for it."
                    )
                self._news.wait()

    # -- to end ------------------------------------------------------------------------------------------------------

    def leave(self) -> None:
        """Ends the group in good order: others go on without this process, which is done."""
        self._say_last({"left": self.rank})

    def fail(self, how: str, *, code: int) -> None:
        """Tells the others that this process ends, and with which exit code: they end with it too.

        If this process is just being ended because of another one, it is, with that one's message alone.

        Args:
          how: goes on after the name of this process: "failed: no space left on the device".
        """
        self._say_last({"ended": self.rank, "how": how, "code": code})
        if self._is_being_ended:
            self._end_returned.wait()

    def wait_for_verdict(self) -> None:
        """Gives the watch the time to end this process because of another one: an error of a collective says less."""
        if self._connections:
            time.sleep(1.2 * self._silence_secs)

    def _say_last(self, message):
        with self._news:
            if self._is_over:
                return
            self._is_over = True
        for connection in list(self._connections.values()):
            connection.send(message)

    # -- the thread that listens -------------------------------------------------------------------------------------

    def _watch(self):
        selector = selectors.DefaultSelector()
        for rank, connection in list(self._connections.items()):
            connection.last_heard = time.monotonic()
            selector.register(connection.socket, selectors.EVENT_READ, (rank, connection))
            for message in connection.unread:
                self._take(rank, message)
        beat_secs = self._silence_secs / 10
        next_beat = 0.0
        last_round = time.monotonic()
        while self._connections:
            now = time.monotonic()
            limit_secs = self._silence_secs if self.has_started else self._start_silence_secs
            if now - last_round > self._silence_secs / 2:
                # This process itself was stopped (Ctrl-Z, a machine that sleeps): others may have been, with it.
                for connection in list(self._connections.values()):
                    connection.last_heard = now
            last_round = now
            if now >= next_beat:
                next_beat = now + beat_secs
                for connection in list(self._connections.values()):
                    connection.send({})
            for key, _ in selector.select(timeout=beat_secs / 2):
                rank, connection = key.data
                try:
                    for message in connection.receive():
                        self._take(rank, message)
                except (ValueError, KeyError) as error:  # This thread must go on, or nobody watches.
                    self._over(rank, f"has sent what is no message ({error})")
                    connection.is_closed = True
                if connection.is_closed:
                    selector.unregister(connection.socket)
                    if rank in self._connections:
                        self._over(rank, "has gone without a word: killed, or its machine is lost")
            for rank, connection in list(self._connections.items()):
                silence = now - connection.last_heard
                if silence > limit_secs:
                    self._over(
                        rank, f"has not been heard of for {silence:.0f} s: stopped, or its machine is lost"
                    )

    def _take(self, rank, message):
        if "left" in message:
            with self._news:
                del self._connections[rank]
                self._left.add(rank)
                self._news.notify_all()
        elif "ended" in message:
            self._over(message["ended"], message["how"], code=message["code"])
        elif "number" in message:
            with self._news:
                if "answer" in message:
                    self._answers[message["number"]] = message["answer"]
                else:
                    self._given[message["number"]][rank] = message["value"]
                self._news.notify_all()

    def _over(self, rank, how, *, code=EXIT_LOST):
        """Ends this process because of another one, and has the chief tell all others."""
        with self._news:
            if self._is_over:  # This process has said itself why it ends.
                return
            self._is_over = True
            self._is_being_ended = True
        for other, connection in list(self._connections.items()):
            if other != rank:
                connection.send({"ended": rank, "how": how, "code": code})
        advice = (
            " Run the same command again: it goes on from the last checkpoint." if code == EXIT_LOST else ""
        )
        _print_in_time(f"error: {self.name(rank)} {how.rstrip('.')}.{advice}\n")
        self._end(code)
        self._end_returned.set()


class Connection:
    """One TCP connection, of messages in JSON, a line each."""

    def __init__(self, connected: socket.socket):
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connected.settimeout(10.0)
        self.socket = connected
        self.last_heard = time.monotonic()
        self.is_closed = False
        self.unread: list[dict] = []  # What has arrived with an earlier message.
        self._sending = threading.Lock()
        self._received = b""

    def send(self, message: dict) -> None:
        """Sends a message; whether the other end is there to take it, `receive` tells."""
        with self._sending, contextlib.suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict]:
        """The messages that have arrived whole; waits for something to arrive.

        Raises:
          ValueError: if what arrives is no message.
        """
        try:
            data = self.socket.recv(2**16)
        except OSError:
            data = b""
        self.is_closed = not data
        self.last_heard = time.monotonic()
        *lines, self._received = (self._received + data).split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
        except RecursionError as error:
            raise ValueError("a message must not be nested so deeply") from error
        if not all(isinstance(message, dict) for message in messages):
            raise ValueError("a message must be a JSON object")
        return messages

    @property
    def num_unfinished(self) -> int:
        """Bytes of a message that has arrived in part."""
        return len(self._received)


def _difference(first, second):
    """Two values that differ, as a message shows them: of texts, their first lines that differ."""
    if isinstance(first, str) and isinstance(second, str):
        pairs = zip([*first.splitlines(), "(nothing)"], [*second.splitlines(), "(nothing)"], strict=False)
        return next(((a, b) for a, b in pairs if a != b), (first, second))
    return first, second


def _print_in_time(text):
    """Prints to stderr, and flushes stdout, unless nobody reads them: a terminal that stands still must not hold us."""

    def write(stream, text):
        with contextlib.suppress(OSError, ValueError):
            stream.write(text)
            stream.flush()

    arguments = ((sys.stderr, text), (sys.stdout, ""))
    threads = [threading.Thread(target=write, args=each, daemon=True) for each in arguments]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + _PRINT_SECS
    for thread in threads:
        thread.join(max(deadline - time.monotonic(), 0))


def _end_at_once(code):
    """Without what Python does at its end, which waits for threads: they may hang in a collective."""
    _print_in_time("\033[?25h" if sys.stderr.isatty() else "")  # The cursor that a progress bar hides.
    os._exit(code)
