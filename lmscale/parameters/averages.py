"""Exponential moving averages of weights, and evaluations of them in place of the weights.

After t updates the average of weights w_1 ... w_t is sum_i (1 - decay) decay^(t - i) w_i / (1 - decay^t): what is kept
beside a weight starts from zero and is corrected for it when it is read, as Adam's moments are. A row that no step
touches keeps its weight, so what its average misses meanwhile is known in closed form: it is caught up when the row is
touched next, or read.
"""

import contextlib

import tensorflow as tf

from lmscale.parameters.update_rules import Slot, UpdateRule, one_minus_power, per_row

_AVERAGE, _AVERAGED_AT = "average", "averaged_at"
_BLOCK_ROWS = 65_536


class Averaged(UpdateRule):
    """Another update rule, whose updates it leaves as they are, and an average of the weights that these make.

    The clock is that of the group: steps at which it is inactive do not count.

    Source: Polyak & Juditsky 1992; with exponential weights, bias corrected: Kingma & Ba 2015 (arXiv:1412.6980),
    section 7.2.
    """

    def __init__(self, *, update: UpdateRule, decay: float = 0.999):
        """Args:
        update: the rule that moves the weights.
        decay: in (0, 1): the average reaches back some 1 / (1 - decay) updates.
        """
        if not 0 < decay < 1:
            raise ValueError(
                f"decay must be in (0, 1). Received: Averaged.decay={decay}. Set it to 0.999, say."
            )
        if isinstance(update, Averaged):
            raise ValueError("Averaged.update must be a rule that is not averaged itself. Name that rule.")
        super().__init__(learning_rate=update.learning_rate)  # Weights decay by the rule within.
        self._update = update
        self.decay = decay

    @property
    def slots(self):
        return self._update.slots | {_AVERAGE: Slot(per_element=True), _AVERAGED_AT: Slot(per_element=False)}

    def update_rows(self, *, weights, gradients, slots, step, learning_rate):
        inner = {name: slots[name] for name in self._update.slots}
        new_weights, new_slots = self._update.update(
            weights=weights, gradients=gradients, slots=inner, step=step, learning_rate=learning_rate
        )
        before = self.caught_up(weights, slots[_AVERAGE], slots[_AVERAGED_AT], num_updates=step)
        average = self.decay * before + (1 - self.decay) * new_weights
        number = tf.cast(step, tf.float32) + 1
        averaged_at = tf.fill(tf.shape(slots[_AVERAGED_AT]), number)
        return new_weights, {**new_slots, _AVERAGE: average, _AVERAGED_AT: averaged_at}

    def caught_up(self, weights, average, averaged_at, *, num_updates):
        """The average, not corrected, after `num_updates`, of weights that have not changed since `averaged_at`.

        Args:
          weights, average: [rows, ...].
          averaged_at: [rows], number of updates then.
          num_updates: int scalar.
        """
        skipped = tf.cast(num_updates, tf.float32) - averaged_at
        share = per_row(one_minus_power(self.decay, skipped), weights)
        return (1 - share) * average + share * weights


def check_any(treatments):
    """Raises ValueError unless some parameter's rule keeps an average; `treatments` {path: `Treatment`}."""
    if not any(isinstance(t.update, Averaged) for t in treatments.values()):
        raise ValueError(
            "evaluate_averages needs a group whose update rule is averages.Averaged. Received: none. Name one, or "
            "set experiment.Experiment.evaluate_averages to False."
        )


def check_constraints(variables, treatments):
    """Raises ValueError where an average would be of weights before their constraint.

    Args:
      variables: {path: Keras variable} of layers.
      treatments: {path: `Treatment`}.
    """
    for path, treatment in treatments.items():
        constraint = path in variables and variables[path].constraint
        if constraint and isinstance(treatment.update, Averaged):
            raise ValueError(
                "Weights under a Keras constraint must not be averaged: their averages need not meet it. Received: "
                f"{path}, with {type(constraint).__name__} and the rule Averaged. Leave one of them out."
            )


@contextlib.contextmanager
def in_place_of_weights(model, *, step):
    """Evaluates averages: within the context, the parameters that have one hold it, and then their weights again.

    The weights come back bit for bit. The averages come back caught up to `step`, which rounds them otherwise than an
    uninterrupted run would: what they are then depends, in the last bits, on when it was evaluated.

    Args:
      model: `Model`, with the slots of training.
      step: updates that the run has done.
    """
    held = list(_averaged(model, step=step))
    for one in held:
        one.exchange_in()
    try:
        yield
    finally:
        for one in held:
            one.exchange_back()


def _averaged(model, *, step):
    """A `_Held` for each averaged parameter on each device."""
    for path, treatment in model.treatments.items():
        if not isinstance(treatment.update, Averaged):
            continue
        num_updates = int(model.num_updates(path, tf.constant(step)))
        if not num_updates:
            continue  # Nothing to average yet.
        for weights, slots in model.components(path):
            yield _Held(treatment.update, weights, slots, num_updates=num_updates)


class _Held:
    """One parameter on one device, and its average."""

    def __init__(self, rule, weights, slots, *, num_updates):
        self._rule = rule
        self._weights, self._average, self._averaged_at = weights, slots[_AVERAGE], slots[_AVERAGED_AT]
        self._num_updates = num_updates
        self._correction = one_minus_power(rule.decay, tf.constant(num_updates, tf.float32))

    def exchange_in(self):
        """Puts the corrected average into the weights, and the weights into the place of the average."""
        for block in self._blocks():
            weights, average, averaged_at = (
                self._read(v, block) for v in (self._weights, self._average, self._averaged_at)
            )
            now = self._rule.caught_up(weights, average, averaged_at, num_updates=self._num_updates)
            self._write(self._weights, block, now / self._correction)
            self._write(self._average, block, weights)

    def exchange_back(self):
        """Puts the weights back, and the average, which is caught up now."""
        for block in self._blocks():
            average, weights = self._read(self._weights, block), self._read(self._average, block)
            self._write(self._weights, block, weights)
            self._write(self._average, block, average * self._correction)
            at = tf.fill(
                tf.shape(self._read(self._averaged_at, block)), tf.cast(self._num_updates, tf.float32)
            )
            self._write(self._averaged_at, block, at)

    def _blocks(self):
        """Rows at a time; None for a variable of a layer, which is one row, in one piece."""
        if self._weights.shape.rank < self._average.shape.rank:
            yield None
            return
        for start in range(0, self._weights.shape[0], _BLOCK_ROWS):
            yield tf.range(start, min(start + _BLOCK_ROWS, self._weights.shape[0]))

    def _write(self, variable, block, value):
        if block is not None:
            variable.scatter_update(tf.IndexedSlices(value, block))
        else:
            variable.assign(value[0] if variable is self._weights else value)

    def _read(self, variable, block):
        if block is not None:
            return tf.gather(variable, block)
        return variable[tf.newaxis] if variable is self._weights else variable.read_value()
