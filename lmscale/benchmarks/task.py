"""A measurement in a process of its own, so that none finds what another has left in memory.

`run_task("lmscale.benchmarks.limits:measure", {...})` runs `measure(**{...})` in a new process; both the arguments and
the result travel as JSON.
"""

import importlib
import json
import os
import subprocess
import sys


def common_environment():
    """Environment variables of every process that is measured: of GPUs the first alone, and float32 for float32."""
    return {
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0],
        # Processes that take turns share it.
        "TF_FORCE_GPU_ALLOW_GROWTH": "true",
        # TensorFlow would multiply float32 in TensorFloat-32 where PyTorch does not.
        "NVIDIA_TF32_OVERRIDE": "0",
    }


class TaskFailedError(Exception):
    """The process ended badly; the message has its last words."""


def run_task(function, arguments, *, log, environment=None):
    """Runs `function`, "module:name", with keyword `arguments`; its notices go to the file `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        result = subprocess.run(
            [sys.executable, "-m", "lmscale.benchmarks.task", function, json.dumps(arguments)],
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
            check=False,
            env=os.environ | common_environment() | (environment or {}),
        )
    if result.returncode:
        words = log.read_text(errors="replace").strip().splitlines()
        raise TaskFailedError(
            f"{function} ended with exit code {result.returncode}: {words[-1] if words else 'no words'}"
        )
    return json.loads(result.stdout.splitlines()[-1])


def answers_pipe():
    """The process's stdout for answers alone; what libraries print there goes to stderr from now on."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return answers


def _main():
    answers = answers_pipe()
    module, name = sys.argv[1].split(":")
    result = getattr(importlib.import_module(module), name)(**json.loads(sys.argv[2]))
    answers.write(json.dumps(result) + "\n")
    answers.flush()


if __name__ == "__main__":
    _main()
