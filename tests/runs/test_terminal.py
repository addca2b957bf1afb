"""On the terminal are lmscale's own lines, and none of TensorFlow's start: real processes, in a bare environment."""

import os
import re
import subprocess
import sys

import pytest
import tiny_runs

MODULES = "|".join(re.escape(path.name) for path in (tiny_runs.REPOSITORY / "lmscale").rglob("*.py"))
# Of the table of parameters, which has many lines, the first has the time and the place.
OWN_LINE = re.compile(rf"[IW]\d{{4}} \d\d:\d\d:\d\d\.\d{{6}} +\d+ ({MODULES}):\d+\] |[┏┃┡│├└]")
FEW_STEPS = {"TRAIN_STEPS": 2, "EVAL_EVERY": 2, "SAVE_EVERY": 2}


def lines(module, *arguments, code=0):
    """The lines that a command prints to stderr."""
    own = ("TF_CPP_MIN_LOG_LEVEL", "CUDA_VISIBLE_DEVICES")
    result = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=tiny_runs.REPOSITORY,
        env={name: value for name, value in os.environ.items() if name not in own},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=tiny_runs.DEADLINE_SECS,
        check=False,
    )
    assert result.returncode == code, result.stderr
    return result.stderr.splitlines()


def test_a_run_its_evaluation_and_its_curve(data_dir, tmp_path):
    pytest.importorskip("matplotlib")
    workdir = tmp_path / "run"
    arguments = tiny_runs.train_arguments(workdir=workdir, data_dir=data_dir, cpu_devices=2, **FEW_STEPS)
    seen = lines("lmscale.train", *arguments)
    assert any("valid/exact_perplexity" in line for line in seen)
    assert any("│ tables/words/embedding " in line for line in seen)
    seen += lines("lmscale.evaluate", f"--workdir={workdir}")
    seen += lines("lmscale.plot", f"--workdir={workdir}", f"--output={tmp_path / 'curve.png'}")
    assert [line for line in seen if not OWN_LINE.match(line)] == []


def test_a_mistake_is_one_line(tmp_path):
    (line,) = lines("lmscale.evaluate", f"--workdir={tmp_path}", code=2)
    assert line.startswith(f"error: No run has started in {tmp_path}")


def test_preparing_with_a_tokenizer_that_needs_tensorflow(tmp_path):
    arguments = [
        "--input=tiny-austen/valid.txt",
        "--block_lines=10",
        "--tokenizer=wordpiece",
        "--vocab_size=500",
    ]
    assert lines("lmscale.prepare", *arguments, f"--output={tmp_path / 'data'}") == []
