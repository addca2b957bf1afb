"""Seconds from the command to the first step, on the quickstart's configuration and on the book's own text."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lmscale import paths
from lmscale.benchmarks.task import TaskFailedError


def measure(*, repeats):
    """Prepares the book that comes with the project and starts the quickstart's training `repeats` times.

    Args:
      repeats: starts.

    Returns:
      {"secs": [...]}: until the first line of train/metrics.jsonl, written after the first step.
    """
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "2"}
    with tempfile.TemporaryDirectory() as folder:
        book, data = Path(paths.BOOKS) / "tiny-austen", Path(folder) / "data"
        splits = [f"--{split}={book / split}.txt" for split in ("train", "valid", "test")]
        _run(["lmscale.prepare", *splits, f"--output={data}", "--tokenizer=whitespace"], environment)
        seconds = []
        for i in range(repeats):
            workdir = Path(folder) / f"run{i}"
            bindings = {"DATA_DIR": f'"{data}"', "LOG_EVERY": 1}
            start = time.perf_counter()
            process = subprocess.Popen(
                [sys.executable, "-m", "lmscale.train", "--cpu_devices=4", f"--workdir={workdir}"]
                + [f"--gin_file={Path(paths.CONFIGS) / 'quickstart.gin'}"]
                + [f"--gin_param={name}={value}" for name, value in bindings.items()],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=environment,
            )
            metrics = workdir / "train" / "metrics.jsonl"
            try:
                while not (metrics.exists() and metrics.stat().st_size) and process.poll() is None:
                    time.sleep(0.02)
                seconds.append(time.perf_counter() - start)
                failed = process.poll() is not None
            finally:
                process.kill()
                _, words = process.communicate()
            if failed:
                raise TaskFailedError(f"lmscale.train ended before its first step: {words.decode()[-500:]}")
    return {"secs": seconds}


def _run(arguments, environment):
    result = subprocess.run(
        [sys.executable, "-m", *arguments], env=environment, capture_output=True, text=True, check=False
    )
    if result.returncode:
        raise TaskFailedError(
            f"{arguments[0]} ended with exit code {result.returncode}: {result.stderr[-500:]}"
        )
