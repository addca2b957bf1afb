"""How the processes of a run find each other before TensorFlow starts, or say in time that one did not come.

TensorFlow waits for ever for a process that never starts, and does not name what it cannot reach. So the processes
meet first, on the very addresses that TensorFlow will listen at: each joins the chief, is told all addresses, and
tries to reach every one of them. The connections to the chief stay, as the run's `ProcessGroup`.
"""

import contextlib
import queue
import socket
import threading
import time
import traceback
from collections.abc import Iterator

from lmscale import __version__
from lmscale.distribution.clusters.addresses import join_address, split_address
from lmscale.distribution.clusters.description import Cluster
from lmscale.distribution.process_group import Connection, LostProcessError, ProcessGroup
from lmscale.user_errors import user_message

_RETRY_SECS = 0.3
_GREETING_SECS = 5.0
_GREETING_BYTES = 2**22
_EXIT_BUG, _EXIT_USAGE, _EXIT_INTERRUPTED = 1, 2, 130
_LOST_CONNECTION = (
    "TensorFlow must reach every process of the run all the time. Run the same command again: it goes on from the "
    "last checkpoint."
)
_MOST_LISTED = 8  # Of processes that have not come.


class _RefusedError(ValueError):
    """The chief does not take this process; `exit_code` is the chief's own."""

    def __init__(self, message, *, exit_code):
        super().__init__(message)
        self.exit_code = exit_code


@contextlib.contextmanager
def joined(
    cluster: Cluster, *, start_timeout_secs: float = 300.0, silence_secs: float = 20.0
) -> Iterator[ProcessGroup]:
    """A context in which this process is one of its run's; the others are told how it ends.

    Args:
      cluster: `Cluster`.
      start_timeout_secs: how long to wait for all processes to come; and how long nothing may be heard of one until
        all have agreed on something.
      silence_secs: how long nothing may be heard of a process, later.

    Yields:
      `ProcessGroup`.

    Raises:
      LostProcessError: if a process did not come in time, or cannot be reached: it is named.
      ValueError: if a process is not of this run, or the port of this one is taken.
    """
    cluster.check_reachable()
    if cluster.size == 1:
        yield ProcessGroup(cluster=cluster)
        return
    group = _join(cluster, start_timeout_secs=start_timeout_secs, silence_secs=silence_secs)
    try:
        yield group
    except BaseException as error:
        if _is_of_a_collective(error):
            group.wait_for_verdict()
            # No process is lost for good: a machine was paused, or what connects them was down for a while.
            lost = LostProcessError(f"{_LOST_CONNECTION} Received: {str(error).splitlines()[0]}.")
            how, code = _last_words(lost)
            group.fail(how, code=code)
            raise lost from error
        if not isinstance(error, (SystemExit, KeyboardInterrupt)) and user_message(error) is None:
            group.wait_for_verdict()
        how, code = _last_words(error)
        group.fail(how, code=code)
        raise
    group.leave()


def _is_of_a_collective(error):
    """Whether TensorFlow, which may not be imported, says that it has lost another process."""
    return type(error).__name__ in (
        "AbortedError",
        "CancelledError",
        "DeadlineExceededError",
        "UnavailableError",
    )


def _last_words(error):
    """(how this process ended, its exit code)."""
    if isinstance(error, KeyboardInterrupt):
        return "was interrupted", _EXIT_INTERRUPTED
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        return f"was asked to end, with exit code {code}", code
    message = user_message(error)
    if message is not None:
        return f"failed: {message}", getattr(error, "exit_code", _EXIT_USAGE)
    return f"failed:\n{''.join(traceback.format_exception(error))}", _EXIT_BUG


def _join(cluster, *, start_timeout_secs, silence_secs):
    deadline = time.monotonic() + start_timeout_secs
    address = cluster.addresses[cluster.rank] if cluster.addresses else None
    if cluster.rank == 0:
        address = address or cluster.coordinator
    with contextlib.closing(_Door(address, rank=cluster.rank)) as door:
        meet = _gather_processes if cluster.rank == 0 else _join_chief
        addresses, connections = meet(cluster, door, deadline=deadline)
        group = ProcessGroup(
            cluster=cluster,
            addresses=addresses,
            connections=connections,
            silence_secs=silence_secs,
            start_silence_secs=start_timeout_secs,
        )
        unreachable = [
            problem
            for rank in range(cluster.size)
            if rank != cluster.rank
            and (problem := _unreachable(group.name(rank), addresses[rank], rank, deadline=deadline))
        ]
        found = group.gather({"unreachable": unreachable, "silence_secs": silence_secs})
        problems = [(rank, told["unreachable"][0]) for rank, told in enumerate(found) if told["unreachable"]]
    if problems:
        # All say the same, so no one needs to be told.
        group.leave()
        rank, problem = problems[0]
        raise LostProcessError(
            f"Every process must reach every other one. Received: {group.name(rank)} cannot reach {problem}. See to "
            "the name, the port, and what filters traffic between them."
        )
    for rank, told in enumerate(found):
        if told["silence_secs"] != found[0]["silence_secs"]:
            group.leave()
            raise ValueError(
                f"--silence_secs must be the same in every process of a run. Received: {found[0]['silence_secs']:g} in "
                f"{group.name(0)}, {told['silence_secs']:g} in {group.name(rank)}. Start every process with the same "
                "command."
            )
    return group


class _Door:
    """Listens at this process's address: to those that want to join, and to those that try whether it is there."""

    def __init__(self, address, *, rank):
        port = split_address(address, name="The address of this process")[1] if address else 0
        try:
            dual = socket.has_dualstack_ipv6()
            self._socket = socket.create_server(
                ("", port),
                family=socket.AF_INET6 if dual else socket.AF_INET,
                dualstack_ipv6=dual,
                backlog=128,
            )
        except OSError as error:
            raise ValueError(
                f"Process {rank} must be able to listen at port {port}. Received: {error.strerror}. End what uses "
                "it, or choose other ports."
            ) from error
        self.port = self._socket.getsockname()[1]
        self.applicants: queue.SimpleQueue = queue.SimpleQueue()  # (what it says, `Connection`)
        self._rank = rank
        threading.Thread(target=self._answer, name="door", daemon=True).start()

    def close(self):
        # Wakes the thread, which a close alone would leave in accept.
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _answer(self):
        while True:
            try:
                accepted, _ = self._socket.accept()
            except OSError:
                return
            # Each for itself: one that says nothing must not keep others waiting.
            threading.Thread(target=self._admit, args=(accepted,), name="admission", daemon=True).start()

    def _admit(self, accepted):
        try:
            connection = Connection(accepted)
        except OSError:  # It has gone again.
            return
        greeting = _greeting(connection)
        if greeting is not None and _is_application(greeting):
            self.applicants.put((greeting, connection))
            return
        if greeting is not None and "probe" in greeting:
            connection.send({"lmscale": __version__, "rank": self._rank})
        accepted.close()  # Else not one of ours: a port scanner, a health check.


def _is_application(greeting):
    kinds = {"lmscale": str, "rank": int, "size": int, "port": int}
    return all(type(greeting.get(name)) is kind for name, kind in kinds.items())


def _gather_processes(cluster, door, *, deadline):
    """The chief's part: (addresses of all, {rank: `Connection`})."""
    connections: dict[int, Connection] = {}
    try:
        return _gather_into(connections, cluster, door, deadline=deadline)
    except (KeyboardInterrupt, SystemExit) as error:
        how, code = _last_words(error)
        _refuse(connections.values(), f"it {how}", code=code)
        raise


def _gather_into(connections, cluster, door, *, deadline):
    addresses = {0: cluster.addresses[0] if cluster.addresses else cluster.coordinator}
    while len(connections) < cluster.size - 1:
        try:
            greeting, connection = door.applicants.get(timeout=max(deadline - time.monotonic(), 0))
        except queue.Empty:
            missing = [rank for rank in range(1, cluster.size) if rank not in connections]
            where = [
                f"{r} ({cluster.addresses[r]})" if cluster.addresses else str(r)
                for r in missing[:_MOST_LISTED]
            ]
            if len(missing) > _MOST_LISTED:
                where.append(f"and {len(missing) - _MOST_LISTED} others")
            problem = (
                f"All {cluster.size} processes of the run must join the chief at {addresses[0]} in time. Received: "
                f"nothing of process {', '.join(where)}. See whether it has started, and what it says"
            )
            _refuse(connections.values(), problem, code=LostProcessError.exit_code)
            raise LostProcessError(f"{problem}.") from None
        rank, host = greeting["rank"], connection.socket.getpeername()[0].removeprefix("::ffff:")
        address = cluster.addresses[rank] if cluster.addresses else None
        problem = None
        if greeting["lmscale"] != __version__:
            problem = (
                f"every process must run the same version of lmscale. Received: {__version__} in process 0 "
                f"({addresses[0]}), {greeting['lmscale']} in process {rank} ({host})"
            )
        elif greeting["size"] != cluster.size or not 0 < rank < cluster.size:
            problem = (
                f"every process must be told the same number of processes. Received: {cluster.size} in process 0 "
                f"({addresses[0]}), process {rank} of {greeting['size']} at {host}"
            )
        elif rank in connections and _is_open(connections[rank]):  # If not, it was started again.
            problem = (
                f"every process must have a number of its own. Received: process {rank} twice, from "
                f"{connections[rank].socket.getpeername()[0].removeprefix('::ffff:')} and {host}"
            )
        if problem:
            _refuse([connection, *connections.values()], problem, code=_EXIT_USAGE)
            raise ValueError(f"{problem[0].upper()}{problem[1:]}. Start all processes of one run alike.")
        connections[rank] = connection
        addresses[rank] = address or join_address(host, greeting["port"])
    ordered = [addresses[rank] for rank in range(cluster.size)]
    for connection in connections.values():
        connection.send({"addresses": ordered})
    return ordered, connections


def _is_open(connection):
    """Whether the other end of a connection, which says nothing now, is still there."""
    connection.socket.setblocking(False)
    try:
        return connection.socket.recv(1, socket.MSG_PEEK) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        connection.socket.settimeout(_GREETING_SECS)


def _refuse(connections, problem, *, code):
    for connection in connections:
        connection.send({"refused": problem, "code": code})


def _join_chief(cluster, door, *, deadline):
    """Another process's part: (addresses of all, {0: `Connection`})."""
    address = cluster.addresses[0] if cluster.addresses else cluster.coordinator
    connected, problem = _connect(address, deadline=deadline)
    if connected is None:
        raise LostProcessError(
            f"Process {cluster.rank} of {cluster.size} must reach the chief, process 0, at {address} in time. "
            f"Received: {problem}. See whether the chief has started, and to the name and the port."
        )
    connection = Connection(connected)
    connection.send({"lmscale": __version__, "rank": cluster.rank, "size": cluster.size, "port": door.port})
    answer = _greeting(connection, secs=max(deadline - time.monotonic(), 0) + _GREETING_SECS)
    if answer is None:
        raise LostProcessError(
            f"The chief of the run must answer at {address}. Received: nothing that it would say, or no answer in "
            "time. See whether the chief's log tells of an error, and whether the port is that of another program."
        )
    if "refused" in answer:
        message = f"The chief at {address} has refused this process: {answer['refused']}."
        if answer["code"] == LostProcessError.exit_code:
            raise LostProcessError(message)
        raise _RefusedError(message, exit_code=answer["code"])
    return answer["addresses"], {0: connection}


def _unreachable(name, address, rank, *, deadline):
    """None, or what is wrong with the address of a process."""
    connected, problem = _connect(address, deadline=deadline)
    if connected is None:
        return f"{name}: {problem}"
    with connected:
        connection = Connection(connected)
        connection.send({"lmscale": __version__, "probe": True})
        answer = _greeting(connection)
    if answer is None or answer.get("rank") != rank:
        return f"{name}: another program, or another process, answers there"
    return None


def _connect(address, *, deadline):
    """(socket, None), or (None, what is wrong), after trying until the deadline."""
    host, port = split_address(address, name="The address of a process")
    while True:
        try:
            return socket.create_connection((host, port), timeout=_GREETING_SECS), None
        except socket.gaierror as error:
            problem = f"the name {host} does not resolve ({error.strerror})"
        except UnicodeError:  # Of a label that is empty, or too long.
            return None, f"{host!r} cannot be the name of a host"
        except OSError as error:
            problem = f"no connection ({error.strerror or error})"
        if time.monotonic() + _RETRY_SECS > deadline:
            return None, problem
        time.sleep(_RETRY_SECS)


def _greeting(connection, *, secs=_GREETING_SECS):
    """The first message of a process of lmscale; None if none comes in time, or something else."""
    deadline = time.monotonic() + secs
    try:
        while not connection.is_closed and connection.num_unfinished < _GREETING_BYTES:
            connection.socket.settimeout(max(deadline - time.monotonic(), 0.01))
            if messages := connection.receive():
                connection.socket.settimeout(_GREETING_SECS)
                connection.unread = messages[1:]
                return messages[0]
    except ValueError:
        pass
    return None
