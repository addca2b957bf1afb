"""Memory: each measurement in a process of its own, for `lmscale.bench`."""

import dataclasses

from lmscale.benchmarks.task import TaskFailedError, run_task

_TASKS = "lmscale.benchmarks.memory_tasks"
# Memory that is in use, not what a pool keeps for later.
_ENVIRONMENT = {"TF_ONEDNN_USE_SYSTEM_ALLOCATOR": "1"}
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
      {"vocab_size", "small_vocab_size", "devices": [an entry of `measure_devices` for N = 1, 2, 4, 8], "evaluation": of
      `measure_evaluation`, "largest": [an entry of `measure_largest` a rule]}. The entries of devices and evaluation
      have "small", the same of a small vocabulary: code and graphs take as much there, so that what is left depends on
      the vocabulary.
    """
    sizes = [
        dataclasses.replace(shape, vocab_size=size)
        for size in (vocab_size, min(vocab_size, 5 * shape.num_sampled))
    ]

    def at_both_sizes(function, **arguments):
        large, small = (
            run_task(
                f"{_TASKS}:{function}",
                {"shape": vars(at_size), **arguments},
                log=log_dir / f"{function}_{at_size.vocab_size}.log",
                environment=_ENVIRONMENT,
            )
            for at_size in sizes
        )
        return large | {"small": small}

    devices = []
    for num_devices in (1, 2, 4, 8):
        say(f"memory of {num_devices} device(s), vocabulary {vocab_size:,}")
        devices.append(at_both_sizes("measure_devices", num_devices=num_devices))
    say("memory of an exact evaluation")
    evaluation = at_both_sizes("measure_evaluation", tokens=4096)
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
                    environment=_ENVIRONMENT,
                )
            )
        except TaskFailedError as error:
            largest.append({"rule": rule, "options": options, "failed": str(error)})
    return {
        "vocab_size": vocab_size,
        "small_vocab_size": sizes[1].vocab_size,
        "devices": devices,
        "evaluation": evaluation,
        "largest": largest,
    }
