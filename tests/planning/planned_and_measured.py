"""Prints the memory that the planner tells and that a run takes, of each part of a run, for 1, 2 and 4 devices.

    python tests/planning/planned_and_measured.py DATA_OF_THE_QUICKSTART [CONFIGURATION NUM_DEVICES ...]

Each device is a process of its own, so that its resident memory is that of one device. Measured are the bytes of the
variables, as allocated, and the peak of a step and of an evaluation above the memory at rest: what is there once both
have been compiled, all that is free given back. So libraries, code and graphs are left out; what TensorFlow's executor
takes for itself in a step, a mebibyte or two, is not. Linux only.
"""

import ctypes
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
LARGE = "200,000 x 128"
WIDER = "quickstart, wider"
CONFIGURATIONS = {
    "quickstart": ("quickstart.gin", []),
    "quickstart_untied": ("quickstart_untied.gin", []),
    LARGE: (
        "quickstart.gin",
        ["EMBED_DIM=128", "HIDDEN_DIM=128", "GLOBAL_BATCH_SIZE=8", "WINDOW=20"],
    ),
    # A check of the planner by what it was not compared with while it was made.
    WIDER: (
        "quickstart.gin",
        ["EMBED_DIM=160", "HIDDEN_DIM=224", "GLOBAL_BATCH_SIZE=16", "WINDOW=50", "NUM_SAMPLED=512"],
    ),
}
# Memory that is in use, not what a pool keeps for later, and given back as soon as it is free.
ENVIRONMENT = {
    "TF_ONEDNN_USE_SYSTEM_ALLOCATOR": "1",
    "MALLOC_MMAP_THRESHOLD_": "32768",
    "MALLOC_ARENA_MAX": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "CUDA_VISIBLE_DEVICES": "",
}


def measure(gin_file, bindings, coordinator, size, rank):
    """What one process of a run takes: {"variables_mib", "step_mib", "evaluation_mib"}."""
    import contextlib

    from lmscale.benchmarks.machine import reset_peak, resident_mib
    from lmscale.distribution.cluster import find_cluster
    from lmscale.distribution.process_group import ProcessGroup
    from lmscale.distribution.rendezvous import joined

    if size == 1:
        group_context = contextlib.nullcontext(ProcessGroup())
    else:
        cluster = find_cluster({}, coordinator=coordinator, num_processes=size, process_id=rank)
        group_context = joined(cluster, silence_secs=120.0)
    with group_context as group:
        from lmscale import configuration
        from lmscale.data.token_files import PreparedData
        from lmscale.distribution.strategies import make_strategy
        from lmscale.evaluation import Evaluator
        from lmscale.trainer import Trainer

        experiment = configuration.load([gin_file], bindings).experiment
        data = PreparedData.open(experiment.data_dir)
        strategy = make_strategy(cpu_devices=1, group=group)
        trainer = Trainer(experiment, data=data, strategy=strategy)
        evaluator = Evaluator.of_experiment(experiment, trainer.model, strategy=strategy)
        batches = trainer.task.evaluation_batches("valid", limit=3000)

        def steps():
            for _ in range(4):
                trainer.train_steps()["loss"].numpy()

        def peak_above_rest(function):
            ctypes.CDLL(None).malloc_trim(0)
            rest = resident_mib()[0]
            reset_peak()
            function()
            return resident_mib()[1] - rest

        steps()
        evaluator.evaluate(batches)
        return {
            "variables_mib": variable_bytes(trainer, strategy) / 2**20,
            "step_mib": peak_above_rest(steps),
            "evaluation_mib": peak_above_rest(lambda: evaluator.evaluate(batches)),
        }


def variable_bytes(trainer, strategy):
    """Of all variables of the first device of this process, as they are allocated."""
    variables = [v.value for v in trainer.model.layers.variables.values()] + list(trainer._state.variables)
    for table in trainer.model.tables.values():
        variables += table.variables().values()
    for slots in trainer.model.layer_slots.values():
        variables += slots.values()
    components = [strategy.experimental_local_results(v)[0] for v in variables]
    return sum(x.shape.num_elements() * x.dtype.size for x in components)


def planned(gin_file, bindings, num_devices):
    """The same of the planner."""
    from lmscale import configuration
    from lmscale.data.token_files import PreparedData
    from lmscale.planning.planner import make_step

    experiment = configuration.load([gin_file], bindings).experiment
    memory = make_step(
        experiment, data=PreparedData.open(experiment.data_dir), num_devices=num_devices
    ).memory
    batch = memory.lasting["batch"]
    return {
        "variables_mib": (memory.lasting_bytes - batch) / 2**20,
        "step_mib": (memory.phase_bytes(memory.largest_of_step) + batch) / 2**20,
        "evaluation_mib": memory.phase_bytes("evaluate") / 2**20,
    }


def in_processes(gin_file, bindings, num_devices):
    """(what the planner tells, the largest of what the processes of a run have measured)."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT)}

    def start(*words):
        return subprocess.Popen(
            [sys.executable, __file__, "--", *map(str, words), gin_file, json.dumps(bindings)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def result(process):
        output = process.communicate(timeout=900)[0]
        assert process.returncode == 0, output
        return json.loads(output.splitlines()[-1])

    told = result(start("planned", num_devices))
    processes = [start("measured", coordinator, num_devices, rank) for rank in range(num_devices)]
    measured = [result(process) for process in processes]
    return told, {name: max(of[name] for of in measured) for name in told}


def total_mib(of):
    """The most that a device takes."""
    return of["variables_mib"] + max(of["step_mib"], of["evaluation_mib"])


def main(data_dir, names):
    """Prints all of it; the last line of each is planned / measured of the most that a device takes."""
    with tempfile.TemporaryDirectory() as folder:
        sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "runs")]
        import tiny_runs

        large = tiny_runs.write_data(
            Path(folder) / "large",
            vocab_size=200_000,
            split_tokens={"train": 400_007, "valid": 5003, "test": 701},
        )
        for name, num_devices in names:
            gin_file, changes = CONFIGURATIONS[name]
            bindings = [f"DATA_DIR='{large if name == LARGE else data_dir}'", *changes]
            told, measured = in_processes(gin_file, bindings, num_devices)
            for part in told:
                print(
                    f"{name}, {num_devices} device(s), {part}: planned {told[part]:.2f}, {measured[part]:.2f} measured"
                )
            ratio = total_mib(told) / total_mib(measured)
            print(
                f"{name}, {num_devices} device(s), largest in all: planned / measured = {ratio:.3f}",
                flush=True,
            )


if __name__ == "__main__":
    if sys.argv[1] == "--":
        what, *words, gin, text = sys.argv[2:]
        if what == "planned":
            print(json.dumps(planned(gin, json.loads(text), int(words[0]))))
        else:
            address, number, own_rank = words
            print(json.dumps(measure(gin, json.loads(text), address, int(number), int(own_rank))))
    else:
        wanted = list(zip(sys.argv[2::2], map(int, sys.argv[3::2]), strict=True))
        main(sys.argv[1], wanted or [(name, n) for name in CONFIGURATIONS for n in (1, 2, 4)])
