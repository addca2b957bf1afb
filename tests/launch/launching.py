"""What the tests of the launch scripts share: the scripts, and running them, with stand-ins for the tools they call."""

import os
import stat
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
GOLDEN = Path(__file__).parent / "golden"
# Of a launcher that the tests themselves may run under.
PREFIXES = ("SLURM_", "CUDA_VISIBLE_DEVICES", "TF_CONFIG")


def environment(**variables):
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(PREFIXES)}
    return inherited | variables


def run(script, *arguments, cwd, timeout=60, **variables):
    """Runs a script of launch/ to its end; returns the process, with its output as text."""
    return subprocess.run(
        ["bash", str(LAUNCH / script), *map(str, arguments)],
        cwd=cwd,
        env=environment(**variables),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def stand_in(folder, name, text):
    """Writes a tool in bash into a folder for PATH, and returns the PATH that has it first."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{text}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return f"{folder}:{os.environ['PATH']}"


def processes_with(marker):
    """Command lines of the processes that have a text in theirs."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # Ended meanwhile.
            continue
        if marker in line:
            found.append(line)
    return found


def check_golden(name, text):
    assert text == (GOLDEN / name).read_text(encoding="utf-8"), name
