"""Update rules that work on a handful of rows as well as on whole tensors.

A rule is a pure function of (weights, gradients, slots, step): it neither knows where the rows live nor creates
variables. The table applies it to the rows that a step touched; the trainer applies the same rule to the body, each
of whose variables counts as one row. Keras optimizers turn a row-sparse gradient into a dense one, which makes the
cost of a step linear in vocab_size: they are not used here, Keras learning-rate schedules are.
"""

import abc
import dataclasses
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


class RowOptimizer(abc.ABC):
    """Base of the update rules.

    Subclasses give `slots` and `update_rows`. All tensors of one call share their leading axis, the rows.
    """

    def __init__(self, *, learning_rate: LearningRate):
        """Args:
        learning_rate: positive float, or a `keras.optimizers.schedules.LearningRateSchedule` of the step.
        """
        if (
            not isinstance(learning_rate, keras.optimizers.schedules.LearningRateSchedule)
            and not learning_rate > 0
        ):
            raise ValueError(
                f"learning_rate must be positive. Received: {learning_rate}. Set LEARNING_RATE above 0."
            )
        self.learning_rate = learning_rate

    def learning_rate_at(self, step):
        """Learning rate of the update number `step` (0-based), a float32 scalar."""
        if isinstance(self.learning_rate, keras.optimizers.schedules.LearningRateSchedule):
            return tf.cast(self.learning_rate(step), tf.float32)
        return tf.constant(self.learning_rate, tf.float32)

    @property
    @abc.abstractmethod
    def slots(self):
        """{name: Slot} that the rule keeps beside each parameter."""

    @abc.abstractmethod
    def update_rows(self, *, weights, gradients, slots, step):
        """One update.

        Args:
          weights: [rows, ...] float32.
          gradients: [rows, ...] float32, duplicates already merged.
          slots: {name: [rows, ...] or [rows]} as declared by `slots`.
          step: int scalar tensor, number of updates before this one (of any row).

        Returns:
          (new weights, {name: new slot}), shaped as received.
        """


def _per_row(values, like):
    """Reshapes [rows] to broadcast against [rows, ...]."""
    return tf.reshape(values, [-1] + [1] * (len(like.shape) - 1))


class SGD(RowOptimizer):
    """Stochastic gradient descent, w <- w - lr * g. Rows without gradient do not move, as in the dense rule."""

    @property
    def slots(self):
        return {}

    def update_rows(self, *, weights, gradients, slots, step):
        return weights - self.learning_rate_at(step) * gradients, {}


class Adagrad(RowOptimizer):
    """Adagrad: a <- a + g^2, w <- w - lr * g / (sqrt(a) + epsilon). A skipped row has g = 0: exact.

    Source: Duchi et al. 2011, "Adaptive Subgradient Methods", diagonal form.
    """

    def __init__(
        self, *, learning_rate: LearningRate, initial_accumulator: float = 0.1, epsilon: float = 1e-7
    ):
        super().__init__(learning_rate=learning_rate)
        _check_accumulator(initial_accumulator=initial_accumulator, epsilon=epsilon)
        self.initial_accumulator = initial_accumulator
        self.epsilon = epsilon

    @property
    def slots(self):
        return {"accumulator": Slot(per_element=True, initial_value=self.initial_accumulator)}

    def update_rows(self, *, weights, gradients, slots, step):
        accumulator = slots["accumulator"] + tf.square(gradients)
        update = self.learning_rate_at(step) * gradients / (tf.sqrt(accumulator) + self.epsilon)
        return weights - update, {"accumulator": accumulator}


class RowWiseAdagrad(RowOptimizer):
    """Adagrad with one accumulator a row: a <- a + mean(g^2). Its state is 1/embed_dim of Adagrad's.

    Source: Mudigere et al. 2022, "Software-Hardware Co-design for Fast and Scalable Training of Deep Learning
    Recommendation Models" (arXiv:2104.05158), row-wise AdaGrad.
    """

    def __init__(
        self, *, learning_rate: LearningRate, initial_accumulator: float = 0.1, epsilon: float = 1e-7
    ):
        super().__init__(learning_rate=learning_rate)
        _check_accumulator(initial_accumulator=initial_accumulator, epsilon=epsilon)
        self.initial_accumulator = initial_accumulator
        self.epsilon = epsilon

    @property
    def slots(self):
        return {"accumulator": Slot(per_element=False, initial_value=self.initial_accumulator)}

    def update_rows(self, *, weights, gradients, slots, step):
        squares = tf.square(gradients)
        accumulator = slots["accumulator"] + tf.reduce_mean(squares, axis=list(range(1, len(squares.shape))))
        scale = self.learning_rate_at(step) / (tf.sqrt(accumulator) + self.epsilon)
        return weights - _per_row(scale, gradients) * gradients, {"accumulator": accumulator}


class Adam(RowOptimizer):
    """Adam whose moments are, on every row and at every step, those of dense Adam.

    A row that a step does not touch has gradient zero there, so dense Adam would only decay its moments:
    k skipped steps multiply them by beta_1^k and beta_2^k. Each row therefore keeps the step of its last update and
    catches the decay up, in closed form, when it is next touched:

        k = t - last_step
        m <- beta_1^k m + (1 - beta_1) g          v <- beta_2^k v + (1 - beta_2) g^2
        w <- w - lr * (m / (1 - beta_1^t)) / (sqrt(v / (1 - beta_2^t)) + epsilon)

    m, v and the bias correction equal the dense rule's exactly; the weight moves on the touched steps alone, so that
    a row which nobody reads costs nothing. (The usual "lazy" form leaves out the decay: a rare row then meets a
    first moment from thousands of steps ago at full size.)

    Source: Kingma & Ba 2015 (arXiv:1412.6980), Algorithm 1, with g = 0 on skipped steps.
    """

    def __init__(
        self,
        *,
        learning_rate: LearningRate,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-8,
    ):
        super().__init__(learning_rate=learning_rate)
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
        return {
            "first_moment": Slot(per_element=True),
            "second_moment": Slot(per_element=True),
            "last_step": Slot(per_element=False, dtype=tf.int32),
        }

    def update_rows(self, *, weights, gradients, slots, step):
        step = tf.cast(step, tf.int32) + 1
        elapsed = _per_row(tf.cast(step - slots["last_step"], tf.float32), gradients)
        beta_1 = tf.constant(self.beta_1, tf.float32)
        beta_2 = tf.constant(self.beta_2, tf.float32)
        first = tf.pow(beta_1, elapsed) * slots["first_moment"] + (1 - self.beta_1) * gradients
        second = tf.pow(beta_2, elapsed) * slots["second_moment"] + (1 - self.beta_2) * tf.square(gradients)
        t = tf.cast(step, tf.float32)
        correction = tf.sqrt(1 - tf.pow(beta_2, t)) / (1 - tf.pow(beta_1, t))
        scaled_epsilon = self.epsilon * tf.sqrt(1 - tf.pow(beta_2, t))
        new_weights = weights - self.learning_rate_at(step - 1) * correction * first / (
            tf.sqrt(second) + scaled_epsilon
        )
        new_slots = {
            "first_moment": first,
            "second_moment": second,
            "last_step": tf.fill(tf.shape(slots["last_step"]), step),
        }
        return new_weights, new_slots


def _check_accumulator(*, initial_accumulator, epsilon):
    # With both at 0, an element whose gradients were all zero would divide zero by zero.
    if not (initial_accumulator >= 0 and epsilon >= 0 and initial_accumulator + epsilon > 0):
        raise ValueError(
            "initial_accumulator and epsilon must be at least 0, and one of them above it. Received: "
            f"initial_accumulator={initial_accumulator}, epsilon={epsilon}. Leave them at their defaults, say."
        )
