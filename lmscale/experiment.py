"""Everything that a configuration says, as one object: gin fills it in, the trainer and the evaluation read it."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

from lmscale.factories import MayChange
from lmscale.keras_settings import POLICIES
from lmscale.loss_scaling import LossScaling
from lmscale.parameters.groups import Group
from lmscale.parameters.warm_start import WarmStart
from lmscale.tasks.task import Task, TaskContext


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """A run, but for where it writes and on which devices.

    A run that goes on must keep its settings, but for those that are marked with `MayChange`: how long, how often,
    where the same data lies.

    Attributes:
      data_dir: folder that `lmscale.prepare` wrote.
      task: function of a `TaskContext` that returns the `Task`; called in the strategy's scope.
      groups: how parameters are updated, frozen, clipped and initialised, in order (`parameters/groups.py`).
      warm_start: parameters of another run's checkpoint that this one starts from; None for none. Not read on resume.
      train_steps: updates.
      global_batch_size: examples a step, over all devices.
      gradient_accumulation_steps: parts into which the examples of each device are cut, to be computed one after the
        other: less memory for activations and logits, the same step up to rounding.
      clip_norm: bound on the global norm of the gradient, over all parameters together; None for none.
      seed: of initial values, sampling, dropout and data order.
      compute_dtype: of matrix products, in all parts that say nothing else; logits, sums and master values stay
        float32. With "float16" the loss is scaled (`loss_scaling.py`).
      loss_scaling: how the scale starts and grows; None for the defaults. Of "float16" only.
      deterministic_ops: ask TensorFlow for deterministic kernels, which a bit-exact rerun on GPUs needs.
      on_bad_step: what a non-finite loss or gradient does: "stop" the run, or "skip" the update.
      steps_per_call: updates done in one call of TensorFlow, which saves what a call costs the host. Results do not
        depend on it; signals are answered between calls.
      log_every, eval_every, save_every: steps between log lines, evaluations, checkpoints.
      eval_batch_size: examples of an evaluation batch; of text, lanes that each start without context.
      eval_tokens: tokens of the validation split that the evaluations inside the run predict, always the first ones,
        the last evaluation included; None for all. (`lmscale.evaluate` takes the whole split.)
      evaluate_averages: evaluate the averages of weights in place of the weights, where a group's rule is `Averaged`.
      probe_tokens: length of the fixed piece of training data on which training and exact loss are compared; 0 for
        none.
      keep_checkpoints: newest checkpoints kept, beside the best.
    """

    data_dir: MayChange[str]
    task: Callable[[TaskContext], Task]
    groups: Sequence[Group]
    train_steps: MayChange[int]
    global_batch_size: int
    seed: int
    log_every: MayChange[int]
    eval_every: MayChange[int]
    save_every: MayChange[int]
    steps_per_call: MayChange[int] = 1
    warm_start: WarmStart | None = None
    gradient_accumulation_steps: int = 1
    clip_norm: float | None = None
    compute_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    loss_scaling: LossScaling | None = None
    deterministic_ops: bool = False
    on_bad_step: MayChange[Literal["stop", "skip"]] = "stop"
    eval_batch_size: int = 24
    eval_tokens: int | None = None
    evaluate_averages: bool = False
    probe_tokens: int = 10_000
    keep_checkpoints: MayChange[int] = 3

    def __post_init__(self):
        for name in (
            "train_steps",
            "global_batch_size",
            "steps_per_call",
            "gradient_accumulation_steps",
            "log_every",
            "eval_every",
            "save_every",
            "eval_batch_size",
            "keep_checkpoints",
        ):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 1. Received: {name}={getattr(self, name)}. "
                    "Give it a whole number from 1 on."
                )
        if self.seed < 0 or self.seed >= 2**31:
            raise ValueError(f"seed must be in [0, 2**31). Received: seed={self.seed}. Choose another SEED.")
        if self.eval_tokens is not None and self.eval_tokens < 1:
            raise ValueError(
                f"eval_tokens must be at least 1 or None. Received: eval_tokens={self.eval_tokens}."
            )
        if self.probe_tokens < 0:
            raise ValueError(f"probe_tokens must be at least 0. Received: probe_tokens={self.probe_tokens}.")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"clip_norm must be positive or None. Received: clip_norm={self.clip_norm}.")
        for name, choices in (
            ("compute_dtype", tuple(POLICIES)),
            ("on_bad_step", ("stop", "skip")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} must be one of {choices}. Received: {name}={getattr(self, name)!r}."
                )

        if self.loss_scaling is not None and self.compute_dtype != "float16":
            raise ValueError(
                "loss_scaling must be None unless compute_dtype is 'float16': other products need no scale. Received: "
                f"compute_dtype={self.compute_dtype!r}, loss_scaling={self.loss_scaling}."
            )

    def check_devices(self, num_devices):
        """Raises ValueError unless the global batch can be divided over `num_devices`, and their parts of it."""
        parts = num_devices * self.gradient_accumulation_steps
        if self.global_batch_size % parts:
            times = (
                f" x {self.gradient_accumulation_steps} gradient_accumulation_steps"
                if parts > num_devices
                else ""
            )
            raise ValueError(
                "global_batch_size must be a multiple of the number of devices"
                f"{' times gradient_accumulation_steps' if times else ''}. Received: "
                f"global_batch_size={self.global_batch_size}, devices={num_devices}{times}. "
                f"Set GLOBAL_BATCH_SIZE to a multiple of {parts}."
            )
