"""Runs in several processes of which a test can afford many: forked, tiny, and with faults put in."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import tiny_runs

LOST, STOPPED, USAGE, INTERRUPTED = 69, 75, 2, 130
PROMISED_SECS = 30  # Within which all processes of a run have ended after one is lost.
LAST_STEP = 200
SAVE_EVERY = 20
MACROS = {
    **tiny_runs.TINY_MACROS,
    "TRAIN_STEPS": LAST_STEP,
    "SAVE_EVERY": SAVE_EVERY,
    "EVAL_EVERY": 1000,
    "NUM_LAYERS": 1,
    "experiment.Experiment.probe_tokens": 0,
}


def write_data(directory, *, seed=0):
    sizes = {"train": 3001, "valid": 211, "test": 157}
    return tiny_runs.write_data(directory, vocab_size=503, split_tokens=sizes, seed=seed)


def arguments(*, workdir, data_dir, **macros):
    """Flags of `lmscale.train`, but for those which say how many devices and processes."""
    flags = tiny_runs.train_arguments(workdir=workdir, data_dir=data_dir, bindings=MACROS, **macros)
    return [flag for flag in flags if not flag.startswith("--cpu_devices")]


class Forked(tiny_runs.Process):
    """A command of lmscale in a process forked from one that has imported TensorFlow."""

    def __init__(self, module, arguments, *, log, cwd=tiny_runs.REPOSITORY, before=None):
        """`before`: called in the process before the command; it can be pickled."""
        self._paths = [Path(f"{log}.{name}") for name in ("stdout", "stderr")]
        self._paths[0].parent.mkdir(parents=True, exist_ok=True)
        for path in self._paths:
            path.write_text("")
        process = tiny_runs.fork_server().Process(
            target=_become_command, args=(module, arguments, str(log), str(cwd), before)
        )
        process.start()
        self._process = _LikePopen(process)


class _LikePopen:
    def __init__(self, process):
        self._process = process
        self.pid = process.pid

    def wait(self, timeout=None):
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("forked", timeout)
        return self._process.exitcode

    def poll(self):
        return self._process.exitcode


def _become_command(module, arguments, log, cwd, before):
    # What is started in a terminal by `python -m` has these; a forked process has what its server had.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    if before is not None:
        before()
    tiny_runs.become_command(module, arguments, log, cwd=cwd)


def start(
    count, *, workdir, data_dir, log, ranks=None, flags=(), of_rank=None, before=None, cwd=None, **macros
):
    """Starts a run as `count` processes.

    Args:
      ranks: those that are started; all by default.
      flags: more flags for every process.
      of_rank: {rank: more flags for that process}.
      before: {rank: function to call in that process first}.
      cwd: {rank: directory that this process is started in}.

    Returns:
      List of `Forked`, by rank.
    """
    (port,) = tiny_runs.free_ports(1)
    common = arguments(workdir=workdir, data_dir=data_dir, **macros)
    return [
        Forked(
            "lmscale.train",
            [
                *common,
                "--cpu_devices=1",
                f"--coordinator=127.0.0.1:{port}",
                f"--num_processes={count}",
                f"--process_id={rank}",
                *flags,
                *(of_rank or {}).get(rank, ()),
            ],
            log=f"{log}.{rank}",
            before=(before or {}).get(rank),
            cwd=(cwd or {}).get(rank, tiny_runs.REPOSITORY),
        )
        for rank in (range(count) if ranks is None else ranks)
    ]


def until_step(processes, step):
    """Waits until this start of a run has logged a step, or a later one."""
    # Not in metrics.jsonl, which may hold the steps of an earlier start still.
    logged = re.compile(r"\] step (\d+)  sampled_loss")
    processes[0].wait_until(
        lambda: any(int(number) >= step for number in logged.findall(processes[0].stderr))
    )


def errors(process):
    """The messages with which a process ends."""
    return re.findall(r"^error: (.*)$", process.stderr, re.MULTILINE)


# ------------------------------------------------------------------------ What is put into a process before it runs


def save_in_small_blocks():
    """Has every process write some of each save, as where tables are large."""
    from lmscale.checkpoints.directory import Checkpoints

    Checkpoints.__init__.__kwdefaults__["block_mib"] = 1e-3


def die_in_save(operation):
    """Kills this process in its second save, when it is about to call an operation of `tf.raw_ops`."""
    import tensorflow as tf

    from lmscale.checkpoints.directory import Checkpoints

    save_in_small_blocks()
    save, function = Checkpoints.save, getattr(tf.raw_ops, operation)
    num_saves = 0

    def counted_save(self, *args, **kwargs):
        nonlocal num_saves
        num_saves += 1
        return save(self, *args, **kwargs)

    def deadly(*args, **kwargs):
        if num_saves == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    Checkpoints.save = counted_save
    setattr(tf.raw_ops, operation, deadly)


def die_in_restore():
    """Kills this process when it is about to read a second time from a checkpoint."""
    import tensorflow as tf

    save_in_small_blocks()
    function = tf.raw_ops.RestoreV2
    num_calls = 0

    def deadly(*args, **kwargs):
        nonlocal num_calls
        num_calls += 1
        if num_calls == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    tf.raw_ops.RestoreV2 = deadly


def sleep_in_saves(secs):
    """Makes each save of this process take so long."""
    from lmscale.checkpoints.directory import Checkpoints

    save = Checkpoints.save

    def slow(self, *args, **kwargs):
        time.sleep(secs)
        return save(self, *args, **kwargs)

    Checkpoints.save = slow


def sleep_before_training(secs):
    """Makes this process say that it builds its model, and take so long to begin."""
    from lmscale.trainer import Trainer

    build = Trainer.__init__

    def slow(self, *args, **kwargs):
        print("building", file=sys.stderr, flush=True)
        time.sleep(secs)
        build(self, *args, **kwargs)

    Trainer.__init__ = slow


def fail_at_step(step):
    """Makes this process raise an error that nobody expects."""
    from lmscale.trainer import Trainer

    train_steps = Trainer.train_steps

    def failing(self, *args, **kwargs):
        if self.step == step:
            raise RuntimeError("a bug\nof two lines")
        return train_steps(self, *args, **kwargs)

    Trainer.train_steps = failing


def claim_version(version):
    """Makes this process one of another version of lmscale."""
    from lmscale.distribution import rendezvous

    rendezvous.__version__ = version


def look_for_shared_files(secs):
    """Sets how long this process waits for a file that another one wrote."""
    from lmscale import workdir

    workdir._SHARED_SECS = secs


def fill_disk_in_save(number):
    """Lets no file of this process grow from its n-th save on: what a disk lets grow that is full."""
    import resource

    from lmscale.checkpoints.directory import Checkpoints

    save_in_small_blocks()
    save = Checkpoints.save
    num_saves = 0

    def full(self, *args, **kwargs):
        nonlocal num_saves
        num_saves += 1
        if num_saves == number:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
        try:
            return save(self, *args, **kwargs)
        finally:  # So that the process can say it.
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    Checkpoints.save = full


def take_files_for_a_store():
    """Has this process use file://localhost/x as a store, which all see at /x. An owner is soon taken for gone."""
    from lmscale import paths, storage

    save_in_small_blocks()
    expand = paths.expand

    def kept(path, **kwargs):
        return path if str(path).startswith("file://localhost/") else expand(path, **kwargs)

    paths.expand = storage.expand = kept
    storage.SETTLE_SECS, storage.STALE_SECS = 0.5, 12.0  # Renewed every other second.
