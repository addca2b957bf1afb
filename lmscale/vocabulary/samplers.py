"""Samplers of negative classes: stateless, compilable by XLA, each with its exact log expected counts.

The samplers that are not uniform share one picture. The classes lie side by side on a line, each as long as its
expected count, and the line is cut into equal cells. A draw picks a cell, then a point in it, and takes the class
under the point. Independent draws pick any cell. Stratified draws get one run of cells each, all equally long, so
a class of expected count below one is drawn at most twice, and a class of expected count one is taken outright.
Cells keep float32 exact enough: within one, a point has 2**24 values of its own.
"""

from __future__ import annotations

import abc
import dataclasses

import numpy as np
import tensorflow as tf

_MIN_CELLS = 2**16
_POINTS = 2**24  # per cell: every k / 2**24 is a float32


@dataclasses.dataclass(frozen=True)
class Candidates:
    """Sampled classes with their expected counts.

    Attributes:
      sampled_ids: [num_sampled] int32.
      sampled_log_expected_count: [num_sampled] float32.
    """

    sampled_ids: tf.Tensor
    sampled_log_expected_count: tf.Tensor


class Sampler(abc.ABC):
    """Draws class ids, and knows how often to expect each.

    A draw is a function of the seed alone (and of the labels, where `needs_labels`): every replica given the same
    seed gets the same ids. Construct eagerly, in the strategy's scope if there is one: tables are variables, so
    that each device reads a copy of its own.

    Attributes:
      vocab_size: ids are 0 .. vocab_size - 1.
      num_sampled: ids per draw; None where the labels decide it.
      needs_labels: whether `sample` draws from the labels; otherwise it ignores them.
    """

    needs_labels = False
    vocab_size: int
    num_sampled: int | None

    @abc.abstractmethod
    def sample(self, *, seed, labels=None):
        """Draws class ids.

        Args:
          seed: [2] int32.
          labels: int labels of the global batch, any shape; used only where `needs_labels`.

        Returns:
          [num_sampled] int32.
        """

    @abc.abstractmethod
    def log_expected_count(self, ids, *, num_draws=None):
        """Log of the expected number of times each id is among the sampled ids.

        Args:
          ids: int, any shape, each in 0 .. vocab_size - 1.
          num_draws: number of sampled ids. Needed where `num_sampled` is None; elsewhere it must equal num_sampled.

        Returns:
          float32, shape of ids.
        """

    def candidates(self, *, seed, labels=None):
        """Draws as `sample` does; returns Candidates."""
        sampled_ids = self.sample(seed=seed, labels=labels)
        return Candidates(
            sampled_ids=sampled_ids,
            sampled_log_expected_count=self.log_expected_count(sampled_ids, num_draws=sampled_ids.shape[0]),
        )

    def _check_num_draws(self, num_draws):
        if num_draws is not None and num_draws != self.num_sampled:
            raise ValueError(
                "num_draws must equal the sampler's num_sampled. Received: "
                f"num_draws={num_draws}, num_sampled={self.num_sampled}. Leave num_draws out."
            )


class LogUniformSampler(Sampler):
    """p(id) = log((id + 2) / (id + 1)) / log(vocab_size + 1): Zipf's law, for ids sorted by falling frequency.

    Needs no table of the vocabulary's size. The class under a point is found by the closed-form inverse, relative
    to the cell's start: in float32, exp(u * log(vocab_size + 1)) alone would skip most ids beyond 2**20.

    With `replacement`, draws are independent and the expected count is num_sampled * p. Without, it is
    min(1, scale * p) with the scale that makes the sum num_sampled, and the ids of expected count 1 (a prefix)
    are drawn exactly once, first; any other id at most twice, and twice only where two strata meet.
    num_sampled == vocab_size without replacement draws every id exactly once.

    Args:
      vocab_size: number of classes.
      counts: ignored; accepted so that all samplers are built alike.
      num_sampled: ids per draw, at most vocab_size.
      replacement: see above.

    Raises:
      ValueError: if num_sampled is not in 1 .. vocab_size.

    Source: tf.random.log_uniform_candidate_sampler (the distribution); Madow 1949 and Deville and Tille 1998
      (sampling with given inclusion probabilities, one point per stratum).
    """

    def __init__(self, *, vocab_size, counts=None, num_sampled, replacement=True):
        del counts
        _check_num_sampled(vocab_size, num_sampled)
        self.vocab_size = vocab_size
        self.num_sampled = num_sampled
        self.replacement = replacement
        self._num_certain = 0 if replacement else _log_uniform_num_certain(vocab_size, num_sampled)
        self._num_uncertain = num_sampled - self._num_certain
        if self._num_uncertain == 0:
            return
        # The cells cut [first, vocab_size + 1) evenly on a log scale; class id owns [id + 1, id + 2).
        first = self._num_certain + 1
        log_span = np.log((vocab_size + 1) / first)
        self._log_scale = np.log(self._num_uncertain / log_span)
        self._cells_per_draw = _cells_per_draw(self._num_uncertain, replacement)
        num_cells = self._cells_per_draw * (1 if replacement else self._num_uncertain)
        self._log_width = log_span / num_cells
        starts = first * np.exp(np.arange(num_cells) * self._log_width)
        self._whole = _table(np.floor(starts).astype(np.int64))
        self._fraction = _table((starts - np.floor(starts)).astype(np.float32))
        self._start = _table(starts.astype(np.float32))

    def sample(self, *, seed, labels=None):
        del labels
        certain = tf.range(self._num_certain, dtype=tf.int32)
        if self._num_uncertain == 0:
            return certain
        cell, point = _draw_points(seed, self._num_uncertain, self._cells_per_draw, self.replacement)
        beyond_whole = tf.gather(self._fraction, cell) + tf.gather(self._start, cell) * tf.math.expm1(
            point * tf.constant(self._log_width, tf.float32)
        )
        ids = tf.cast(tf.gather(self._whole, cell), tf.int32) + tf.cast(tf.floor(beyond_whole), tf.int32) - 1
        # Rounding up at a cell's end reaches at most the next cell's first id; the last cell has no next.
        return tf.concat([certain, tf.minimum(ids, self.vocab_size - 1)], axis=0)

    def log_expected_count(self, ids, *, num_draws=None):
        self._check_num_draws(num_draws)
        ids = tf.convert_to_tensor(ids)
        if self._num_uncertain == 0:
            return tf.zeros_like(ids, tf.float32)
        # log1p(1 / (id + 1)) = log((id + 2) / (id + 1)) to full precision at any id.
        log_count = tf.math.log(tf.math.log1p(1.0 / (tf.cast(ids, tf.float32) + 1.0))) + tf.constant(
            self._log_scale, tf.float32
        )
        return tf.where(ids < self._num_certain, tf.zeros_like(log_count), log_count)


def _log_uniform_num_certain(vocab_size, num_sampled):
    """How many of the first ids have expected count 1 when num_sampled are drawn without replacement."""
    if num_sampled == vocab_size:
        return vocab_size
    # With k certain, the rest share num_sampled - k; id k is certain too if its share would reach 1.
    k = np.arange(num_sampled)
    reaches_one = (num_sampled - k) * np.log1p(1 / (k + 1)) >= np.log((vocab_size + 1) / (k + 1))
    return int(np.argmin(reaches_one)) if not reaches_one.all() else num_sampled - 1


def _check_num_sampled(vocab_size, num_sampled):
    if vocab_size < 1:
        raise ValueError(
            f"vocab_size must be at least 1. Received: vocab_size={vocab_size}. Set VOCAB_SIZE to the number of "
            "classes."
        )
    if not 1 <= num_sampled <= vocab_size:
        raise ValueError(
            "num_sampled must be at least 1 and at most vocab_size. Received: "
            f"num_sampled={num_sampled}, vocab_size={vocab_size}. Set NUM_SAMPLED to at most {vocab_size}."
        )


def _cells_per_draw(num_draws, replacement):
    """A power of two, so that random bits pick a cell without bias: all cells, or those of one stratum."""
    cells = 1
    while cells * (1 if replacement else num_draws) < _MIN_CELLS:
        cells *= 2
    return cells


def _draw_points(seed, num_draws, cells_per_draw, replacement):
    """Returns the cell [num_draws] int32 of each draw and the point in it, [num_draws] float32 in [0, 1)."""
    # Philox is named, as the default differs between device types.
    bits = tf.random.stateless_uniform(
        [2, num_draws], seed, minval=None, maxval=None, dtype=tf.int32, alg="philox"
    )
    cell = tf.bitwise.bitwise_and(bits[0], cells_per_draw - 1)
    if not replacement:
        cell += tf.range(num_draws, dtype=tf.int32) * cells_per_draw
    point = tf.cast(tf.bitwise.bitwise_and(bits[1], _POINTS - 1), tf.float32) / _POINTS
    return cell, point


def _table(values):
    """A constant that has a copy on every device. int64 or float32: GPUs hold no int32 variables."""
    return tf.Variable(values, trainable=False)
