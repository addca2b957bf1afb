"""A training loss that goes wrong at chosen steps, to be named in a test's configuration."""

import dataclasses

import tensorflow as tf

from lmscale.distribution import collectives
from lmscale.softmax.sampled import SampledSoftmax
from lmscale.tables.rows import Rows


class FaultySoftmax(SampledSoftmax):
    """Sampled softmax; at the steps `bad_steps` (0-based) the last replica alone sees `fault` in one place.

    `place` is a field of `HeadGradients`; of rows, the embedding.
    """

    def __init__(self, *, bad_steps: tuple[int, ...], place: str, fault: str, **arguments):
        super().__init__(**arguments)
        self._bad_steps = bad_steps
        self._place = place
        self._fault = float(fault)
        self._step_is_bad = False

    def candidates(self, *, seed, labels):
        # The second word of the seed is the step.
        self._step_is_bad = tf.reduce_any([tf.equal(seed[1], step) for step in self._bad_steps])
        return super().candidates(seed=seed, labels=labels)

    def value_and_gradients(self, hidden, **arguments):
        is_last = collectives.replica_id() == collectives.num_replicas() - 1
        is_bad = self._step_is_bad & is_last
        result = super().value_and_gradients(hidden, **arguments)
        good = getattr(result, self._place)
        if isinstance(good, Rows):
            bad = Rows(tf.where(is_bad, self._fault, good.embedding), good.bias)
        else:
            bad = tf.where(is_bad, self._fault, good)
        return dataclasses.replace(result, **{self._place: bad})
