"""Dynamic loss scaling: keeps the small gradients of float16 products from vanishing.

float16 has no numbers between 0 and 6e-8, and most gradients of a mean over many tokens lie there. So the loss whose
gradients are taken is multiplied by a scale, and every gradient divided by it once it is float32 again, before norms
and clipping. Too large a scale overflows: that step is left out and the scale halved. After enough good steps it is
doubled. All scales are powers of two, so that neither product nor quotient rounds.

Source: Micikevicius et al. 2018 (arXiv:1710.03740), sections 3.2 and 3.3.
"""

import dataclasses
import math

import tensorflow as tf

from lmscale.distribution import collectives

SMALLEST_SCALE = 1.0
# Far from float32's own overflow, even where a gradient has gone through float32 alone.
LARGEST_SCALE = 2.0**24


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossScaling:
    """How the scale starts and grows; `Experiment.loss_scaling`.

    Attributes:
      initial_scale: scale of the first step, a power of two from 1 to 2**24.
      growth_steps: good steps in a row after which the scale doubles.
    """

    initial_scale: float = 2.0**15
    growth_steps: int = 2000

    def __post_init__(self):
        scale = self.initial_scale
        if not SMALLEST_SCALE <= scale <= LARGEST_SCALE or math.frexp(scale)[0] != 0.5:
            raise ValueError(
                f"initial_scale must be a power of two from 1 to 2**24. Received: initial_scale={scale}. "
                "Leave it out for 2**15."
            )
        if self.growth_steps < 1:
            raise ValueError(
                f"growth_steps must be at least 1. Received: growth_steps={self.growth_steps}. Leave it out for 2000."
            )


class LossScale:
    """The scale of a run and its counter of good steps, a copy on each device. Make it in the strategy's scope.

    Attributes:
      variables: {"loss_scale": float32 scalar, "good_steps": int32 scalar}, of the run's state.
    """

    def __init__(self, scaling):
        """Args:
        scaling: `LossScaling`.
        """
        self._growth_steps = scaling.growth_steps
        self.variables = {
            "loss_scale": tf.Variable(scaling.initial_scale, dtype=tf.float32, trainable=False),
            "good_steps": tf.Variable(0, dtype=tf.int32, trainable=False),
        }

    def read(self):
        """The scale of this step, float32 scalar. In `strategy.run`."""
        return collectives.local_value(self.variables["loss_scale"]).read_value()

    def update(self, *, loss_is_finite, gradient_is_finite):
        """Sets the scale of the next step; every replica must give the same. In `strategy.run`.

        Args:
          loss_is_finite: bool scalar. No scale helps a loss that is not, which is computed without one.
          gradient_is_finite: bool scalar, of all replicas' gradients together.

        Returns:
          bool scalar: whether the step is one whose gradients overflowed, and a smaller scale may help.

        Communication: none.
        """
        scale_variable, steps_variable = (collectives.local_value(v) for v in self.variables.values())
        scale, good_steps = scale_variable.read_value(), steps_variable.read_value() + 1
        is_good = loss_is_finite & gradient_is_finite
        overflowed = loss_is_finite & ~gradient_is_finite & (scale > SMALLEST_SCALE)
        is_due = good_steps >= self._growth_steps
        grown = tf.where(is_due, tf.minimum(2 * scale, LARGEST_SCALE), scale)
        scale_variable.assign(tf.where(is_good, grown, tf.where(overflowed, scale / 2, scale)))
        steps_variable.assign(tf.where(is_good & ~is_due, good_steps, 0))
        return overflowed


def unscaled(gradients, scale):
    """A structure of gradients of the scaled loss to those of the loss: float32, None where None."""
    inverse = 1 / scale
    return tf.nest.map_structure(lambda g: None if g is None else tf.cast(g, tf.float32) * inverse, gradients)
