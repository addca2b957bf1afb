"""Memory: each measurement in a process of its own, for `lmscale.bench`."""

import dataclasses

from lmscale.benchmarks.task import TaskFailedError, run_task

_TASKS = "lmscale.benchmarks.memory_tasks"
_RULES = [("Adam", {"beta_1": 0.0}), ("RowWiseAdagrad", {})]


def measure(shape, *, vocab_size, limit_gib, log_dir, say):
    """What N devices hold, what a step and an exact evaluation take above it, and the largest vocabulary.

    Args:
      shape: `ModelShape`; its vocab_size is ignored.
      vocab_size: rows, for everything but the largest vocabulary.
      limit_gib: memory in which the largest vocabulary must train, at embed_dim 128; None to leave it out.
      log_dir: folder for what the processes print.
      say: called with a line of text for each stage.

    Returns:
      {"vocab_size", "devices": [an entry of `measure_devices` for N = 1, 2, 4, 8], "evaluation": of
      `measure_evaluation`, "largest": [an entry of `measure_largest` a rule]}.
    """
    shape = dataclasses.replace(shape, vocab_size=vocab_size)
    devices = []
    for num_devices in (1, 2, 4, 8):
        say(f"memory of {num_devices} device(s), vocabulary {vocab_size:,}")
        devices.append(
            run_task(
                f"{_TASKS}:measure_devices",
                {"shape": vars(shape), "num_devices": num_devices},
                log=log_dir / f"memory_{num_devices}.log",
            )
        )
    say("memory of an exact evaluation")
    evaluation = run_task(
        f"{_TASKS}:measure_evaluation",
        {"shape": vars(shape), "tokens": 4096},
        log=log_dir / "memory_evaluation.log",
    )
    largest = []
    for rule, options in _RULES if limit_gib else []:
        say(f"largest vocabulary in {limit_gib:g} GiB, {rule}")
        narrow = dataclasses.replace(shape, embed_dim=128, hidden_dim=128)
        arguments = {"shape": vars(narrow), "rule": rule, "options": options, "limit_gib": limit_gib}
        try:
            largest.append(
                run_task(
                    f"{_TASKS}:measure_largest",
                    arguments,
                    log=log_dir / f"largest_{rule}.log",
                    environment={"TF_ONEDNN_USE_SYSTEM_ALLOCATOR": "1"},
                )
            )
        except TaskFailedError as error:
            largest.append({"rule": rule, "options": options, "failed": str(error)})
    return {"vocab_size": vocab_size, "devices": devices, "evaluation": evaluation, "largest": largest}
