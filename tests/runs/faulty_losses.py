"""A training loss that goes wrong at chosen steps, to be named in a test's configuration."""

import dataclasses

import tensorflow as tf

from lmscale.distribution import collectives
from lmscale.softmax.sampled import SampledSoftmax


class FaultySoftmax(SampledSoftmax):
    """Sampled softmax; at the steps `bad_steps` (0-based) the last replica alone sees `fault` in one place."""

    def __init__(self, *, bad_steps: tuple[int, ...], place: str, fault: str, **arguments):
        super().__init__(**arguments)
        self._bad_steps = bad_steps
        self._place = place
        self._fault = float(fault)
        self._is_bad = False

    def candidates(self, *, seed, labels):
        # The second word of the seed is the step.
        step_is_bad = tf.reduce_any([tf.equal(seed[1], step) for step in self._bad_steps])
        is_last = collectives.replica_id() == collectives.num_replicas() - 1
        self._is_bad = step_is_bad & is_last
        return super().candidates(seed=seed, labels=labels)

    def value_and_gradients(self, hidden, **arguments):
        result = super().value_and_gradients(hidden, **arguments)
        good = getattr(result, self._place)
        return dataclasses.replace(result, **{self._place: tf.where(self._is_bad, self._fault, good)})
