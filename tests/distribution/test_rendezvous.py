"""How processes meet, whoever else knocks, and what they say of one that does not come: threads, no TensorFlow."""

import contextlib
import http.client
import json
import socket
import threading
import time

import pytest
from small_groups import at_once, cluster, free_ports

from lmscale import __version__
from lmscale.distribution.process_group import LostProcessError, ProcessGroup
from lmscale.distribution.rendezvous import joined


def meeting(clusters, *, secs=30.0, silence_secs=20.0, then=lambda group: group.addresses):
    """What then(group) returns in each process, or what its start raises."""

    def take_part(each):
        with joined(each, start_timeout_secs=secs, silence_secs=silence_secs) as group:
            value = then(group)
            group.gather()
            return value

    return at_once([lambda each=each: take_part(each) for each in clusters])


def with_coordinator(size, coordinator):
    return [cluster(size, rank, coordinator=coordinator) for rank in range(size)]


def connected(port):
    """A connection to a door, as soon as it is there."""
    deadline = time.monotonic() + 20
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=20)
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def knock(port, message):
    """Says something to a door, and returns what it answers."""
    with connected(port) as connection:
        connection.sendall(message)
        answer = b""
        while b"\n" not in answer and (data := connection.recv(2**16)):
            answer += data
        return answer


def greeting(**changes):
    message = {"lmscale": __version__, "rank": 1, "size": 2, "port": 4711} | changes
    return json.dumps(message).encode() + b"\n"


# ----------------------------------------------------------------------------------------------------- They meet


@pytest.mark.parametrize("size", [2, 5])
def test_all_learn_the_same_addresses_from_the_coordinator(size):
    (port,) = free_ports(1)
    results = meeting(with_coordinator(size, f"127.0.0.1:{port}"))
    assert results == [results[0]] * size
    hosts, ports = zip(*(address.split(":") for address in results[0]), strict=True)
    assert hosts == ("127.0.0.1",) * size
    assert ports[0] == str(port)
    assert len(set(ports)) == size


def test_given_addresses_are_kept():
    addresses = tuple(f"localhost:{port}" for port in free_ports(3))
    clusters = [cluster(3, rank, addresses=addresses) for rank in range(3)]
    assert meeting(clusters) == [addresses] * 3


def test_addresses_of_ipv6():
    try:
        (port,) = free_ports(1, host="::1")
    except OSError:
        pytest.skip("no IPv6 here")
    results = meeting(with_coordinator(3, f"[::1]:{port}"))
    assert results[0] == results[1] == results[2]
    assert results[0][0] == f"[::1]:{port}"
    assert all(address.startswith("[::1]:") for address in results[0])


def test_the_chief_may_be_the_last():
    (port,) = free_ports(1)
    chief, *others = with_coordinator(3, f"127.0.0.1:{port}")

    def late():
        time.sleep(1.0)
        with joined(chief, start_timeout_secs=30) as group:
            return group.gather("chief")

    def early(each):
        with joined(each, start_timeout_secs=30) as group:
            return group.gather(each.rank)

    assert at_once([late, *(lambda each=each: early(each) for each in others)]) == [["chief", 1, 2]] * 3


def test_ports_are_free_for_tensorflow_once_all_have_met():
    def listen(group):
        port = int(group.addresses[group.rank].rpartition(":")[2])
        with socket.create_server(("", port)):
            group.gather()
            return port

    (port,) = free_ports(1)
    ports = meeting(with_coordinator(3, f"127.0.0.1:{port}"), then=listen)
    assert len(set(ports)) == 3


def test_one_process_meets_nobody():
    with joined(cluster(1, 0)) as group:
        assert group.size == 1


# ------------------------------------------------------------------------------------------- Others that knock


def scan(port):
    socket.create_connection(("127.0.0.1", port), timeout=5).close()


def ask_for_a_page(port):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    connection.request("GET", "/healthz")
    connection.getresponse()


def say(port, message):
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        connection.sendall(message)
        connection.recv(1)


GARBAGE = {
    "bytes": b"\x16\x03\x01\x02\x00\x01\xfc\n",
    "json": b"[1, 2]\n",
    "nested": b"[" * 100_000 + b"\n",
    "lacks": b'{"size": 2}\n',
    "kinds": greeting(rank="1"),
    "endless": b"x" * 2**23,
}


@pytest.mark.parametrize(
    "knocking", [scan, ask_for_a_page, *GARBAGE], ids=lambda x: getattr(x, "__name__", x)
)
def test_who_is_not_of_the_run_is_ignored(knocking):
    """It knocks at the doors of the chief and of another one, from before the first joins to after the last."""
    ports = free_ports(3)
    addresses = tuple(f"127.0.0.1:{port}" for port in ports)

    def late(each):
        time.sleep(0.5 * each.rank)
        with joined(each, start_timeout_secs=60) as group:
            return group.gather(each.rank)

    clusters = [cluster(3, rank, addresses=addresses) for rank in range(3)]
    stop = threading.Event()
    tried = []

    def disturb(port):
        while not stop.is_set():
            with contextlib.suppress(OSError, http.client.HTTPException):
                socket.create_connection(("127.0.0.1", port), timeout=5).close()
                tried.append(port)
                if callable(knocking):
                    knocking(port)
                else:
                    say(port, GARBAGE[knocking])
            time.sleep(0.02)

    threads = [threading.Thread(target=disturb, args=(port,), daemon=True) for port in ports[:2]]
    for thread in threads:
        thread.start()
    try:
        assert at_once([lambda each=each: late(each) for each in clusters]) == [[0, 1, 2]] * 3
    finally:
        stop.set()
    assert set(tried) == set(ports[:2])


def test_who_says_nothing_keeps_nobody_waiting():
    ports = free_ports(2)
    clusters = [cluster(2, rank, addresses=tuple(f"127.0.0.1:{port}" for port in ports)) for rank in range(2)]
    opened = []

    def take_part(each):
        with joined(each, start_timeout_secs=15) as group:
            return group.gather(each.rank)

    def worker():
        opened.extend(connected(ports[0]) for _ in range(20))
        return take_part(clusters[1])

    # One connection after the other would be 20 times five seconds, and the deadline is 15.
    assert at_once([lambda: take_part(clusters[0]), worker]) == [[0, 1]] * 2
    for each in opened:
        each.close()


# ------------------------------------------------------------------------------------------ Who does not come


def test_one_that_never_starts_is_named_with_its_address_to_all():
    ports = free_ports(3)
    addresses = tuple(f"127.0.0.1:{port}" for port in ports)
    clusters = [cluster(3, rank, addresses=addresses) for rank in range(2)]
    chief, other = meeting(clusters, secs=1.5)
    for error in (chief, other):
        assert isinstance(error, LostProcessError)
        assert error.exit_code == 69
        assert f"nothing of process 2 (127.0.0.1:{ports[2]})" in str(error)
    assert f"The chief at 127.0.0.1:{ports[0]} has refused this process" in str(other)


def test_several_that_never_start_are_all_named():
    (port,) = free_ports(1)
    (error,) = meeting(with_coordinator(4, f"127.0.0.1:{port}")[:1], secs=0.5)
    assert f"All 4 processes of the run must join the chief at 127.0.0.1:{port}" in str(error)
    assert "nothing of process 1, 2, 3" in str(error)
    (port,) = free_ports(1)
    (error,) = meeting(with_coordinator(100, f"127.0.0.1:{port}")[:1], secs=0.1)
    assert "nothing of process 1, 2, 3, 4, 5, 6, 7, 8, and 91 others" in str(error)


@pytest.mark.parametrize(
    ("coordinator", "words"),
    [
        ("127.0.0.1:{port}", "Connection refused"),
        ("chief.invalid:2222", "chief.invalid does not resolve"),
        ("chief..invalid:2222", "'chief..invalid' cannot be the name of a host"),
    ],
)
def test_a_chief_that_is_not_there_is_named_at_the_deadline(coordinator, words):
    (port,) = free_ports(1)
    coordinator = coordinator.format(port=port)
    start = time.monotonic()
    (error,) = meeting(with_coordinator(2, coordinator)[1:], secs=1.0)
    assert time.monotonic() - start >= 0.5 or ".." in coordinator  # It has tried again.
    assert isinstance(error, LostProcessError)
    assert f"Process 1 of 2 must reach the chief, process 0, at {coordinator} in time" in str(error)
    assert words in str(error)


def test_a_name_that_others_cannot_resolve_is_told_to_all():
    ports = free_ports(2)
    addresses = (f"127.0.0.1:{ports[0]}", f"worker.invalid:{ports[1]}")
    for error in meeting([cluster(2, rank, addresses=addresses) for rank in range(2)], secs=1.5):
        assert isinstance(error, LostProcessError)
        assert f"process 0 of 2 (127.0.0.1:{ports[0]}) cannot reach process 1 of 2 (worker.invalid" in str(
            error
        )
        assert "does not resolve" in str(error)


def test_a_wrong_port_of_another_process_is_told_to_all():
    ports = free_ports(3)
    right = tuple(f"127.0.0.1:{port}" for port in ports[:2])
    wrong = (right[0], f"127.0.0.1:{ports[2]}")
    errors = meeting([cluster(2, 0, addresses=wrong), cluster(2, 1, addresses=right)], secs=1.5)
    for error in errors:
        assert isinstance(error, LostProcessError)
        assert f"cannot reach process 1 of 2 ({wrong[1]})" in str(error)


def test_another_program_at_the_chiefs_address_is_not_taken_for_it():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def serve():
            connection, _ = server.accept()
            connection.recv(1000)
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            connection.close()

        threading.Thread(target=serve, daemon=True).start()
        (error,) = meeting(with_coordinator(2, f"127.0.0.1:{port}")[1:], secs=5)
    assert isinstance(error, LostProcessError)
    assert f"The chief of the run must answer at 127.0.0.1:{port}" in str(error)


def test_who_waits_is_told_that_the_chief_was_interrupted(monkeypatch):
    """By a signal whose handler raises SystemExit, while another process is awaited."""
    (port,) = free_ports(1)

    def interrupted(connections, cluster, door, *, deadline):
        _, connections[1] = door.applicants.get(timeout=20)
        raise SystemExit(143)

    monkeypatch.setattr("lmscale.distribution.rendezvous._gather_into", interrupted)
    clusters = with_coordinator(3, f"127.0.0.1:{port}")[:2]
    chief, other = meeting(clusters)
    assert isinstance(chief, SystemExit)
    assert isinstance(other, ValueError)
    assert other.exit_code == 143
    assert "has refused this process: it was asked to end, with exit code 143" in str(other)


def test_a_port_that_is_taken_is_named():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        (error,) = meeting(with_coordinator(2, f"127.0.0.1:{port}")[:1])
    assert isinstance(error, ValueError)
    assert f"Process 0 must be able to listen at port {port}" in str(error)


# -------------------------------------------------------------------------------------- Who does not belong here


def refused(message, *, size=2, before=()):
    """(the chief's error, what it answers the last of those that knock)."""
    (port,) = free_ports(1)
    answers = []

    def others():
        with contextlib.ExitStack() as stack:
            for each in before:
                stack.enter_context(connected(port)).sendall(each)
                time.sleep(0.3)
            answers.append(json.loads(knock(port, message)))

    def chief():
        with joined(cluster(size, 0, coordinator=f"127.0.0.1:{port}"), start_timeout_secs=30):
            pass

    error, _ = at_once([chief, others])
    assert isinstance(error, ValueError), error
    assert answers[0]["code"] == 2
    assert str(error).lower().startswith(answers[0]["refused"].lower())
    return str(error)


def test_another_version_is_refused_naming_both():
    error = refused(greeting(lmscale="0.0.7"))
    assert "the same version of lmscale" in error
    assert f"{__version__} in process 0" in error
    assert "0.0.7 in process 1" in error


@pytest.mark.parametrize(("rank", "size"), [(1, 3), (2, 2), (0, 2), (-1, 2)])
def test_another_number_of_processes_is_refused_naming_both(rank, size):
    error = refused(greeting(rank=rank, size=size))
    assert "the same number of processes. Received: 2 in process 0" in error
    assert f"process {rank} of {size} at 127.0.0.1" in error


def test_a_rank_given_twice_is_refused():
    first = greeting(size=3)
    error = refused(greeting(size=3, port=4712), size=3, before=[first])
    assert "a number of its own. Received: process 1 twice, from 127.0.0.1 and 127.0.0.1" in error


def test_one_that_is_started_again_while_others_are_awaited_is_taken():
    """A scheduler replaces a process that died; the chief, which has it on its list, goes on."""
    (port,) = free_ports(1)
    chief, first, second = with_coordinator(3, f"127.0.0.1:{port}")

    def take_part(each, wait_secs):
        time.sleep(wait_secs)
        with joined(each, start_timeout_secs=30) as group:
            return group.gather(each.rank)

    def die_and_return():
        with connected(port) as connection:
            connection.sendall(greeting(size=3))
            time.sleep(0.3)
        return take_part(first, 0.3)

    functions = [lambda: take_part(chief, 0), die_and_return, lambda: take_part(second, 1.5)]
    assert at_once(functions) == [[0, 1, 2]] * 3


def test_another_time_of_silence_is_refused_naming_both():
    """Who beats more slowly than another listens would be taken for lost, start after start."""
    (port,) = free_ports(1)

    def take_part(each, silence_secs):
        with joined(each, start_timeout_secs=20, silence_secs=silence_secs):
            pass

    clusters = with_coordinator(2, f"127.0.0.1:{port}")
    for error in at_once([lambda: take_part(clusters[0], 2.0), lambda: take_part(clusters[1], 200.0)]):
        assert isinstance(error, ValueError)
        assert "--silence_secs must be the same" in str(error)
        assert "2 in process 0 of 2" in str(error)
        assert "200 in process 1 of 2" in str(error)


# --------------------------------------------------------------------------------------------------- How they end


class UnavailableError(Exception):
    """Called as TensorFlow's is."""


class ResourceExhaustedError(Exception):
    """Called as TensorFlow's is."""


def ending(error, monkeypatch):
    """(what leaves the context in which it is raised, what its process has told the others and with which code)."""
    told = []
    monkeypatch.setattr(ProcessGroup, "fail", lambda group, how, *, code: told.append((how, code)))
    monkeypatch.setattr(ProcessGroup, "wait_for_verdict", lambda group: told.append("waited"))
    (port,) = free_ports(1)
    clusters = with_coordinator(2, f"127.0.0.1:{port}")

    def fails():
        with joined(clusters[0]):
            raise error

    def goes():
        with joined(clusters[1]):
            pass

    return at_once([fails, goes])[0], told


def test_a_connection_that_breaks_between_living_processes_is_no_bug(monkeypatch):
    raised, told = ending(UnavailableError("Connection reset by peer\nmore"), monkeypatch)
    assert isinstance(raised, LostProcessError)
    assert str(raised).endswith("Received: Connection reset by peer.")
    assert told == ["waited", (f"failed: {raised}", 69)]


def test_a_lack_of_memory_is_told_at_once_and_is_no_bug(monkeypatch):
    raised, told = ending(ResourceExhaustedError("OOM"), monkeypatch)
    assert isinstance(raised, ResourceExhaustedError)
    ((how, code),) = told
    assert "there must be memory for what was asked for" in how
    assert code == 2


def test_errors_of_files_are_told_without_numbers(monkeypatch):
    _, told = ending(FileNotFoundError(2, "No such file or directory", "train.bin"), monkeypatch)
    assert told == [("failed: train.bin: No such file or directory", 2)]


@pytest.mark.parametrize(("code", "expected"), [(75, 75), (None, 0), ("words", 1)])
def test_a_process_that_exits_is_told_with_a_number(monkeypatch, code, expected):
    _, told = ending(SystemExit(code), monkeypatch)
    assert told == [(f"was asked to end, with exit code {expected}", expected)]
