"""Samplers of negative classes: stateless, compilable by XLA, each with its exact log expected counts.

The log-uniform and the unigram sampler share one picture. The classes lie side by side on a line, each as
long as its expected count, and the line is cut into equal cells. A draw picks a cell, then a point in it, and
takes the class under the point. Independent draws pick any cell. Stratified draws have a run of cells each,
one draw long: a class of expected count below 1 is drawn at most twice, and twice only if it lies across the
border of two runs. A class of expected count 1 is taken off the line and drawn outright.

Cells make float32 exact enough: a point is one of 2**24 per cell, and there are at least 2**16 cells. Neither
float64, which TPUs lack, nor int32 arithmetic, which TensorFlow runs on the host of a GPU, is used on the
device.
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
    """Sampled classes and how often each was to be expected.

    Attributes:
      sampled_ids: [num_sampled] int32.
      sampled_log_expected_count: [num_sampled] float32.
    """

    sampled_ids: tf.Tensor
    sampled_log_expected_count: tf.Tensor


class Sampler(abc.ABC):
    """Draws class ids, and knows how often to expect each.

    A draw is a function of the seed alone (or of the labels, where `samples_are_labels`): replicas given the same
    seed get the same ids. Construct eagerly, in the strategy's scope if there is one: tables are variables,
    so that each device reads a copy of its own.

    Attributes:
      vocab_size: ids are 0 .. vocab_size - 1.
      num_sampled: ids per draw; None where the labels decide it.
      samples_are_labels: whether `sample` returns the labels, all of them in their order; otherwise it need not look at
        them.
    """

    samples_are_labels = False
    vocab_size: int
    num_sampled: int | None

    @abc.abstractmethod
    def sample(self, *, seed, labels=None):
        """Draws class ids.

        Args:
          seed: [2] int32.
          labels: int, any shape, those of the global batch. Needed where `samples_are_labels`.

        Returns:
          [num_sampled] int32.
        """

    @abc.abstractmethod
    def log_expected_count(self, ids, *, num_draws=None):
        """Log of the expected number of times that each id is among the sampled ids.

        Args:
          ids: int, any shape, each in 0 .. vocab_size - 1.
          num_draws: number of sampled ids. Needed where `num_sampled` is None; elsewhere it must equal that.

        Returns:
          float32, shape of ids.
        """

    def candidates(self, *, seed, labels=None):
        """Draws as `sample` does, and returns the ids with their log expected counts as `Candidates`."""
        sampled_ids = self.sample(seed=seed, labels=labels)
        return Candidates(
            sampled_ids=sampled_ids,
            sampled_log_expected_count=self.log_expected_count(sampled_ids, num_draws=sampled_ids.shape[0]),
        )

    def _check_num_draws(self, num_draws):
        if num_draws is not None and num_draws != self.num_sampled:
            raise ValueError(
                "num_draws must equal the num_sampled of the sampler. Received: "
                f"num_draws={num_draws}, num_sampled={self.num_sampled}. Leave num_draws out."
            )


class UniformSampler(Sampler):
    """Every class alike, independent draws: p(id) = 1 / vocab_size.

    Args:
      vocab_size: number of classes.
      counts: ignored; accepted so that all samplers are built alike.
      num_sampled: ids per draw, at most vocab_size.

    Raises:
      ValueError: if num_sampled is not in 1 .. vocab_size.

    Source: tf.random.uniform_candidate_sampler with unique=False.
    """

    def __init__(self, *, vocab_size: int, counts: np.ndarray | None = None, num_sampled: int):
        del counts
        self.vocab_size, self.num_sampled = _check_sizes(vocab_size, num_sampled)

    def sample(self, *, seed, labels=None):
        del labels
        # 64 random bits modulo vocab_size: no class is favoured by more than vocab_size / 2**64.
        ids = tf.random.stateless_uniform(
            [self.num_sampled], seed, minval=0, maxval=self.vocab_size, dtype=tf.int64, alg="philox"
        )
        return tf.cast(ids, tf.int32)

    def log_expected_count(self, ids, *, num_draws=None):
        self._check_num_draws(num_draws)
        return tf.zeros_like(ids, tf.float32) + tf.constant(
            np.log(self.num_sampled / self.vocab_size), tf.float32
        )


class LogUniformSampler(Sampler):
    """p(id) = log((id + 2) / (id + 1)) / log(vocab_size + 1): Zipf's law, for ids by falling frequency.

    Needs no table of the vocabulary's size: the class under a point has a closed form, taken relative to the
    start of the cell. (In float32, exp(u * log(vocab_size + 1)) by itself would skip most ids beyond 2**20.)
    The frequency of any id agrees with its expected count to 1e-3, relative, at a vocabulary of 10**7, and
    better at smaller ones. Compiled and uncompiled draws may differ by one id where rounding decides.

    With `replacement`, draws are independent and the expected count is num_sampled * p(id). Without, it is
    min(1, scale * p(id)), with the scale that makes the sum num_sampled: a prefix of the ids is drawn exactly
    once each, the others are stratified as told above, at most twice. Then few draws are lost on repeats, and
    with num_sampled == vocab_size every class is drawn exactly once.

    Args:
      vocab_size: number of classes.
      counts: ignored; accepted so that all samplers are built alike.
      num_sampled: ids per draw, at most vocab_size.
      replacement: see above.

    Raises:
      ValueError: if num_sampled is not in 1 .. vocab_size.

    Source: tf.random.log_uniform_candidate_sampler (the distribution); Madow 1949, "On the theory of
      systematic sampling, II" (without replacement; here with one random point per stratum in place of one
      for all).
    """

    def __init__(
        self, *, vocab_size: int, counts: np.ndarray | None = None, num_sampled: int, replacement: bool = True
    ):
        del counts
        self.vocab_size, self.num_sampled = _check_sizes(vocab_size, num_sampled)
        self._num_certain = 0 if replacement else _log_uniform_num_certain(self.vocab_size, self.num_sampled)
        num_stratified = self.num_sampled - self._num_certain
        self._line = None
        if num_stratified:
            self._line = _Line(num_draws=num_stratified, replacement=replacement)
            # The line is [first, vocab_size + 1) on a log scale; class id owns [id + 1, id + 2).
            first = self._num_certain + 1
            log_length = np.log((self.vocab_size + 1) / first)
            self._log_scale = float(np.log(num_stratified / log_length))
            self._log_cell = float(log_length / self._line.num_cells)
            starts = first * np.exp(np.arange(self._line.num_cells) * self._log_cell)
            self._start = _table(starts.astype(np.float32))
            self._start_floor = _table(np.floor(starts).astype(np.int64))
            self._start_fraction = _table((starts - np.floor(starts)).astype(np.float32))

    def sample(self, *, seed, labels=None):
        del labels
        certain = tf.constant(np.arange(self._num_certain), tf.int64)
        if self._line is None:
            return tf.cast(certain, tf.int32)
        ids = self._ids_at(*self._line.draw(seed))
        return tf.cast(tf.concat([certain, ids], axis=0), tf.int32)

    def _ids_at(self, cell, point):
        offset = tf.gather(self._start_fraction, cell) + tf.gather(self._start, cell) * tf.math.expm1(
            point * tf.constant(self._log_cell, tf.float32)
        )
        ids = tf.gather(self._start_floor, cell) + tf.cast(tf.floor(offset), tf.int64) - 1
        # Rounding up at the end of a cell reaches the next cell's first id. The last cell has no next.
        return tf.minimum(ids, self.vocab_size - 1)

    def log_expected_count(self, ids, *, num_draws=None):
        self._check_num_draws(num_draws)
        ids = tf.cast(ids, tf.int64)
        if self._line is None:
            return tf.zeros_like(ids, tf.float32)
        # log1p(1 / (id + 1)) is log((id + 2) / (id + 1)), to float32 precision at any id.
        log_length = tf.math.log(tf.math.log1p(1.0 / tf.cast(ids + 1, tf.float32)))
        return tf.where(ids < self._num_certain, 0.0, log_length + tf.constant(self._log_scale, tf.float32))


class UnigramSampler(Sampler):
    """p(id) proportional to max(count(id), 1)**power: any distribution over the classes, in any order of ids.

    A count of zero counts as one, so that every class can be drawn and no expected count is zero. Lengths on
    the line are whole multiples of 2**-24 of a cell, at least one each, and the expected counts are those of
    the rounded lengths: exact for what is drawn, and within 2**-40 of num_sampled of the formula.

    A draw costs one look-up of its cell and a binary search among the classes in it. Each device holds two
    float32 per class. (An alias table would save the search, but cannot stratify.)

    `replacement` is as in LogUniformSampler, except that the classes drawn exactly once need not be a prefix.

    Args:
      vocab_size: number of classes.
      counts: [vocab_size] numbers >= 0, how often each class occurs.
      num_sampled: ids per draw, at most vocab_size.
      power: exponent of the counts, finite; 1 is the unigram distribution, 0 the uniform one.
      replacement: see above.

    Raises:
      ValueError: if counts or power is not as described, or num_sampled is not in 1 .. vocab_size.

    Source: Mikolov et al. 2013, arXiv:1310.4546, section 2.2 (the power 3/4); Chen and Asau 1974, "On
      generating random variates from an empirical distribution" (cells before search); Madow 1949, as in
      LogUniformSampler.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        counts: np.ndarray,
        num_sampled: int,
        power: float = 0.75,
        replacement: bool = True,
    ):
        self.vocab_size, self.num_sampled = _check_sizes(vocab_size, num_sampled)
        if not np.isfinite(power):
            raise ValueError(f"power must be finite. Received: power={power}. The usual ones are 0.75 and 1.")
        log_weights = power * np.log(np.maximum(_check_counts(counts, self.vocab_size), 1.0))
        weights = np.exp(log_weights - np.max(log_weights))
        certain_ids = np.zeros([0], np.int64) if replacement else _certain_ids(weights, self.num_sampled)
        num_stratified = self.num_sampled - len(certain_ids)
        self._certain_ids = certain_ids
        log_expected_count = np.zeros([self.vocab_size], np.float32)
        self._line = None
        if num_stratified:
            self._line = _Line(num_draws=num_stratified, replacement=replacement)
            weights[certain_ids] = 0.0
            num_points = self._line.num_cells * _POINTS
            ends = _whole_ends(weights, num_points)
            cell_ends = np.arange(self._line.num_cells + 1) * _POINTS
            # In a cell, the class under a point is the first whose end lies beyond it.
            first = np.searchsorted(ends, cell_ends[:-1], side="right")
            last = np.searchsorted(ends, cell_ends[1:], side="left")
            self._first, self._last = _table(first), _table(last)
            self._search_steps = int(np.max(last - first)).bit_length()
            self._end_in_cell = _table(((ends % _POINTS) / _POINTS).astype(np.float32))
            points = np.diff(ends, prepend=0)
            np.log(
                points * (num_stratified / num_points),
                out=log_expected_count,
                where=points > 0,
                casting="same_kind",
            )
        self._log_expected_count = _table(log_expected_count)

    def sample(self, *, seed, labels=None):
        del labels
        certain = tf.constant(self._certain_ids, tf.int64)
        if self._line is None:
            return tf.cast(certain, tf.int32)
        ids = self._ids_at(*self._line.draw(seed))
        return tf.cast(tf.concat([certain, ids], axis=0), tf.int32)

    def _ids_at(self, cell, point):
        ids, last = tf.gather(self._first, cell), tf.gather(self._last, cell)
        # Written out, as XLA's searchsorted compares every draw with every class.
        for step in reversed(range(self._search_steps)):
            further = tf.minimum(ids + 2**step, last)
            end = tf.gather(self._end_in_cell, tf.maximum(further - 1, 0))
            ids = tf.where(end <= point, further, ids)
        return ids

    def log_expected_count(self, ids, *, num_draws=None):
        self._check_num_draws(num_draws)
        return tf.gather(self._log_expected_count, ids)


class InBatchSampler(Sampler):
    """The sampled classes are the labels of the global batch, so that no further rows are touched.

    The labels are taken for independent draws from the unigram distribution: the expected count is
    num_draws * max(count(id), 1) / sum of the same. Every token's own label is among the candidates, so the
    loss must remove accidental hits.

    Args:
      vocab_size: number of classes.
      counts: [vocab_size] numbers >= 0, how often each class occurs in the training split.

    Raises:
      ValueError: if counts is not as described.

    Source: Yi et al. 2019, "Sampling-bias-corrected neural modeling for large corpus item recommendations".
    """

    samples_are_labels = True

    def __init__(self, *, vocab_size: int, counts: np.ndarray):
        self.vocab_size, self.num_sampled = int(vocab_size), None
        smoothed = np.maximum(_check_counts(counts, self.vocab_size), 1.0)
        self._log_probability = _table(np.log(smoothed / smoothed.sum()).astype(np.float32))

    def sample(self, *, seed, labels=None):
        del seed
        if labels is None:
            raise ValueError(
                "labels must be the labels of the global batch, which are the candidates. Received: "
                "labels=None. Pass labels, or choose a sampler that draws by itself."
            )
        return tf.reshape(tf.cast(labels, tf.int32), [-1])

    def log_expected_count(self, ids, *, num_draws=None):
        if num_draws is None:
            raise ValueError(
                "num_draws must be the number of labels in the global batch. Received: num_draws=None. "
                "Pass sampled_ids.shape[0]."
            )
        return tf.gather(self._log_probability, ids) + tf.math.log(tf.cast(num_draws, tf.float32))


class _Line:
    """A line cut into equal cells: any cell for independent draws, a run of cells for each stratified draw.

    Attributes:
      num_cells: int.
    """

    def __init__(self, *, num_draws, replacement):
        # A power of two, so that random bits pick one of so many cells without bias.
        self._cells_per_pick = 1
        while self._cells_per_pick * (1 if replacement else num_draws) < _MIN_CELLS:
            self._cells_per_pick *= 2
        self.num_cells = self._cells_per_pick * (1 if replacement else num_draws)
        self._first_cell = (
            np.zeros(num_draws, np.int64) if replacement else np.arange(num_draws) * self._cells_per_pick
        )

    def draw(self, seed):
        """Returns each draw's cell, [num_draws] int64, and point in it, [num_draws] float32 in [0, 1)."""
        # Philox by name, because the default differs between types of device.
        bits = tf.random.stateless_uniform(
            self._first_cell.shape, seed, minval=None, maxval=None, dtype=tf.int64, alg="philox"
        )
        cell = tf.bitwise.bitwise_and(bits, self._cells_per_pick - 1) + self._first_cell
        point_bits = tf.bitwise.bitwise_and(tf.bitwise.right_shift(bits, 32), _POINTS - 1)
        return cell, tf.cast(point_bits, tf.float32) / _POINTS


def _log_uniform_num_certain(vocab_size, num_sampled):
    """How many ids, a prefix, have expected count 1 when num_sampled are drawn without replacement."""
    if num_sampled == vocab_size:
        return vocab_size
    # With ids 0 .. k - 1 taken, the others share num_sampled - k draws. Is id k's share 1 or more?
    k = np.arange(num_sampled)
    is_certain = (num_sampled - k) * np.log1p(1 / (k + 1)) >= np.log((vocab_size + 1) / (k + 1))
    is_certain[-1] = False
    return int(np.argmin(is_certain))


def _certain_ids(weights, num_sampled):
    """[k] int64, rising: the classes of expected count 1 when num_sampled are drawn without replacement."""
    if num_sampled == len(weights):
        return np.arange(num_sampled)
    by_weight = np.argsort(-weights, kind="stable")
    falling = weights[by_weight]
    rest = np.cumsum(falling[::-1])[::-1]
    # As for the log-uniform prefix. The last draw is never certain: rounding could leave the rest nothing.
    is_certain = (num_sampled - np.arange(num_sampled)) * falling[:num_sampled] >= rest[:num_sampled]
    is_certain[-1] = False
    return np.sort(by_weight[: np.argmin(is_certain)])


def _whole_ends(weights, num_points):
    """[vocab_size] int64: where each class ends, when num_points points are shared in proportion to weights.

    A class of positive weight gets at least one point, one of weight zero gets none, and the last end is
    num_points.
    """
    one_each = np.cumsum(weights > 0)
    shares = np.cumsum(weights)
    shares /= shares[-1]
    return np.floor(shares * (num_points - one_each[-1])).astype(np.int64) + one_each


def _table(values):
    """A constant with a copy on every device. int64 or float32, as GPUs hold no int32 variables."""
    return tf.Variable(values, trainable=False)


def _check_sizes(vocab_size, num_sampled):
    if not isinstance(num_sampled, (int, np.integer)) or not 1 <= num_sampled <= vocab_size:
        raise ValueError(
            "num_sampled must be a whole number, at least 1 and at most vocab_size. Received: "
            f"num_sampled={num_sampled!r}, vocab_size={vocab_size}. Set NUM_SAMPLED to at most {vocab_size}."
        )
    return int(vocab_size), int(num_sampled)


def _check_counts(counts, vocab_size):
    counts = None if counts is None else np.asarray(counts, np.float64)
    if counts is None or counts.shape != (vocab_size,):
        raise ValueError(
            "counts must hold one number per class, [vocab_size]. Received: "
            f"counts.shape={None if counts is None else counts.shape}, vocab_size={vocab_size}. "
            "Pass the counts of the vocabulary, in the order of its ids."
        )
    invalid = np.flatnonzero(~(np.isfinite(counts) & (counts >= 0)))
    if invalid.size:
        raise ValueError(
            "counts must be finite and at least 0. Received: "
            f"counts[{invalid[0]}]={counts[invalid[0]]}. Count the classes again."
        )
    return counts
