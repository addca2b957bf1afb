"""TensorFlow's notices are hidden, and nothing else: with a stand-in for TensorFlow that says all kinds of things."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTICES = [
    "WARNING: All log messages before absl::InitializeLog() is called are written to STDERR",
    "I0000 00:00:1795590993.432676   20451 port.cc:153] oneDNN custom operations are on. You may see `TF=0`.",
    "W0000 00:00:1795590993.432676 1 cpu_feature_guard.cc:227] This TensorFlow binary is optimized.",
]
NO_GPU = "E0000 00:00:1795590994.417729   20451 cuda_platform.cc:52] failed call to cuInit: INTERNAL: UNKNOWN (303)"
OTHERS = [
    "E0000 00:00:1795590994.417729   20451 cuda_dnn.cc:52] Loaded runtime CuDNN library: 9.1, compiled with 9.3.",
    "F0000 00:00:1795590994.417729   20451 cpu_feature_guard.cc:8] compiled to use AVX instructions, not there.",
    "I1125 07:31:13.983972 140257928457088 trainer.py:524] step 3  sampled_loss_nats 5.7",
    "say I0000 00:00:1795590993.432676   20451 port.cc:153] in a line",
    "WARNING: All log messages",
    "",
    "m\u4e2d",
]
TENSORFLOW = f'''
import contextlib, os, sys, types
def say(text):
    with contextlib.suppress(OSError):
        os.write(2, text.encode())
for line in {NOTICES + OTHERS!r}:
    say(line + "\\n")
print("from Python", file=sys.stderr)
end = os.environ.get("END")
if end == "abort":
    os.abort()
if end == "import":
    import no_such_module
def list_physical_devices():
    say("{NO_GPU}\\nlooked")
config = types.SimpleNamespace(list_physical_devices=list_physical_devices)
'''
START = """
import os, sys
from lmscale import command_line, quiet_start
command_line._open_standard_streams()
quiet_start._GPU_FILES = (os.environ["GPU_FILE"],)
quiet_start.hide_notices()
print(" before", file=sys.stderr)
import tensorflow
print(" after", os.isatty(2), file=sys.stderr, flush=True)
tensorflow.config.list_physical_devices()
assert tensorflow.__spec__.name == "tensorflow"
"""
TERMINAL = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"


@pytest.fixture
def start(tmp_path):
    """start(NAME=value): (exit code, what it says) of a process that imports the stand-in."""
    (tmp_path / "tensorflow.py").write_text(TENSORFLOW)

    def run(redirect="", on_terminal=False, **variables):
        own = ("TF_CPP_MIN_LOG_LEVEL", "CUDA_VISIBLE_DEVICES")
        environment = {name: value for name, value in os.environ.items() if name not in own}
        environment |= {
            "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}",
            "GPU_FILE": "/no/such/file",
        } | variables
        command = ["sh", "-c", f'"$0" -c "$1" {redirect}', sys.executable, START]
        command = [sys.executable, "-c", TERMINAL, *command] if on_terminal else command
        result = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return result.returncode, result.stdout + result.stderr

    return run


def said(*lines):
    return "".join(f"{line}\n" for line in lines)


def test_hides_the_notices_and_nothing_else(start):
    # The device is looked for while the notices are hidden; who looks for it later hears of it.
    expected = said(" before", *OTHERS, "from Python") + said("looked after False", NO_GPU) + "looked"
    assert start() == (0, expected)
    assert start(TF_CPP_MIN_LOG_LEVEL="3") == (0, expected)


def test_a_gpu_that_does_not_start_is_told(start):
    # Where there is one it is not looked for before the run does: --cpu_devices leaves it alone.
    expected = said(" before", *OTHERS, "from Python", " after False", NO_GPU) + "looked"
    assert start(GPU_FILE="/dev/nul*") == (0, expected)
    assert start(GPU_FILE="/dev/nul*", CUDA_VISIBLE_DEVICES="-1") == start()


@pytest.mark.parametrize("level", ["0", "1"])
def test_who_asks_for_them_has_them_all(start, level):
    expected = said(" before", *NOTICES, *OTHERS, "from Python", " after False", NO_GPU) + "looked"
    assert start(TF_CPP_MIN_LOG_LEVEL=level) == (0, expected)


def test_last_words_are_not_lost(start):
    code, stderr = start(END="abort")
    assert code in (-6, 134)
    # Among them is what the shell says of it.
    assert {" before", *OTHERS, "from Python"} <= set(stderr.splitlines())
    assert not {*NOTICES} & set(stderr.splitlines())
    code, stderr = start(END="import")
    assert code == 1
    assert stderr.startswith(said(" before", *OTHERS, "from Python", "Traceback (most recent call last):"))
    assert stderr.endswith("ModuleNotFoundError: No module named 'no_such_module'\n")


def test_stderr_that_cannot_be_written_ends_nothing(start):
    assert start(redirect="2>/dev/full") == (0, "")
    assert start(redirect="2>&-") == (0, "")


def test_a_terminal_stays_a_terminal(start):
    code, stdout = start(on_terminal=True)
    assert code == 0
    assert stdout.replace("\r\n", "\n") == start()[1].replace("after False", "after True")
