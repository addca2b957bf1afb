"""When a group of parameters is updated: always, never, from a step on, or every so many steps.

Each is a pure function of the step, so nothing of it needs to be saved. At a step at which a group is inactive, its
weights and its optimizer's slots stay as they are, bit for bit, whatever the gradient. Its update rule's clock counts
the steps at which the group was active (`num_active`): Adam's moments neither decay nor lose their bias correction
while a group rests, so that a group which is updated at every k-th step follows Adam as if these were all the steps,
and one that thaws at step K starts as at step 0. Learning-rate schedules follow the run's step.
"""

import abc

import tensorflow as tf


class Activity(abc.ABC):
    """At which steps a group is updated. Steps are counted from 0, the number of updates that the run did before."""

    @abc.abstractmethod
    def at(self, step):
        """Whether the group is updated at `step`: bool scalar tensor, or a Python bool where no step matters."""

    @abc.abstractmethod
    def num_active(self, step):
        """At how many steps before `step` the group was updated, for a step at which it is: int scalar tensor."""


class Always(Activity):
    """At every step."""

    def at(self, step):
        return True

    def num_active(self, step):
        return step

    def __repr__(self):
        return "always"


class Never(Activity):
    """At no step: the parameters stay as they start, and have no optimizer state."""

    def at(self, step):
        return False

    def num_active(self, step):
        return tf.zeros_like(step)

    def __repr__(self):
        return "never"


class From(Activity):
    """At every step from number `step` on: frozen for the first `step` updates of the run."""

    def __init__(self, *, step: int):
        if step < 0:
            raise ValueError(
                f"step must be at least 0. Received: From.step={step}. Set it to 0 for no delay."
            )
        self.step = step

    def at(self, step):
        return step >= self.step

    def num_active(self, step):
        return tf.maximum(step - self.step, 0)

    def __repr__(self):
        return f"from step {self.step:,}"


class Every(Activity):
    """At `num_steps` consecutive steps of every `period`, after the first `offset` of them.

    Groups alternate if they share the period and their offsets follow each other: Every(period=2, offset=0) and
    Every(period=2, offset=1) take turns step by step.
    """

    def __init__(self, *, period: int, offset: int = 0, num_steps: int = 1):
        if not (period >= 1 and 0 <= offset < period and 1 <= num_steps <= period):
            raise ValueError(
                "period must be at least 1, offset in 0 .. period - 1 and num_steps in 1 .. period. Received: "
                f"Every.period={period}, offset={offset}, num_steps={num_steps}."
            )
        self.period = period
        self.offset = offset
        self.num_steps = num_steps

    def _phase(self, step):
        return tf.math.floormod(step - self.offset, self.period)

    def at(self, step):
        return self._phase(step) < self.num_steps

    def num_active(self, step):
        # Of whole periods since the first turn, and of this one. A turn that wraps around begins in mid-turn at step 0.
        wrapped = max(0, self.offset + self.num_steps - self.period)
        whole = tf.math.floordiv(step - self.offset, self.period)
        return whole * self.num_steps + tf.minimum(self._phase(step), self.num_steps) + wrapped

    def __repr__(self):
        steps = f"{self.num_steps} of {self.period}" if self.num_steps > 1 else f"1 of {self.period}"
        return f"{steps} steps, from {self.offset}"
