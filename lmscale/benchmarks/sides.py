"""The sides of a comparison, each in a process of its own, and how they take turns."""

import contextlib
import dataclasses
import importlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from lmscale.benchmarks.machine import total_bytes
from lmscale.benchmarks.peers.peer import ModelShape
from lmscale.benchmarks.task import common_environment


@dataclasses.dataclass(frozen=True)
class Side:
    """One thing to compare.

    Attributes:
      title: what the report calls it.
      factory: "module:class" of its `Peer`.
      floats_a_row: float32 values that it holds for each row and each of its columns: weight, gradient, slots.
      needs: what must be installed, beside lmscale.
      full_logits: arrays of [tokens, vocab_size] that its step holds at once.
      largest_vocab_size: beyond which it is not worth its time and memory; None for no end.
      options: arguments of the class.
      environment: environment variables of its process.
    """

    title: str
    factory: str
    floats_a_row: int
    needs: str = "tensorflow"
    full_logits: int = 0
    largest_vocab_size: int | None = None
    options: dict = dataclasses.field(default_factory=dict)
    environment: dict = dataclasses.field(default_factory=dict)

    def memory_bytes(self, shape):
        """Roughly what its process takes, at its peak."""
        rows = shape.vocab_size * shape.embed_dim * self.floats_a_row
        logits = shape.vocab_size * shape.tokens * self.full_logits
        return 4 * (rows + logits) + (1 << 30)

    def is_installed(self):
        """Whether its library can be imported."""
        return importlib.util.find_spec(self.needs) is not None

    def build(self, shape):
        """Makes its `Peer`, in this process."""
        module, name = self.factory.split(":")
        return getattr(importlib.import_module(module), name)(shape, **self.options)


_TURN_SECS, _TURN_CALLS = 0.5, 10
_SLOW_SECS, _SLOW_REPEATS = 4.0, 3
_OWN, PEERS = "lmscale.benchmarks.own_step", "lmscale.benchmarks.peers"
# glibc gives blocks this large back to the system and faults them in again at every step; with these it does not,
# which makes PyTorch's full softmax faster. PyTorch's tuning guide has other allocators for it.
KEEPING_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": "4294967295",
    "MALLOC_TRIM_THRESHOLD_": "8589934591",
    "MALLOC_TOP_PAD_": "1073741824",
}
_BFLOAT16 = {"compute_dtype": "bfloat16"}
_PYTORCH_FULL = Side(
    "PyTorch, full softmax, SGD",
    f"{PEERS}.pytorch_full_softmax:PytorchFullSoftmax",
    needs="torch",
    floats_a_row=2,
    largest_vocab_size=472_706,
    full_logits=4,
)

SIDES = {
    "lmscale": Side("lmscale", f"{_OWN}:Lmscale", floats_a_row=2),
    "lmscale_bfloat16": Side(
        "lmscale, bfloat16 products", f"{_OWN}:Lmscale", floats_a_row=2, options=_BFLOAT16
    ),
    "lmscale_two_moments": Side(
        "lmscale, Adam with both moments",
        f"{_OWN}:Lmscale",
        floats_a_row=3,
        largest_vocab_size=1_000_000,
        options={"two_moments": True},
    ),
    "lmscale_several_steps": Side(
        "lmscale, 10 steps a call",
        f"{_OWN}:Lmscale",
        floats_a_row=2,
        largest_vocab_size=33_278,
        options={"steps_per_call": 10},
    ),
    "lmscale_body": Side(
        "lmscale, the body alone", f"{_OWN}:LmscaleBody", floats_a_row=0, largest_vocab_size=33_278
    ),
    "lmscale_body_bfloat16": Side(
        "lmscale, the body alone, bfloat16 products",
        f"{_OWN}:LmscaleBody",
        floats_a_row=0,
        largest_vocab_size=33_278,
        options=_BFLOAT16,
    ),
    "pytorch_full": _PYTORCH_FULL,
    "pytorch_full_keeping_memory": dataclasses.replace(
        _PYTORCH_FULL,
        title=f"{_PYTORCH_FULL.title}, an allocator that keeps its memory",
        environment=KEEPING_MEMORY,
    ),
    "pytorch_full_bfloat16": dataclasses.replace(
        _PYTORCH_FULL,
        title=f"{_PYTORCH_FULL.title}, bfloat16 autocast, an allocator that keeps its memory",
        options={"autocast": True},
        environment=KEEPING_MEMORY,
    ),
    "pytorch_adaptive": Side(
        "PyTorch, AdaptiveLogSoftmaxWithLoss, SGD",
        f"{PEERS}.pytorch_adaptive_softmax:PytorchAdaptiveSoftmax",
        needs="torch",
        floats_a_row=3,
        largest_vocab_size=1_000_000,
    ),
    "keras_full": Side(
        "Keras, full softmax, Adam",
        f"{PEERS}.keras_full_softmax:KerasFullSoftmax",
        floats_a_row=6,
        largest_vocab_size=100_000,
        full_logits=5,
    ),
    "tensorflow_adagrad": Side(
        "tf.nn.sampled_softmax_loss, Keras Adagrad",
        f"{PEERS}.tensorflow_sampled_softmax:TensorflowSampledSoftmax",
        floats_a_row=5,
        largest_vocab_size=1_000_000,
        options={"optimizer": "Adagrad"},
    ),
    "tensorflow_adam": Side(
        "tf.nn.sampled_softmax_loss, Keras Adam",
        f"{PEERS}.tensorflow_sampled_softmax:TensorflowSampledSoftmax",
        floats_a_row=6,
        largest_vocab_size=1_000_000,
        options={"optimizer": "Adam"},
    ),
}


class SideFailedError(Exception):
    """A side's process died; the message has its last words."""


class SideProcess:
    """A side in a process of its own, idle until it is asked for steps."""

    def __init__(self, name: str, shape: ModelShape, *, log_dir: Path):
        """Starts it and waits until it has built its model and done its first step."""
        self.name = name
        self._log = log_dir / f"{name}_{shape.vocab_size}.log"
        log_dir.mkdir(parents=True, exist_ok=True)
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "lmscale.benchmarks.worker", name, json.dumps(vars(shape))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | common_environment() | environment_of(name, shape),
            )
        try:
            self._answer()
        except BaseException:
            self.close()
            raise

    def turn(self):
        """Calls for half a second, at most ten, and returns the median seconds of a step.

        There are two at least, and the first does not count: it finds the caches, and perhaps the memory, as the side
        before has left them.
        """
        calls = []
        while len(calls) < 2 or (
            sum(call["call_secs"] for call in calls) < _TURN_SECS and len(calls) < _TURN_CALLS
        ):
            # A process that is gone has closed its end; it says why on the other pipe.
            with contextlib.suppress(OSError):
                self._process.stdin.write("step\n")
                self._process.stdin.flush()
            calls.append(self._answer())
        return statistics.median(call["step_secs"] for call in calls[1:])

    def _answer(self):
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            words = self._log.read_text(errors="replace").strip().splitlines()
            raise SideFailedError(
                f"{self.name} ended with exit code {self._process.returncode}: {words[-1] if words else 'no words'}"
            )
        return json.loads(line)

    def close(self):
        """Ends the process."""
        self._process.kill()
        self._process.communicate()


def environment_of(name, shape):
    """Environment variables of a side's process, beside those that all have."""
    variables = {}
    # By what the machine has, not by what is free just now: the allocator makes a side faster or slower.
    if SIDES[name].memory_bytes(shape) > total_bytes() / 3:
        # TensorFlow's own allocator takes memory in powers of two, which leaves no room for a second large table.
        variables["TF_ONEDNN_USE_SYSTEM_ALLOCATOR"] = "1"
    return variables | SIDES[name].environment


def take_turns(processes, *, repeats):
    """Lets every process step in rounds: a slow moment of the machine falls on all of them alike.

    Args:
      processes: list of `SideProcess`.
      repeats: rounds; sides whose steps take over 4 s only take part in the first three.

    Returns:
      ({name: [step seconds of a round, ...]}, without a first round of warming up; {name: why it died on the way}).
    """
    seconds = {p.name: [] for p in processes}
    slow, died = set(), {}
    for i in range(repeats + 1):
        for p in processes:
            if p.name in died or (p.name in slow and len(seconds[p.name]) >= _SLOW_REPEATS):
                continue
            try:
                step_secs = p.turn()
            except SideFailedError as error:
                died[p.name] = str(error)
                continue
            if i and step_secs > _SLOW_SECS:
                slow.add(p.name)
            if i:
                seconds[p.name].append(step_secs)
    return {name: listed for name, listed in seconds.items() if name not in died}, died


def summary(seconds):
    """Median, least and largest of the rounds' seconds, and how many there are."""
    return {
        "median": statistics.median(seconds),
        "min": min(seconds),
        "max": max(seconds),
        "rounds": len(seconds),
    }


def paired_ratio(seconds, reference):
    """Median over the rounds of seconds / reference: both sides of each ratio saw the same moment."""
    return statistics.median(s / r for s, r in zip(seconds, reference, strict=False))
