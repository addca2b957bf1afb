"""What processes agree on, and how they end when one of them is lost: threads over loopback, no TensorFlow."""

import json
import math
import re
import socket
import subprocess
import sys
import threading
import time

import pytest
from small_groups import Members, at_once, connected_pair

from lmscale.distribution.process_group import EXIT_LOST, Connection, LostProcessError, ProcessGroup


@pytest.fixture
def members():
    """members(size, ...): `Members`, closed afterwards."""
    made = []

    def make(*args, **kwargs):
        made.append(Members(*args, **kwargs))
        return made[-1]

    yield make
    for each in made:
        each.close()


def in_all(members, function):
    return at_once([lambda group=group: function(group) for group in members.groups.values()])


# -------------------------------------------------------------------------------------------------------- To agree


def test_importing_it_does_not_import_tensorflow():
    program = "import sys, lmscale.distribution.rendezvous; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_one_process_agrees_with_itself():
    group = ProcessGroup()
    value = object()
    assert group.gather(value) == [value]
    assert group.of_chief(value) is value
    group.check_same("It", value)
    group.leave()
    assert (group.is_chief, group.size, group.rank) == (True, 1, 0)


@pytest.mark.parametrize("size", [2, 5])
def test_gather_gives_all_values_by_rank_in_the_order_of_the_calls(members, size):
    def talk(group):
        heard = []
        for number in range(20):
            if group.rank == number % size:
                time.sleep(0.01)  # Another one is late each time.
            heard.append(group.gather([number, group.rank]))
        return heard

    expected = [[[number, rank] for rank in range(size)] for number in range(20)]
    assert in_all(members(size), talk) == [expected] * size


def test_values_keep_what_json_lacks_and_long_texts(members):
    text = "zażółć\n" * 50_000
    given = {0: math.nan, 1: -math.inf, 2: {"a": [None, True, 0.1, text]}}
    for nan, infinity, rest in in_all(members(3), lambda group: group.gather(given[group.rank])):
        assert math.isnan(nan)
        assert infinity == -math.inf
        assert rest == given[2]


def test_nobody_passes_a_barrier_before_the_last_has_come(members):
    come = []

    def pass_barrier(group):
        time.sleep(0.1 * group.rank)
        come.append(group.rank)
        group.gather()
        return len(come)

    assert in_all(members(3), pass_barrier) == [3, 3, 3]


def test_of_chief_gives_the_value_of_rank_0(members):
    assert in_all(members(3), lambda group: group.of_chief(f"of {group.rank}")) == ["of 0"] * 3


def test_what_differs_is_refused_in_every_process_with_the_first_lines_that_differ(members):
    def compare(group):
        group.check_same("The seed", 7)
        group.check_same("The configuration", f"a = 1\nb = {min(group.rank, 2)}\nc = {group.rank}\n")

    errors = in_all(members(4), compare)
    for error in errors:
        assert isinstance(error, ValueError)
        assert "The configuration must be the same in every process" in str(error)
        assert re.search(r"b = 0 in process 0 of 4 \(host0:7000\), b = 1 in process 1 of 4", str(error))
        assert "c = " not in str(error)
    assert len(set(map(str, errors))) == 1


def test_a_text_that_only_goes_on_differs(members):
    for error in in_all(members(2), lambda group: group.check_same("It", "a\n" + "b\n" * group.rank)):
        assert "(nothing) in process 0" in str(error)
        assert "b in process 1" in str(error)


# ---------------------------------------------------------------------------------------------------------- To end


def test_leaving_ends_nobody(members):
    group = members(3)

    def work(each):
        each.gather()
        each.leave()

    assert in_all(group, work) == [None] * 3
    for ends in group.sockets.values():
        for end in ends:
            end.shutdown(socket.SHUT_RDWR)
    time.sleep(0.2)
    assert group.codes == {}


@pytest.mark.parametrize("leaver", [0, 1])
def test_who_waits_for_one_that_left_is_told(members, leaver):
    def work(group):
        group.gather()
        if group.rank == leaver:
            group.leave()
            return None
        return group.gather()

    results = in_all(members(2), work)
    assert results[leaver] is None
    assert isinstance(results[1 - leaver], LostProcessError)
    assert f"process {leaver} of 2 (host{leaver}:700{leaver}) has ended" in str(results[1 - leaver])


def test_values_of_one_that_left_still_count(members):
    def work(group):
        if group.rank == 2:
            time.sleep(0.2)  # Process 1 has long left.
        value = group.gather(group.rank)
        if group.rank == 1:
            group.leave()
        return value

    def early(group):
        """Process 1 does not wait for the answer."""
        if group.rank != 1:
            return work(group)
        group._connections[0].send({"number": 0, "value": 1})
        group.leave()
        return [0, 1, 2]

    assert in_all(members(3), early) == [[0, 1, 2]] * 3


@pytest.mark.parametrize("failing", [0, 2])
def test_who_fails_ends_all_with_its_words_and_code(members, failing, capfd):
    group = members(3)
    group.groups[failing].fail("failed: no space left on the device.", code=2)
    assert group.wait_for_ends(2) == {rank: 2 for rank in range(3) if rank != failing}
    said = capfd.readouterr().err.splitlines()
    assert (
        said
        == [
            f"error: process {failing} of 3 (host{failing}:700{failing}) failed: no space left on the device."
        ]
        * 2
    )


@pytest.mark.parametrize("lost", [0, 1])
def test_a_connection_that_breaks_ends_all_with_69_naming_it(members, lost, capfd):
    start = [rank for rank in range(3) if rank != lost]
    group = members(3, start=start)
    for rank, ends in group.sockets.items():
        if lost in (0, rank):
            ends[0 if lost == 0 else 1].close()
    assert group.wait_for_ends(2) == dict.fromkeys(start, EXIT_LOST)
    said = capfd.readouterr().err
    assert said.count(f"error: process {lost} of 3 (host{lost}:700{lost}) has gone without a word") == 2
    assert said.count("Run the same command again: it goes on from the last checkpoint.") == 2


@pytest.mark.parametrize("lost", [0, 1])
def test_silence_ends_all_with_69_naming_it(members, lost, capfd):
    start = [rank for rank in range(3) if rank != lost]
    group = members(3, start=start, silence_secs=1.0)
    assert group.wait_for_ends(2) == dict.fromkeys(start, EXIT_LOST)
    said = capfd.readouterr().err
    assert said.count(f"process {lost} of 3 (host{lost}:700{lost}) has not been heard of for 1 s") == 2


def test_whoever_starts_slowly_is_not_lost_and_whoever_falls_silent_later_is(members, capfd):
    """Process 1 says nothing by itself, as while TensorFlow is imported, which holds up its thread that beats."""
    group = members(2, start=[0], silence_secs=0.5, start_silence_secs=60.0)
    chief, slow = group.groups[0], Connection(group.sockets[1][1])
    slow.send({"number": 0, "value": "meets"})
    assert chief.gather("meets") == ["meets", "meets"]
    time.sleep(1.5)
    assert (group.codes, chief.has_started) == ({}, False)
    slow.send({"number": 1, "value": "the same"})
    chief.gather("the same")
    assert group.wait_for_ends(1) == {0: EXIT_LOST}
    assert chief.has_started
    assert "process 1 of 2 (host1:7001) has not been heard of for" in capfd.readouterr().err


def test_whoever_beats_is_not_silent(members):
    group = members(3, silence_secs=0.6)
    time.sleep(1.5)
    assert group.codes == {}


@pytest.mark.parametrize(
    "garbage", [b"GET / HTTP/1.1\r\n", b"[]\n", b'{"number": 0}\n', b"\xff\xfe\n", b"[" * 10**5 + b"\n"]
)
def test_garbage_from_a_process_ends_the_group_and_not_the_watch(members, garbage, capfd):
    group = members(3, start=[0, 2])
    group.sockets[1][1].sendall(garbage)
    assert group.wait_for_ends(2) == {0: EXIT_LOST, 2: EXIT_LOST}
    assert capfd.readouterr().err.count("process 1 of 3 (host1:7001) has sent what is no message") == 2


def test_who_was_stopped_itself_does_not_take_the_others_for_lost(members, monkeypatch):
    """A clock that jumps is what a process sees that was stopped together with all others."""
    jump = 0.0
    clock = time.monotonic
    monkeypatch.setattr("lmscale.distribution.process_group.time.monotonic", lambda: clock() + jump)
    group = members(2, silence_secs=2.0)
    time.sleep(0.3)
    jump = 100.0
    time.sleep(1.0)
    assert group.codes == {}


def test_the_first_reason_counts(members, capfd):
    group = members(2)
    group.groups[1].fail("failed: first.", code=2)
    group.groups[1].fail("failed: second.", code=3)
    group.groups[1].leave()
    assert group.wait_for_ends(1) == {0: 2}
    assert "second" not in capfd.readouterr().err


def test_who_is_being_ended_does_not_get_to_say_more(members, monkeypatch):
    """Two that see the same mistake: each is told of the other's failure while it is about to tell its own."""
    printing, printed = threading.Event(), threading.Event()

    def print_slowly(text):
        printing.set()
        time.sleep(0.5)
        printed.set()

    monkeypatch.setattr("lmscale.distribution.process_group._print_in_time", print_slowly)
    group = members(2)
    group.groups[1].fail("failed: first.", code=2)
    assert printing.wait(30)
    group.groups[0].fail("failed: second.", code=3)
    assert printed.is_set()
    assert group.codes == {0: 2}


ALONE = """
import socket, sys, threading, time
from small_groups import cluster, connected_pair
from lmscale.distribution.process_group import Connection, ProcessGroup
near, far = connected_pair()
addresses = ("a:1", "b:2")
group = ProcessGroup(cluster=cluster(2, 0, addresses=addresses), addresses=addresses, connections={1: Connection(near)})
threading.Thread(target=time.sleep, args=(600,)).start()
threading.Timer(0.5, far.close).start()
"""


def start_alone(program):
    """Starts Python with a group whose other process goes after half a second."""
    return subprocess.Popen(
        [sys.executable, "-c", ALONE + program],
        env={"PYTHONPATH": ":".join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_process_without_an_end_of_its_own_exits_at_once():
    """What is printed is flushed; a thread that hangs, as in a collective, is not waited for."""
    with start_alone("print('last words', end=''); group.gather()") as process:
        stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (EXIT_LOST, "last words")
    assert stderr.startswith("error: process 1 of 2 (b:2) has gone without a word")


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_output_that_nobody_reads_does_not_hold_up_the_end(stream):
    """As that of a terminal stopped by Ctrl-S: the process waits in a write, and holds the stream."""
    with start_alone(f"sys.{stream}.write('x' * 10**7)") as process:
        try:
            assert process.wait(timeout=60) == EXIT_LOST
        finally:
            process.kill()


# ------------------------------------------------------------------------------------------------- The connection


def test_messages_arrive_whole_however_they_are_cut():
    near, far = connected_pair()
    connection = Connection(near)
    sent = [{"a": 1}, {"b": "ü" * 10}, {}]
    data = b"".join(json.dumps(message).encode() + b"\n" for message in sent)
    received = []
    for start in range(0, len(data), 7):
        far.sendall(data[start : start + 7])
        received += connection.receive()
    assert received == sent
    assert connection.num_unfinished == 0
    far.close()
    assert (connection.receive(), connection.is_closed) == ([], True)
    connection.send({"to": "nobody"})  # No error: `receive` tells.
    near.close()
