"""Runs so small that a test can afford real processes: data, command lines, and ways to interrupt them."""

import contextlib
import functools
import json
import multiprocessing
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import tensorflow as tf

from lmscale import run
from lmscale.data.prepared_directory import PreparedDirectoryWriter
from lmscale.data.token_files import SPLITS
from lmscale.data.vocab import EOS, UNK, Vocabulary
from lmscale.evaluation import CheckpointEvaluator
from lmscale.restored import RestoredModel
from lmscale.workdir import Workdir

REPOSITORY = Path(__file__).parents[2]
QUICKSTART = REPOSITORY / "configs" / "quickstart.gin"

# Odd sizes: 5,003 is prime, so no number of devices divides it; the body is not as wide as the table.
VOCAB_SIZE = 5003
SPLIT_TOKENS = {"train": 6007, "valid": 701, "test": 659}
TINY_MACROS = {
    "TRAIN_STEPS": 200,
    "GLOBAL_BATCH_SIZE": 24,
    "WINDOW": 5,
    "EMBED_DIM": 8,
    "HIDDEN_DIM": 12,
    "NUM_LAYERS": 2,
    "DROPOUT": 0.3,
    "NUM_SAMPLED": 64,
    "LEARNING_RATE": 0.01,
    "ROW_LEARNING_RATE": 0.01,
    "SEED": 5,
    "LOG_EVERY": 1,
    "EVAL_EVERY": 100,
    "SAVE_EVERY": 20,
    "experiment.Experiment.keep_checkpoints": 20,
    "experiment.Experiment.probe_tokens": 301,
    "experiment.Experiment.eval_batch_size": 7,
    "next_token.NextToken.eval_window": 19,
}
DEADLINE_SECS = 900  # For one process, on a busy machine. Idle, it takes some ten seconds.


def write_data(directory, *, vocab_size=VOCAB_SIZE, split_tokens=SPLIT_TOKENS, seed=0):
    """Writes a prepared directory of made-up text in which a word says something about the next one."""
    generator = np.random.default_rng(seed)
    # Zipf's law by inverse CDF, and every other token follows from the one before it.
    ids = {}
    for name in SPLITS:
        tokens = np.exp(generator.random(split_tokens[name]) * np.log(vocab_size + 1)).astype(np.int64) - 1
        tokens[1::2] = tokens[:-1:2] * 7 % vocab_size
        ids[name] = tokens
    counts = np.bincount(ids["train"], minlength=vocab_size)
    order = np.argsort(-counts, kind="stable")
    id_of = np.argsort(order)
    words = [EOS, UNK, *(f"word{i}" for i in range(2, vocab_size))]
    vocabulary = Vocabulary(tokens=tuple(words), counts=counts[order])
    with PreparedDirectoryWriter(Path(directory)) as writer:
        splits = {}
        for name in SPLITS:
            with writer.token_file(name, vocab_size=vocab_size) as file:
                file.append(id_of[ids[name]])
            splits[name] = {**file.entry(), "tokens": len(ids[name])}
        entry = writer.write_file("vocab.txt", vocabulary.to_text().encode())
        writer.finish(
            {
                "vocabulary": {
                    **entry,
                    "size": vocab_size,
                    "eos_id": vocabulary.eos_id,
                    "unk_id": vocabulary.unk_id,
                },
                "splits": splits,
            }
        )
    return Path(directory)


def train_arguments(
    *, workdir, data_dir=None, gin_file=QUICKSTART, cpu_devices=2, bindings=TINY_MACROS, **macros
):
    """Flags of `lmscale.train`. `macros` win over `bindings`; pass bindings={} with a resolved configuration."""
    bindings = {**bindings, **macros}
    if data_dir is not None:
        bindings = {"DATA_DIR": str(data_dir), **bindings}
    return [
        f"--gin_file={gin_file}",
        f"--workdir={workdir}",
        f"--cpu_devices={cpu_devices}",
        *(f"--gin_param={name} = {value!r}" for name, value in bindings.items()),
    ]


class Process:
    """A command of lmscale in a process of its own."""

    def __init__(self, module, arguments, *, log, variables=None):
        """Starts `python -m module *arguments`; what it prints goes to files whose names start with `log`.

        `variables` of the environment come on top of this process's.
        """
        self._paths = [Path(f"{log}.{name}") for name in ("stdout", "stderr")]
        self._paths[0].parent.mkdir(parents=True, exist_ok=True)
        files = [path.open("w") for path in self._paths]
        environment = (
            os.environ | {"TF_CPP_MIN_LOG_LEVEL": "2", "CUDA_VISIBLE_DEVICES": ""} | (variables or {})
        )
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=files[0],
            stderr=files[1],
            cwd=REPOSITORY,
            env=environment,
        )
        for file in files:
            file.close()

    # While it runs, what is read may end in the middle of a character.
    @property
    def stdout(self):
        return self._paths[0].read_text(errors="replace")

    @property
    def stderr(self):
        return self._paths[1].read_text(errors="replace")

    def wait(self):
        """The exit code; a negative one names the signal that killed it."""
        try:
            return self._process.wait(timeout=DEADLINE_SECS)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"still running after {DEADLINE_SECS} s:\n{self.stderr}") from None

    def kill(self):
        self.send(signal.SIGKILL)
        self._process.wait()

    def is_running(self):
        return self._process.poll() is None

    def send(self, number):
        # Not Popen.send_signal, which polls first: a stopped process must stay as it is.
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, number)

    def wait_until(self, condition, *, poll_secs=0.01):
        """Waits until condition() is true, and returns it. The process must outlive that."""
        deadline = time.monotonic() + DEADLINE_SECS
        while not (value := condition()):
            code = self._process.poll()
            assert code is None, f"ended with {code} before the test could interrupt it:\n{self.stderr}"
            if time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"condition not met in {DEADLINE_SECS} s:\n{self.stderr}")
            time.sleep(poll_secs)
        return value


def free_ports(count):
    """Ports of the loopback interface that nobody listens at just now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def start_processes(count, module, arguments, *, log):
    """Starts a command as the processes of one run on this machine, with --cpu_devices=1 each.

    Args:
      count: number of processes.
      module, arguments: as of `Process`; or, for the arguments, a function of the rank that returns them.
      log: as of `Process`, for each with its rank behind it.

    Returns:
      List of `Process`, by rank.
    """
    arguments_of = arguments if callable(arguments) else lambda rank: arguments
    (port,) = free_ports(1)
    return [
        Process(
            module,
            [
                *arguments_of(rank),
                "--cpu_devices=1",
                f"--coordinator=127.0.0.1:{port}",
                f"--num_processes={count}",
                f"--process_id={rank}",
            ],
            log=f"{log}.{rank}",
        )
        for rank in range(count)
    ]


def finish_in_processes(size, todo, *, log):
    """Has `size` processes on this machine, with a device each, do the list `todo` of process_of_a_run.py."""
    (port,) = free_ports(1)
    script = Path(__file__).with_name("process_of_a_run.py")
    processes = []
    for rank in range(size):
        arguments = [f"127.0.0.1:{port}", str(size), str(rank), json.dumps(todo)]
        with open(f"{log}.{rank}", "w") as file:
            processes.append(
                subprocess.Popen([sys.executable, str(script), *arguments], stdout=file, stderr=file)
            )
    try:
        codes = [process.wait(DEADLINE_SECS) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0] * size, "\n".join(Path(f"{log}.{rank}").read_text()[-3000:] for rank in range(size))


def wait_for_all(processes):
    """The exit codes of all, by rank."""
    try:
        return [process.wait() for process in processes]
    finally:
        for process in processes:
            process.kill()


@functools.cache
def fork_server():
    """Starts processes by forking one that has imported TensorFlow, and done nothing with it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tensorflow", "lmscale.run", "lmscale.configuration"])
    return context


def run_forked(module, arguments, *, log):
    """Runs `python -m module *arguments` in a forked process, without the seconds that imports take.

    Returns:
      (exit code, what it printed to stdout, to stderr).
    """
    process = fork_server().Process(target=become_command, args=(module, arguments, str(log)))
    process.start()
    process.join(DEADLINE_SECS)
    if process.exitcode is None:
        process.kill()
    stdout, stderr = (Path(f"{log}.{name}").read_text() for name in ("stdout", "stderr"))
    assert process.exitcode is not None, f"still running after {DEADLINE_SECS} s:\n{stderr}"
    return process.exitcode, stdout, stderr


def become_command(module, arguments, log, cwd=REPOSITORY):
    """Makes this process the command, which prints to files whose names start with `log`."""
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        with open(f"{log}.{name}", "w") as file:
            os.dup2(file.fileno(), descriptor)
    os.chdir(cwd)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def finish(train_flags, *, log):
    """Trains to the end in a process of its own, and returns the work directory."""
    process = Process("lmscale.train", train_flags, log=log)
    assert process.wait() == 0, process.stderr
    return Path(next(flag for flag in train_flags if flag.startswith("--workdir=")).partition("=")[2])


def train_here(experiment, *, workdir, strategy, config_text="", hparams=None):
    """Trains in this process, or goes on; returns the summary."""
    with Workdir(workdir) as opened:
        return run.train(
            experiment,
            workdir=opened,
            strategy=strategy,
            config_text=config_text,
            hparams=hparams or {},
        )


def evaluate_checkpoint(experiment, *, workdir, strategy, split, checkpoint):
    """What `lmscale.evaluate` tells of a checkpoint of the run in the open `workdir`, in this process."""
    restored = RestoredModel(experiment, workdir=workdir, strategy=strategy)
    return CheckpointEvaluator(restored, split=split).evaluate(restored.step_of(checkpoint))


def evaluate(workdir, *flags, log):
    """The JSON object with which `lmscale.evaluate` ends."""
    process = Process("lmscale.evaluate", [f"--workdir={workdir}", *flags], log=log)
    assert process.wait() == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


def metrics(workdir, name="train"):
    """The lines of a run's metrics.jsonl; a last one cut short is left out."""
    path = Path(workdir) / name / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]


def without_times(lines):
    """Lines of metrics.jsonl without what differs between two runs that do the same."""
    excluded = ("wall_time", "step_secs", "tokens_per_sec", "valid/eval_secs")
    return [
        {
            tag: v
            for tag, v in line.items()
            # What moves depends on the devices, and on whether they are of one process.
            if tag not in excluded and not tag.startswith(("memory_mib/", "bytes_received/"))
        }
        for line in lines
    ]


def steps_done(workdir):
    """The last step in the metrics of a run that logs every step; 0 before the first."""
    lines = metrics(workdir)
    return lines[-1]["step"] if lines else 0


def checkpoint_steps(workdir):
    """Steps of the published checkpoints, ascending."""
    return sorted(int(path.name[5:]) for path in (Path(workdir) / "checkpoints").glob("step_*"))


def tensors(workdir, step):
    """{name: array} of a run's checkpoint, read by TensorFlow alone."""
    return tensors_of(Path(workdir) / "checkpoints" / f"step_{step:08d}")


def tensors_of(folder):
    """{name: array} of one checkpoint, read by TensorFlow alone."""
    reader = tf.train.load_checkpoint(str(folder / "tensors"))
    return {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}


def assert_same_bits(actual, expected):
    """Two {name: array} have the same names, types, shapes and bits."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert (actual[name].dtype, actual[name].shape) == (value.dtype, value.shape), name
        different = np.frombuffer(actual[name].tobytes(), np.uint8) != np.frombuffer(
            value.tobytes(), np.uint8
        )
        assert not different.any(), f"{name}: {np.count_nonzero(different)} of {different.size} bytes differ"


def go_back(finished, workdir, *, step):
    """Copies a work directory as it was at the step of an earlier checkpoint, metrics of later steps included."""
    shutil.copytree(finished, workdir)
    (workdir / "finished.json").unlink(missing_ok=True)
    for later in checkpoint_steps(workdir):
        if later > step:
            shutil.rmtree(workdir / "checkpoints" / f"step_{later:08d}")
    return workdir


def snapshot(directory):
    """{relative path: bytes} of all files below a directory but the lock, to show that nothing changed."""
    paths = [path for path in Path(directory).rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}
