"""How entry points start and fail, with a small one of their kind."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lmscale import command_line

ROOT = Path(__file__).parents[1]
TOOL = '''"""Counts down.

From --start.
"""
import errno, os, signal, sys, time
from absl import flags, logging
from lmscale import command_line
from lmscale.doing import doing
from lmscale.stop_signals import collect_stop_signals

START = flags.DEFINE_integer("start", 3, "Where to start.")
FILE = command_line.DEFINE_path("file", "a/b", "What to count.")
FILES = command_line.DEFINE_multi_path("files", [], "More to count.")
TEXTS = command_line.DEFINE_paths("texts", None, "Texts to count.")

def main(argv):
    match START.value:
        case 1: raise ValueError("start must not be 1")
        case 2: open("/no/such/file")
        case 4: raise KeyError("a bug")
        case 5: return 7
        case 6: signal.raise_signal(signal.SIGINT)
        case 7:
            try:
                signal.raise_signal(signal.SIGTERM)
            finally:
                print("tidied up")
        case 8: print("x" * 2**20, flush=True)
        case 9:
            with doing("counting"), doing("counting to 9"):
                raise MemoryError
        case 10:
            with doing("forking"):
                raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        case 11: print("m\u4e2d", flush=True)
        case 15: raise MemoryError
        case 12: print(FILE.value, FILES.value)
        case 13:
            logging.warning("noted")
            print("to stderr", file=sys.stderr)
            print([os.fstat(i).st_rdev == os.stat("/dev/null").st_rdev for i in range(3)], sys.stdin.read())
        case 14:
            with collect_stop_signals() as stop:
                print("ready", flush=True)
                while not stop:
                    time.sleep(0.01)
            print(f"stopped by {stop[0]}", file=sys.stderr, flush=True)
            print("saved", flush=True)
            open(os.environ["NOTES"], "w").write(stop[0])
            return 75
        case number if number > 100: signal.raise_signal(number - 100)
    print("counted", argv[1:])

if __name__ == "__main__":
    command_line.run_main(main)
'''


@pytest.fixture
def tool(tmp_path):
    (tmp_path / "tool.py").write_text(TOOL)

    def run(*arguments, redirect="", **environment):
        command = f'"$0" "$@" {redirect}'
        result = subprocess.run(
            ["sh", "-c", command, sys.executable, str(tmp_path / "tool.py"), *arguments],
            env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        return result.returncode, result.stdout, result.stderr

    return run


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], (0, "counted []\n", "")),
        (["--start=5"], (7, "", "")),
        (["--start=6"], (130, "", "interrupted\n")),
        (["--start=7"], (143, "tidied up\n", "")),
        (["--start=1"], (2, "", "error: start must not be 1\n")),
        (["--start=2"], (2, "", "error: /no/such/file: No such file or directory\n")),
        (
            ["more"],
            (
                2,
                "",
                "error: this command takes flags only. Received also: more. Pass --help to see the flags.\n",
            ),
        ),
        *(
            ([f"--start={100 + number}"], (128 + number, "", ""))
            for number in (signal.SIGHUP, signal.SIGUSR1)
        ),
        (
            ["--start=9"],
            (
                2,
                "",
                "error: there must be memory for what was asked for. Received: none left while counting to 9 "
                "(MemoryError). Ask for less; or, for tables that take more than half of a host's memory, set "
                "TF_ONEDNN_USE_SYSTEM_ALLOCATOR=1.\n",
            ),
        ),
        (
            ["--file="],
            (
                2,
                "",
                "error: flag --file=: a path must not be empty. Received: ''. `.` is the current "
                "directory. Pass --help to see the flags.\n",
            ),
        ),
        (
            ["--file=a", "--file=b/c"],
            (
                2,
                "",
                "error: --file must be given once. Received: a and b/c. Remove one of them. "
                "Pass --help to see the flags.\n",
            ),
        ),
        (["--start=5", "--file=a", "--file=a"], (7, "", "")),
        (
            ["--texts=a,b", "--texts=c"],
            (
                2,
                "",
                "error: --texts must be given once. Received: a,b and c. Separate them by commas. "
                "Pass --help to see the flags.\n",
            ),
        ),
        (["--end=2"], (2, "", "error: Unknown command line flag 'end'. Pass --help to see the flags.\n")),
        (
            ["--help"],
            (
                0,
                "Counts down.\n\nFrom --start.\n\nFlags:\n  --file: What to count.\n    (default: 'a/b')\n"
                "    (a path)\n  --files: More to count.;\n    repeat this option to specify a list of values\n"
                "    (default: '[]')\n    (a path)\n  --start: Where to start.\n    (default: '3')\n"
                "    (an integer)\n  --texts: Texts to count.\n    (a comma separated list)\n\n"
                "Those of all libraries: --helpfull\n",
                "",
            ),
        ),
    ],
)
def test_result_and_exit_code(tool, arguments, expected):
    assert tool(*arguments) == expected


def test_bugs_keep_their_traceback(tool):
    code, _, stderr = tool("--start=4")
    assert code == 1
    assert "Traceback" in stderr
    assert "KeyError: 'a bug'" in stderr


def test_verbosity_shows_the_traceback_of_a_mistake(tool):
    code, _, stderr = tool("--start=1", "--verbosity=1")
    assert code == 2
    assert "Traceback" in stderr
    assert stderr.endswith("error: start must not be 1\n")


def test_a_reader_that_leaves_is_no_error(tool, tmp_path):
    command = f"{sys.executable} {tmp_path / 'tool.py'} --start=8 | head -c 1"
    result = subprocess.run(
        command,
        shell=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert (result.stdout, result.stderr) == ("x", "")


def test_help_to_a_reader_that_has_left(tool, tmp_path):
    """A pipe without a reader: as `--help | head` may end."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "tool.py"), "--help"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
    assert tool("--help", redirect=">/dev/full")[::2] == (2, "error: stdout: No space left on device\n")


def test_lack_of_memory_says_what_was_being_done(tool):
    code, _, stderr = tool("--start=10")
    assert code == 2
    assert "none left while forking (Cannot allocate memory)" in stderr
    code, _, stderr = tool("--start=15")
    assert code == 2
    assert "none left while running tool.py (MemoryError)" in stderr


def test_paths_of_flags(tool):
    code, stdout, stderr = tool("--start=12", "--file=~/a", "--files=~/b", "--files=./~", HOME="/home/me")
    assert (code, stderr) == (0, "")
    assert stdout.startswith("/home/me/a ['/home/me/b', './~']")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_characters_that_a_terminal_lacks(tool, encoding):
    code, stdout, _ = tool("--start=11", PYTHONIOENCODING=encoding)
    assert code == 0
    assert stdout.startswith("m\\u4e2d\n")


@pytest.mark.parametrize(
    ("redirect", "is_null"),
    [
        ("2>&-", [True, False, True]),
        ("<&-", [True, False, False]),
        ("2>&- <&-", [True, False, True]),
    ],
)
def test_descriptors_that_are_closed(tool, redirect, is_null):
    code, stdout, stderr = tool("--start=13", redirect=redirect)
    assert (code, stdout.splitlines()[0]) == (0, f"{is_null} ")
    assert ("noted" in stderr) == ("to stderr" in stderr) == (not is_null[2])
    assert tool("--start=13", redirect=f"{redirect} >&-")[:2] == (0, "")


def test_streams_that_cannot_be_written(tool):
    assert tool("--start=13", redirect="2>/dev/full")[0] == 0
    assert tool("--start=13", redirect=">/dev/full")[0] == 2
    assert "error: stdout: No space left on device" in tool("--start=13", redirect=">/dev/full")[2]


# Runs the tool on a terminal of its own, closes it, and prints the exit code.
CLOSED_TERMINAL = """
import os, pty, signal, sys, time
pid, terminal = pty.fork()
if not pid:
    if sys.argv[1] == "heard":  # Whatever these tests were started under.
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
seen = b""
while b"ready" not in seen:
    seen += os.read(terminal, 100)
os.close(terminal)
if sys.argv[1] == "ignored":
    time.sleep(0.2)
    os.kill(pid, 10)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


@pytest.mark.parametrize(("hangup", "number"), [("heard", "SIGHUP"), ("ignored", "SIGUSR1")])
def test_a_terminal_that_has_gone_does_not_change_how_a_run_ends(tool, tmp_path, hangup, number):
    arguments = [sys.executable, "-c", CLOSED_TERMINAL, hangup, str(tmp_path / "tool.py"), "--start=14"]
    if hangup == "ignored":
        arguments = ["nohup", *arguments]
    result = subprocess.run(
        arguments,
        env=os.environ | {"PYTHONPATH": str(ROOT), "NOTES": str(tmp_path / "notes")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout == "75\n", result.stderr
    assert (tmp_path / "notes").read_text() == number


def test_paths_with_commas(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a,b.txt", 'quo"te, d.txt', "c.txt"):
        (tmp_path / name).touch()
    (tmp_path / "run, of 1").mkdir()
    parser = command_line._PathsParser()
    for value, expected in {
        "a,b.txt": ["a,b.txt"],
        'quo"te, d.txt': ['quo"te, d.txt'],
        "run, of 1": ["run, of 1"],
        '"a,b.txt",c.txt': ["a,b.txt", "c.txt"],
        "c.txt, *.txt": ["c.txt", "*.txt"],
        "a,c.txt": ["a", "c.txt"],
        "~/a,b.txt": [f"{tmp_path}/a,b.txt"],
        "~/c.txt,~/*.txt": [f"{tmp_path}/c.txt", f"{tmp_path}/*.txt"],
        "": [],
    }.items():
        assert parser.parse(value) == expected
