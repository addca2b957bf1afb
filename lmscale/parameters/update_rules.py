"""Update rules that work on a handful of rows as well as on whole tensors.

A rule is a pure function of (weights, gradients, slots, step): it neither knows where the rows live nor creates
variables. A table applies it to the rows that a step touched; the model applies the same rule to its layers, each
of whose variables counts as one row. Keras optimizers turn a row-sparse gradient into a dense one, which makes the
cost of a step linear in vocab_size: they are not used here, Keras learning-rate schedules are.
"""

import abc
import dataclasses
import math
from typing import TypeAlias

import keras
import tensorflow as tf

LearningRate: TypeAlias = float | keras.optimizers.schedules.LearningRateSchedule


@dataclasses.dataclass(frozen=True)
class Slot:
    """One piece of optimizer state: per element of a row (`per_element`) or one value per row."""

    per_element: bool
    dtype: tf.DType = tf.float32
    initial_value: float = 0.0


class UpdateRule(abc.ABC):
    """Base of the update rules.

    Subclasses give `slots` and `update_rows`. All tensors of one call share their leading axis, the rows.
    """

    def __init__(self, *, learning_rate: LearningRate, weight_decay: float = 0.0):
        """Args:
        learning_rate: positive float, or a `keras.optimizers.schedules.LearningRateSchedule` of the run's step.
        weight_decay: fraction of the weights that an update at learning rate 1 takes away, decoupled from the gradient
          (Loshchilov & Hutter 2019, arXiv:1711.05101): w <- w - lr * weight_decay * w. Of the rows that are updated:
          a row that no step touches does not shrink.
        """
        if (
            not isinstance(learning_rate, keras.optimizers.schedules.LearningRateSchedule)
            and not learning_rate > 0
        ):
            raise ValueError(
                f"learning_rate must be positive. Received: {learning_rate}. Set LEARNING_RATE above 0."
            )
        if not 0 <= weight_decay < math.inf:
            raise ValueError(
                f"weight_decay must be finite and at least 0. Received: weight_decay={weight_decay}. Set it to 0, say."
            )
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay

    def learning_rate_at(self, step):
        """Learning rate of the update number `step` (0-based), a float32 scalar."""
        if isinstance(self.learning_rate, keras.optimizers.schedules.LearningRateSchedule):
            return tf.cast(self.learning_rate(step), tf.float32)
        return tf.constant(self.learning_rate, tf.float32)

    @property
    @abc.abstractmethod
    def slots(self):
        """{name: Slot} that the rule keeps beside each parameter."""

    def update(self, *, weights, gradients, slots, step, learning_rate=None):
        """One update.

        Args:
          weights: [rows, ...] float32.
          gradients: [rows, ...] float32, duplicates already summed.
          slots: {name: [rows, ...] or [rows]} as declared by `slots`.
          step: int scalar tensor, number of updates before this one (of any row).
          learning_rate: float32 scalar; None for that of `step`. They differ for parameters that are updated at some of
            the run's steps only: the schedule follows the run, the rule's own clock counts their updates.

        Returns:
          (new weights, {name: new slot}), shaped as received.
        """
        if learning_rate is None:
            learning_rate = self.learning_rate_at(step)
        new_weights, new_slots = self.update_rows(
            weights=weights, gradients=gradients, slots=slots, step=step, learning_rate=learning_rate
        )
        if self.weight_decay:
            new_weights -= learning_rate * self.weight_decay * weights
        return new_weights, new_slots

    @abc.abstractmethod
    def update_rows(self, *, weights, gradients, slots, step, learning_rate):
        """What `update` does before the weights decay; arguments and results as there, all of them given."""


def per_row(values, like):
    """Reshapes [rows] to broadcast against [rows, ...]."""
    return tf.reshape(values, [-1] + [1] * (len(like.shape) - 1))


class SGD(UpdateRule):
    """Stochastic gradient descent, w <- w - lr * g. Rows without gradient do not move, as in the dense rule."""

    @property
    def slots(self):
        return {}

    def update_rows(self, *, weights, gradients, slots, step, learning_rate):
        return weights - learning_rate * gradients, {}


class Adagrad(UpdateRule):
    """Adagrad: a <- a + g^2, w <- w - lr * g / (sqrt(a) + epsilon). A skipped row has g = 0: exact.

    Source: Duchi et al. 2011, "Adaptive Subgradient Methods", diagonal form.
    """

    def __init__(
        self,
        *,
        learning_rate: LearningRate,
        initial_accumulator: float = 0.1,
        epsilon: float = 1e-7,
        weight_decay: float = 0.0,
    ):
        super().__init__(learning_rate=learning_rate, weight_decay=weight_decay)
        _check_accumulator(initial_accumulator=initial_accumulator, epsilon=epsilon)
        self.initial_accumulator = initial_accumulator
        self.epsilon = epsilon

    @property
    def slots(self):
        return {"accumulator": Slot(per_element=True, initial_value=self.initial_accumulator)}

    def update_rows(self, *, weights, gradients, slots, step, learning_rate):
        accumulator = slots["accumulator"] + tf.square(gradients)
        update = learning_rate * gradients / (tf.sqrt(accumulator) + self.epsilon)
        return weights - update, {"accumulator": accumulator}


class RowWiseAdagrad(UpdateRule):
    """Adagrad with one accumulator a row: a <- a + mean(g^2). Its state is 1/embed_dim of Adagrad's.

    Source: Mudigere et al. 2022, "Software-Hardware Co-design for Fast and Scalable Training of Deep Learning
    Recommendation Models" (arXiv:2104.05158), row-wise AdaGrad.
    """

    def __init__(
        self,
        *,
        learning_rate: LearningRate,
        initial_accumulator: float = 0.1,
        epsilon: float = 1e-7,
        weight_decay: float = 0.0,
    ):
        super().__init__(learning_rate=learning_rate, weight_decay=weight_decay)
        _check_accumulator(initial_accumulator=initial_accumulator, epsilon=epsilon)
        self.initial_accumulator = initial_accumulator
        self.epsilon = epsilon

    @property
    def slots(self):
        return {"accumulator": Slot(per_element=False, initial_value=self.initial_accumulator)}

    def update_rows(self, *, weights, gradients, slots, step, learning_rate):
        squares = tf.square(gradients)
        accumulator = slots["accumulator"] + tf.reduce_mean(squares, axis=list(range(1, len(squares.shape))))
        scale = learning_rate / (tf.sqrt(accumulator) + self.epsilon)
        return weights - per_row(scale, gradients) * gradients, {"accumulator": accumulator}


class Adam(UpdateRule):
    """Adam whose second moment runs on the clock of the steps, and whose first moment on each row's own.

    A row that a step does not touch has gradient zero there. Dense Adam would decay both of its moments and go on
    moving its weights by what is left of the first; a row that nobody reads should cost nothing. Update number t
    (from 1) of a row last updated at number s, and for the n-th time:

        v <- beta_2^(t - s) v + (1 - beta_2) g^2        m <- beta_1 m + (1 - beta_1) g
        w <- w - lr * (m / (1 - beta_1^n)) / (sqrt(v / (1 - beta_2^t)) + epsilon)

    v is dense Adam's exactly: the decay of the skipped steps is caught up in closed form. m is averaged over the
    updates of the row: decaying it over skipped steps while the weights stand still would lose all but 1 - beta_1 of
    a rare row's gradient, where dense Adam pays the rest out step by step. So:

    - a row touched at every step follows dense Adam exactly;
    - with beta_1 = 0, where dense Adam has no such rest, every row follows it exactly, whatever it skips; the first
      moment is then not kept at all;
    - otherwise a rare row is as fast as under dense Adam: with gradient g at a fraction p of the steps, both move by
      lr * sqrt(p) a step.

    Source: Kingma & Ba 2015 (arXiv:1412.6980), Algorithm 1, with g = 0 on skipped steps.
    """

    def __init__(
        self,
        *,
        learning_rate: LearningRate,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        super().__init__(learning_rate=learning_rate, weight_decay=weight_decay)
        if not epsilon > 0:
            # At 0, an element whose gradients were all zero would divide zero by zero.
            raise ValueError(f"epsilon must be positive. Received: epsilon={epsilon}. Set it to 1e-8, say.")
        for name, value in (("beta_1", beta_1), ("beta_2", beta_2)):
            if not 0 <= value < 1:
                raise ValueError(f"{name} must be in [0, 1). Received: {name}={value}.")
        self.beta_1 = beta_1
        self.beta_2 = beta_2
        self.epsilon = epsilon

    @property
    def slots(self):
        slots = {
            "second_moment": Slot(per_element=True),
            # float32, which holds whole numbers up to 2**24: GPUs keep int32 variables on the host.
            "last_step": Slot(per_element=False),
        }
        if self.beta_1:
            slots["first_moment"] = Slot(per_element=True)
            slots["num_updates"] = Slot(per_element=False)
        return slots

    def update_rows(self, *, weights, gradients, slots, step, learning_rate):
        number = tf.cast(step, tf.float32) + 1
        decay = tf.exp(_log(self.beta_2) * per_row(number - slots["last_step"], gradients))
        second = decay * slots["second_moment"] + (1 - self.beta_2) * tf.square(gradients)
        new_slots = {"second_moment": second, "last_step": tf.fill(tf.shape(slots["last_step"]), number)}
        direction = gradients
        if self.beta_1:
            num_updates = slots["num_updates"] + 1
            first = self.beta_1 * slots["first_moment"] + (1 - self.beta_1) * gradients
            new_slots.update(first_moment=first, num_updates=num_updates)
            direction = first / per_row(one_minus_power(self.beta_1, num_updates), gradients)
        # sqrt(v / c) + epsilon = (sqrt(v) + epsilon * sqrt(c)) / sqrt(c)
        root = tf.sqrt(one_minus_power(self.beta_2, number))
        scale = learning_rate * root
        return weights - scale * direction / (tf.sqrt(second) + self.epsilon * root), new_slots


def _log(beta):
    """log(beta) as a Python float, -inf at 0."""
    return math.log(beta) if beta else -math.inf


def one_minus_power(beta, n):
    """1 - beta**n for n >= 0 (>= 1 at beta = 0), exact also for a beta that float32 cannot tell from 1."""
    return -tf.math.expm1(_log(beta) * n)


def _check_accumulator(*, initial_accumulator, epsilon):
    # With both at 0, an element whose gradients were all zero would divide zero by zero.
    if not (initial_accumulator >= 0 and epsilon >= 0 and initial_accumulator + epsilon > 0):
        raise ValueError(
            "initial_accumulator and epsilon must be at least 0, and one of them above it. Received: "
            f"initial_accumulator={initial_accumulator}, epsilon={epsilon}. Leave them at their defaults, say."
        )
