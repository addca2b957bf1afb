"""How entry points start and fail, with a small one of their kind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lmscale import command_line

ROOT = Path(__file__).parents[1]
TOOL = '''"""Counts down.

From --start.
"""
import signal
from absl import flags
from lmscale import command_line

START = flags.DEFINE_integer("start", 3, "Where to start.")

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
    print("counted", argv[1:])

if __name__ == "__main__":
    command_line.run_main(main)
'''


@pytest.fixture
def tool(tmp_path):
    (tmp_path / "tool.py").write_text(TOOL)

    def run(*arguments):
        result = subprocess.run(
            [sys.executable, str(tmp_path / "tool.py"), *arguments],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
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
        (["--end=2"], (2, "", "error: Unknown command line flag 'end'. Pass --help to see the flags.\n")),
        (
            ["--help"],
            (
                0,
                "Counts down.\n\nFrom --start.\n\nFlags:\n  --start: Where to start.\n    (default: '3')\n"
                "    (an integer)\n\nThose of all libraries: --helpfull\n",
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


def test_paths_with_commas(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
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
        "": [],
    }.items():
        assert parser.parse(value) == expected
