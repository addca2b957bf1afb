"""local_workers.sh and ssh_workers.sh, run with small commands: output, exit codes, signals, and what is left."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
from launching import LAUNCH, check_golden, environment, processes_with, run, stand_in

# Does as ssh does: a shell at the other end runs the last argument as text, in another directory and environment.
FAKE_SSH = """
printf '%s\\n' "$*" >>"$SSH_LOG"
[[ ${*: -2:1} != unreachable ]] || { echo "ssh: no route" >&2; exit 255; }
cd / && exec env -u TF_CONFIG sh -c "${*: -1}"
"""
LAUNCHERS = ("local", "ssh")


@pytest.fixture(params=LAUNCHERS)
def launcher(request, tmp_path):
    return Launcher(request.param, tmp_path)


@pytest.fixture
def local(tmp_path):
    return Launcher("local", tmp_path)


class Launcher:
    """Runs one of the two scripts; both must behave the same."""

    def __init__(self, kind, folder):
        self.kind, self.cwd = kind, folder / "it's a $folder"
        self.cwd.mkdir()
        self.script = f"{kind}_workers.sh"
        self.marker = f"marker-{uuid.uuid4()}"
        path = stand_in(folder / "bin", "ssh", FAKE_SSH)
        self.variables = {"PATH": path, "SSH_LOG": str(folder / "log"), "MARKER": self.marker}

    def arguments(self, count, *command, grace_secs=60):
        which = str(count) if self.kind == "local" else ",".join(f"host{i}" for i in range(count))
        return [f"--grace_secs={grace_secs}", which, "--", *command]

    def run(self, count, *command, **flags):
        return run(self.script, *self.arguments(count, *command, **flags), cwd=self.cwd, **self.variables)

    def start(self, count, *command, **flags):
        """Starts it in a session of its own, so that what the tests send goes to the script alone."""
        return subprocess.Popen(
            ["bash", str(LAUNCH / self.script), *self.arguments(count, *command, **flags)],
            cwd=self.cwd,
            env=environment(**self.variables),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            text=True,
        )

    def python(self, program):
        """A command that runs a program, in which `index` is the number of the process; with a mark to find it by."""
        start = "import json, os, signal, subprocess, sys, time\n"
        start += "index = json.loads(os.environ['TF_CONFIG'])['task']['index']\n"
        return [sys.executable, "-u", "-c", start + program, self.marker]

    def wait_until_ready(self, process, count):
        """Reads until every process has printed `ready`."""
        ready = {process.stdout.readline().strip() for _ in range(count)}
        assert ready == {f"[{index}] ready" for index in range(count)}

    def check_nothing_left(self, seconds=10):
        deadline = time.monotonic() + seconds
        while (left := processes_with(self.marker)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert left == []


def lines_of(text, index):
    return [line.removeprefix(f"[{index}] ") for line in text.splitlines() if line.startswith(f"[{index}] ")]


# ------------------------------------------------------------------------------------- What a process is told


@pytest.mark.parametrize("count", [1, 5])
def test_every_process_finds_all_in_tf_config(launcher, count):
    result = launcher.run(count, *launcher.python("print(os.environ['TF_CONFIG']); print(os.getcwd())"))
    assert (result.returncode, result.stderr) == (0, "")
    clusters = []
    for index in range(count):
        config, cwd = lines_of(result.stdout, index)
        config = json.loads(config)
        assert config["task"] == {"type": "worker", "index": index}
        assert cwd == str(launcher.cwd)
        clusters.append(config["cluster"])
    assert clusters == clusters[:1] * count
    (addresses,) = clusters[0].values()
    assert len(set(addresses)) == count
    if launcher.kind == "local":
        assert all(re.fullmatch(r"127\.0\.0\.1:\d+", address) for address in addresses)
    else:
        assert addresses == [f"host{index}:2222" for index in range(count)]
    launcher.check_nothing_left()


def test_the_cluster_is_known_by_its_tf_config(local):
    cluster = pytest.importorskip("lmscale.distribution.cluster")
    result = local.run(3, *local.python("print(os.environ['TF_CONFIG'])"))
    for index in range(3):
        (text,) = lines_of(result.stdout, index)
        found = cluster.find_cluster({"TF_CONFIG": text})
        assert (found.size, found.rank, list(found.addresses)) == (
            *(3, index),
            json.loads(text)["cluster"]["worker"],
        )


def test_arguments_arrive_as_they_are(launcher):
    arguments = [
        "",
        " two  words ",
        'it\'s "quoted" \\',
        "$HOME `id` $(id) *",
        "new\nline",
        "--",
        "--help",
        "é;&|<>",
    ]
    result = launcher.run(2, *launcher.python("print(json.dumps(sys.argv[2:]))"), *arguments)
    assert result.returncode == 0
    for index in range(2):
        assert json.loads(*lines_of(result.stdout, index)) == arguments


# ----------------------------------------------------------------------------------------------------- Output


def test_lines_stay_whole_and_say_whose_they_are(launcher):
    program = """
for number in range(30):
    for part in (f"line {number} ", "of ", f"{index}", "x" * (20_000 if number == 7 else 3) + chr(10)):
        sys.stdout.write(part); sys.stdout.flush()
        time.sleep(0.001)
sys.stderr.write("an error"); sys.stdout.write("no newline")
"""
    result = launcher.run(3, *launcher.python(program))
    assert result.returncode == 0
    for index in range(3):
        whole = [f"line {n} of {index}" + "x" * (20_000 if n == 7 else 3) for n in range(30)]
        assert lines_of(result.stdout, index) == [*whole, "no newline"]
        assert lines_of(result.stderr, index) == ["an error"]
    assert len(result.stdout.splitlines()) == 3 * 31


def test_a_reader_that_goes_ends_all(local):
    process = local.start(2, *local.python("while True: print('line'); time.sleep(0.01)"), grace_secs=1)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(30) == 128 + signal.SIGPIPE
    process.stderr.close()
    local.check_nothing_left()


# ------------------------------------------------------------------------------------------------- Exit codes


# The second of three processes waits for the others.
WHEN_ALL_ARE_READY = """
open(f"ready-{index}", "w").close()
while index == 1 and not (os.path.exists("ready-0") and os.path.exists("ready-2")): time.sleep(0.05)
"""


@pytest.mark.parametrize("code", [2, 3, 69, 75])
def test_the_first_failure_ends_all_with_its_code(launcher, code):
    program = (
        'signal.signal(signal.SIGTERM, lambda *_: (print("saved"), sys.exit(75)))\n' + WHEN_ALL_ARE_READY
    )
    program += f"if index == 1: sys.exit({code})\ntime.sleep(60)"
    result = launcher.run(3, *launcher.python(program))
    assert result.returncode == code
    assert f"[1] ended with {code}: the others get SIGTERM" in result.stderr
    assert lines_of(result.stdout, 0) == lines_of(result.stdout, 2) == ["saved"]
    launcher.check_nothing_left()


def test_one_that_is_done_ends_no_other(launcher):
    result = launcher.run(3, *launcher.python("time.sleep(index * 0.7); print('done')"))
    assert (result.returncode, result.stderr) == (0, "")
    assert sorted(result.stdout.split("\n")) == ["", *(f"[{index}] done" for index in range(3))]


def test_a_killed_process_ends_all(launcher):
    program = "print('ready'); os.kill(os.getpid(), signal.SIGKILL) if index == 0 else time.sleep(60)"
    result = launcher.run(2, *launcher.python(program))
    assert result.returncode == 128 + signal.SIGKILL
    launcher.check_nothing_left()


def test_who_ignores_sigterm_is_killed_after_the_grace_time(launcher):
    program = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + WHEN_ALL_ARE_READY
    program += "if index == 1: sys.exit(3)\ntime.sleep(60)"
    start = time.monotonic()
    result = launcher.run(3, *launcher.python(program), grace_secs=2)
    assert result.returncode == 3
    assert 2 <= time.monotonic() - start < 50
    launcher.check_nothing_left()


def test_a_command_that_is_not_there(launcher):
    result = launcher.run(2, "no-such-command")
    assert result.returncode == 127
    assert "no-such-command" in result.stderr


def test_an_unreachable_host_ends_all(tmp_path):
    launcher = Launcher("ssh", tmp_path)
    result = run(
        "ssh_workers.sh",
        *("host0,unreachable", "--", *launcher.python("time.sleep(60)")),
        cwd=launcher.cwd,
        **launcher.variables,
    )
    assert result.returncode == 255
    assert "[1] ssh: no route" in result.stderr
    launcher.check_nothing_left()


# ---------------------------------------------------------------------------------------------------- Signals

# Blocked, and taken one at a time: no second signal can come between.
HEARS = """
stops = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2}
signal.pthread_sigmask(signal.SIG_BLOCK, stops)
print("ready")
print(signal.sigwait(stops).name)
if index == 1: time.sleep(2)
print(sorted(number.name for number in signal.sigpending()))
sys.exit(75)
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"])
def test_signals_are_passed_on(launcher, name):
    process = launcher.start(2, *launcher.python(HEARS))
    launcher.wait_until_ready(process, 2)
    process.send_signal(signal.Signals[name])
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 75
    # Process 1 takes its time: it is asked to end as well, unless it has been already.
    pending = [] if name == "SIGTERM" else ["SIGTERM"]
    assert sorted(output.splitlines()) == sorted(["[0] []", f"[0] {name}", f"[1] {name}", f"[1] {pending}"])
    launcher.check_nothing_left()


def test_ctrl_c_is_received_once_and_again_for_the_second(local):
    program = "def hear(*_): print('once')\nsignal.signal(signal.SIGINT, hear)\nprint('ready')\n"
    program += "while True: time.sleep(60)"
    process = local.start(1, *local.python(program))
    local.wait_until_ready(process, 1)
    for _ in range(2):
        os.killpg(process.pid, signal.SIGINT)  # As a terminal does: to the script and what is in its group.
        assert process.stdout.readline() == "[0] once\n"
    process.terminate()
    output, _ = process.communicate(timeout=30)
    assert (process.returncode, output) == (128 + signal.SIGTERM, "")


def test_a_hangup_that_nohup_ignores_stays_ignored(local):
    program = "print('ready'); time.sleep(1.5); print(signal.getsignal(signal.SIGHUP) == signal.SIG_IGN)"
    script = f"trap '' HUP; exec bash {LAUNCH}/local_workers.sh \"$@\""
    process = subprocess.Popen(
        ["bash", "-c", script, "bash", "1", "--", *local.python(program)],
        env=environment(**local.variables),
        stdout=subprocess.PIPE,
        text=True,
    )
    local.wait_until_ready(process, 1)
    process.send_signal(signal.SIGHUP)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert output == "[0] True\n"


# ------------------------------------------------------------------------------------- Nothing is left behind

STAYS = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('ready')\ntime.sleep(60)"


def test_sigterm_to_the_script_leaves_nothing(launcher):
    process = launcher.start(2, *launcher.python(STAYS), grace_secs=1)
    launcher.wait_until_ready(process, 2)
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGKILL
    launcher.check_nothing_left()


def test_the_script_killed_leaves_nothing(launcher):
    process = launcher.start(2, *launcher.python(STAYS), grace_secs=1)
    launcher.wait_until_ready(process, 2)
    process.kill()
    process.communicate(timeout=30)
    launcher.check_nothing_left()


def test_a_keeper_killed_leaves_nothing(local):
    process = local.start(2, *local.python(STAYS), grace_secs=1)
    local.wait_until_ready(process, 2)
    (keeper,) = [
        pid
        for pid in map(int, children_of(process.pid))
        if '"index":1' in Path(f"/proc/{pid}/cmdline").read_text()
    ]
    os.kill(keeper, signal.SIGKILL)
    process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGKILL
    local.check_nothing_left()


def children_of(pid):
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def test_what_a_command_has_started_ends_with_it(launcher):
    program = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)', sys.argv[1]]); time.sleep(0.5)"
    result = launcher.run(2, *launcher.python(program))
    assert result.returncode == 0
    launcher.check_nothing_left()


# ------------------------------------------------------------------------------------------ Flags and --print

COMMAND = ("--", "true")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "N must be a number of processes, from 1. Received: none"),
        (("0", *COMMAND), "N must be a number of processes, from 1. Received: 0"),
        (("abc", *COMMAND), "N must be a number of processes, from 1. Received: abc"),
        (("-1", *COMMAND), "unknown flag. Received: -1."),
        (("2",), "-- and a command must follow N. Received: no --"),
        (("2", "true"), "-- must stand between N and the command. Received: 2 true"),
        (("2", "--"), "a command must follow --. Received: none"),
        (("--fast", "2", *COMMAND), "unknown flag. Received: --fast."),
        (("--grace_secs=soon", "2", *COMMAND), "--grace_secs must be whole seconds. Received: soon"),
    ],
)
def test_mistakes_of_local_workers_are_named(tmp_path, arguments, message):
    result = run("local_workers.sh", *arguments, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: {message}")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "HOSTS must be HOST,HOST,... or @FILE. Received: none"),
        (("a,b",), "-- and a command must follow HOSTS. Received: no --"),
        (("a,b", "true"), "-- must stand between HOSTS and the command. Received: a,b true"),
        (("a", "--fast", *COMMAND), "unknown flag. Received: --fast."),
        (("a,,b", *COMMAND), "A host must be HOST, HOST:PORT or USER@HOST:PORT. Received: '' of 'a,,b'"),
        (("a:x", *COMMAND), "A host must be HOST, HOST:PORT or USER@HOST:PORT. Received: 'a:x'"),
        (("a:70000", *COMMAND), "A host must be HOST, HOST:PORT or USER@HOST:PORT. Received: 'a:70000'"),
        (("a:", *COMMAND), "A host must be HOST, HOST:PORT or USER@HOST:PORT. Received: 'a:'"),
        (
            ("u@-oProxyCommand=x", *COMMAND),
            "A host must be HOST, HOST:PORT or USER@HOST:PORT. Received: 'u@-o",
        ),
        (("a:1,a:1", *COMMAND), "Every process must have an address of its own. Received: a:1, a:1"),
        (("@none", *COMMAND), "none: No such file or directory"),
        (("@empty", *COMMAND), "There must be at least one host. Received: none in '@empty'"),
    ],
)
def test_mistakes_of_ssh_workers_are_named(tmp_path, arguments, message):
    (tmp_path / "empty").write_text("# no host\n\n")
    path = stand_in(tmp_path / "bin", "ssh", "echo called")
    result = run("ssh_workers.sh", *arguments, cwd=tmp_path, PATH=path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: {message}")
    assert len(result.stderr.splitlines()) == 1


def test_print_of_local_workers_runs_nothing_and_can_be_pasted(tmp_path):
    program = "import os, sys; print(os.environ['TF_CONFIG'], sys.argv[1:])"
    result = run(
        "local_workers.sh", "--print", 2, "--", "python3", "-c", program, "a b", "it's", cwd=tmp_path
    )
    assert (result.returncode, result.stderr) == (0, "")
    ports = re.findall(r"127\.0\.0\.1:(\d+)", result.stdout)
    assert ports[:2] == ports[2:]
    check_golden("local_workers.txt", re.sub(r"127\.0\.0\.1:\d+", "127.0.0.1:PORT", result.stdout))
    for index, line in enumerate(result.stdout.splitlines()):
        output = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True).stdout
        assert output.endswith(""" ['a b', "it's"]\n""")
        assert json.loads(output.partition(" ")[0])["task"]["index"] == index


def test_print_of_ssh_workers_runs_nothing(tmp_path):
    path = stand_in(tmp_path / "bin", "ssh", "echo called")
    (tmp_path / "hosts").write_text("gpu1  # the first\n\nme@gpu2:4000\ngpu1\n[fe80::1]\n[fe80::1]:5000\n")
    arguments = ("--print", "--grace_secs=5", "@hosts", "--", "train", "--workdir=a b")
    result = run("ssh_workers.sh", *arguments, cwd=tmp_path, PATH=path)
    assert (result.returncode, result.stderr) == (0, "")
    shown = result.stdout.replace(str(tmp_path), "/here").replace(str(LAUNCH), "/project/launch")
    check_golden("ssh_workers.txt", shown)


def test_ssh_never_asks(tmp_path):
    launcher = Launcher("ssh", tmp_path)
    assert launcher.run(1, "true").returncode == 0
    assert (
        (tmp_path / "log").read_text().startswith("-o BatchMode=yes -o ServerAliveInterval=30 -- host0 cd ")
    )
