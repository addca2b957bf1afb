"""Everything that a configuration says, as one object: gin fills it in, the trainer and the evaluation read it."""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal

from lmscale.bodies.body import Body
from lmscale.factories import MayChange
from lmscale.parameters.update_rules import UpdateRule
from lmscale.softmax.head import Head


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """A run, but for where it writes and on which devices.

    A run that goes on must keep its settings, but for those that are marked with `MayChange`: how long, how often,
    where the same data lies.

    Attributes:
      data_dir: folder that `lmscale.prepare` wrote.
      train_steps: updates.
      global_batch_size: examples (lanes of text) a step, over all devices.
      window: time steps of an example.
      embed_dim: width of the vocabulary table.
      body: function of no arguments that returns a `Body`; called in the strategy's scope.
      loss: function (vocab_size=, counts=) that returns the `Head`.
      row_optimizer: rule for the table's rows.
      body_optimizer: rule for the body's variables.
      clip_norm: bound on the global norm of the gradient, over body and rows together; None for none.
      softmax_bias: whether the softmax has a bias for each row.
      initial_bias: what that bias starts from: "zeros", or the row's "log_frequency" in the training data, so that
        the first thing that training has to find out, how frequent each row is, is known to begin with.
      seed: of initial values, sampling, dropout and data order.
      compute_dtype: of matrix products; logits, sums and master values stay float32.
      deterministic_ops: ask TensorFlow for deterministic kernels, which a bit-exact rerun on GPUs needs.
      on_bad_step: what a non-finite loss or gradient does: "stop" the run, or "skip" the update.
      steps_per_call: updates done in one call of TensorFlow, which saves what a call costs the host. Results do not
        depend on it; signals are answered between calls.
      log_every, eval_every, save_every: steps between log lines, evaluations, checkpoints.
      eval_batch_size, eval_window: lanes and time steps of evaluation batches; the lanes start without context.
      probe_tokens: length of the fixed piece of training data on which sampled and exact loss are compared; 0 for none.
      keep_checkpoints: newest checkpoints kept, beside the best.
    """

    data_dir: MayChange[str]
    train_steps: MayChange[int]
    global_batch_size: int
    window: int
    embed_dim: int
    body: Callable[[], Body]
    loss: Callable[..., Head]
    row_optimizer: UpdateRule
    body_optimizer: UpdateRule
    seed: int
    log_every: MayChange[int]
    eval_every: MayChange[int]
    save_every: MayChange[int]
    steps_per_call: MayChange[int] = 1
    clip_norm: float | None = None
    softmax_bias: bool = True
    initial_bias: Literal["zeros", "log_frequency"] = "zeros"
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    deterministic_ops: bool = False
    on_bad_step: MayChange[Literal["stop", "skip"]] = "stop"
    eval_batch_size: int = 24
    eval_window: int = 70
    probe_tokens: int = 10_000
    keep_checkpoints: MayChange[int] = 3

    def __post_init__(self):
        for name in (
            "train_steps",
            "global_batch_size",
            "steps_per_call",
            "window",
            "embed_dim",
            "log_every",
            "eval_every",
            "save_every",
            "eval_batch_size",
            "eval_window",
            "keep_checkpoints",
        ):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 1. Received: {name}={getattr(self, name)}. "
                    "Give it a whole number from 1 on."
                )
        if self.seed < 0 or self.seed >= 2**31:
            raise ValueError(f"seed must be in [0, 2**31). Received: seed={self.seed}. Choose another SEED.")
        if self.probe_tokens < 0:
            raise ValueError(f"probe_tokens must be at least 0. Received: probe_tokens={self.probe_tokens}.")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"clip_norm must be positive or None. Received: clip_norm={self.clip_norm}.")
        for name, choices in (
            ("compute_dtype", ("float32", "bfloat16")),
            ("on_bad_step", ("stop", "skip")),
            ("initial_bias", ("zeros", "log_frequency")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} must be one of {choices}. Received: {name}={getattr(self, name)!r}."
                )

        if self.initial_bias != "zeros" and not self.softmax_bias:
            raise ValueError(
                "initial_bias must be 'zeros' without a bias. Received: "
                f"initial_bias={self.initial_bias!r}, softmax_bias=False. Set experiment.Experiment.initial_bias to "
                "'zeros'."
            )

    def check_learning_rates(self):
        """Raises ValueError unless both learning rates start as finite numbers, 0 or more. Runs operations."""
        for name in ("row_optimizer", "body_optimizer"):
            rate = float(getattr(self, name).learning_rate_at(0))
            if not 0 <= rate < math.inf:
                raise ValueError(
                    f"The learning rate of {name} must be finite and at least 0. Received: {rate} at the first step. "
                    "Set LEARNING_RATE and ROW_LEARNING_RATE to positive numbers."
                )

    def check_devices(self, num_devices):
        """Raises ValueError unless the global batch can be divided over `num_devices`."""
        if self.global_batch_size % num_devices:
            raise ValueError(
                "global_batch_size must be a multiple of the number of devices. Received: "
                f"global_batch_size={self.global_batch_size}, devices={num_devices}. "
                f"Set GLOBAL_BATCH_SIZE to a multiple of {num_devices}."
            )
