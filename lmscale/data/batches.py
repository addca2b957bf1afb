"""Batches as pure functions of (tokens, seed, step): the step is the whole state of the data.

Nothing here counts or advances, and the batches that `Prefetcher` keeps are only read early. A run resumed at step s,
on any number of devices, reads what the uninterrupted run would have read.
"""

import dataclasses
from concurrent import futures

import numpy as np

ALL = slice(None)


@dataclasses.dataclass(frozen=True)
class Batch:
    """One batch.

    Attributes:
      features: {name: [examples, ...] array}. Of text: "ids" [examples, window + 1] int32, whose inputs are all but the
        last and whose labels all but the first; with a lookahead [examples, window + 2], whose labels are all but the
        first and the last. In evaluations also "weights" [examples, window] float32 of the labels, 0 for padding and
        else 1.
      starts_epoch: the carried state must be reset before this batch.
      epoch: how many passes over the data came before.
    """

    features: dict[str, np.ndarray]
    starts_epoch: bool = False
    epoch: int = 0


class ContiguousBatches:
    """Training batches for bodies that carry state: each row goes on where it ended in the batch before.

    With n tokens and L = n // global_batch_size, window w of epoch e reads, in lane b, the ids at
    `(b * L + offset(seed, e) + w * window + i) mod n` for i = 0 .. window. The offset, uniform in
    0 .. n - 1 and new in each epoch, turns the token stream like a ring: the lanes begin elsewhere in
    each epoch, and the few tokens behind the last whole window are not always the same. One lane per
    epoch crosses from the end of the stream to its start, unless the offset is 0.
    """

    def __init__(self, tokens, *, global_batch_size: int, window: int, seed: int):
        """Checks that one window fits.

        Args:
          tokens: [n] integer ids, an array or memory map; read at each step, never copied whole.
          global_batch_size: number of lanes, over all devices together.
          window: tokens that a step predicts in each lane.
          seed: integer >= 0; with the epoch it gives the offset.
        Raises:
          ValueError: if a lane is too short for one window, or an argument is out of range.
        """
        _check_training_arguments(tokens, global_batch_size, window, seed)
        lane_length = len(tokens) // global_batch_size
        self.steps_per_epoch = (lane_length - 1) // window
        if self.steps_per_epoch < 1:
            raise ValueError(_too_short(tokens, global_batch_size, window, global_batch_size * (window + 1)))
        self.labels_per_step = global_batch_size * window
        self._tokens, self._window, self._seed = tokens, window, seed
        self._lane_starts = np.arange(global_batch_size, dtype=np.int64)[:, None] * lane_length

    def at(self, step: int, examples: slice = ALL) -> Batch:
        """The batch of a step, counted from 0 over all epochs; or some of its examples, and no others are read."""
        epoch, window_in_epoch = divmod(checked_step(step), self.steps_per_epoch)
        offset = _random_below(len(self._tokens), seed=self._seed, epoch=epoch)
        positions = self._lane_starts[examples] + offset + window_in_epoch * self._window
        ids = _windows(self._tokens, positions, self._window)
        return Batch({"ids": ids}, starts_epoch=window_in_epoch == 0, epoch=epoch)


class ShuffledWindows:
    """Training batches for bodies without state: consecutive windows, in a new order each epoch.

    The (n - 1) // window windows of an epoch overlap by one token, the last label of one and the first
    input of the next, so that a token is a label at most once. With a lookahead a window has one more
    token, the one after its last label. They are dealt in an order permuted by
    (seed, epoch). The windows that do not fill a last batch, and the tokens that do not fill a window,
    are left out, others in each epoch. The permutation is computed entry by entry: it takes no memory.
    """

    def __init__(self, tokens, *, global_batch_size: int, window: int, seed: int, lookahead: bool = False):
        """Checks that one batch fits. Other arguments and errors as for `ContiguousBatches`.

        Args:
          lookahead: whether windows have the token after their last label.
        """
        _check_training_arguments(tokens, global_batch_size, window, seed)
        self._lookahead = int(lookahead)
        self._num_windows = max(0, len(tokens) - 1 - self._lookahead) // window
        self.steps_per_epoch = self._num_windows // global_batch_size
        if self.steps_per_epoch < 1:
            needed = global_batch_size * window + 1 + self._lookahead
            raise ValueError(_too_short(tokens, global_batch_size, window, needed))
        self.labels_per_step = global_batch_size * window
        self._tokens, self._window, self._seed = tokens, window, seed
        self._rows = np.arange(global_batch_size, dtype=np.int64)

    def at(self, step: int, examples: slice = ALL) -> Batch:
        """The batch of a step, as above. Every batch says `starts_epoch`."""
        epoch, step_in_epoch = divmod(checked_step(step), self.steps_per_epoch)
        slack = len(self._tokens) - 1 - self._lookahead - self._num_windows * self._window
        offset = _random_below(slack + 1, seed=self._seed, epoch=epoch)
        places = step_in_epoch * len(self._rows) + self._rows[examples]
        windows = permuted(places, self._num_windows, seed=self._seed, epoch=epoch)
        starts = (offset + windows * self._window)[:, None]
        ids = _windows(self._tokens, starts, self._window + self._lookahead)
        return Batch({"ids": ids}, starts_epoch=True, epoch=epoch)


class Prefetcher:
    """Reads the batches of the next call of a training loop while the devices are busy with this one."""

    def __init__(self, batches, *, steps_per_call: int, examples: slice = ALL):
        """Args:
        batches: `ContiguousBatches`, `ShuffledWindows`, or another pure function of the step.
        steps_per_call: batches of a call at most.
        examples: those of each batch that are wanted.
        """
        self._batches = batches
        self._examples = examples
        self._steps_per_call = steps_per_call
        self._thread = futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._ahead: dict[int, futures.Future] = {}

    def batches(self, first_step: int, num_steps: int):
        """The batches of `num_steps` steps, with room for steps_per_call.

        Returns:
          {feature: [steps_per_call, examples, ...]} and starts_epoch [steps_per_call] bool; those from num_steps on
          repeat the last.
        """
        steps = range(first_step, first_step + num_steps)
        here = [
            self._ahead[step].result() if step in self._ahead else self._batches.at(step, self._examples)
            for step in steps
        ]
        here += here[-1:] * (self._steps_per_call - num_steps)
        next_steps = range(first_step + num_steps, first_step + num_steps + self._steps_per_call)
        self._ahead = {
            step: self._ahead.get(step) or self._thread.submit(self._batches.at, step, self._examples)
            for step in next_steps
        }
        features = {name: np.stack([batch.features[name] for batch in here]) for name in here[0].features}
        return features, np.array([batch.starts_epoch for batch in here])


class EvaluationBatches:
    """Batches in which every token of a split is a label exactly once.

    The tokens are cut into `batch_size` contiguous lanes of ceil(n / batch_size). Row b of batch s + 1
    goes on where row b of batch s ended: carry the state, starting from zeros at step 0. The input of a
    label is the token before it, also at the start of a lane; the input of token 0 is `eos_id`. With
    batch_size=1 every token has all the text before it as context; with more lanes the context starts
    anew batch_size - 1 times. With a lookahead a batch has also the token after its last label, that of the
    next lane at the end of one, and `eos_id` after the last token.

    Attributes:
      num_steps: batches.
      num_labels: tokens.
    """

    def __init__(self, tokens, *, batch_size: int, window: int, eos_id: int, lookahead: bool = False):
        """Plans the lanes.

        Args:
          tokens: [n] integer ids, n >= 1.
          batch_size: number of lanes; any number, also above n.
          window: labels per lane and step; any number, also one that divides nothing.
          eos_id: the id that stands before token 0, and in the padding.
          lookahead: whether batches have the token after their last label.
        Raises:
          ValueError: if there are no tokens, or a size is below 1.
        """
        if len(tokens) < 1 or batch_size < 1 or window < 1:
            raise ValueError(
                "tokens, batch_size and window must be at least 1. Received: "
                f"{len(tokens)} tokens, batch_size={batch_size}, window={window}."
            )
        self._tokens, self._window, self._eos_id = tokens, window, eos_id
        self._lookahead = int(lookahead)
        self._lane_length = -(-len(tokens) // batch_size)
        self._lane_starts = np.arange(batch_size, dtype=np.int64)[:, None] * self._lane_length
        self.num_steps = -(-self._lane_length // window)
        self.num_labels = len(tokens)

    def at(self, step: int, examples: slice = ALL) -> Batch:
        """The batch of a step in 0 .. num_steps - 1; or some of its examples."""
        if not 0 <= step < self.num_steps:
            raise ValueError(f"step must be in 0 .. {self.num_steps - 1}. Received: step={step}.")
        # A token of a lane is the label at its place, and the input at the next; before the first stands an input.
        stop = self._window + self._lookahead
        in_lane = step * self._window + np.arange(-1, stop, dtype=np.int64)[None, :]
        positions = self._lane_starts[examples] + in_lane
        is_in_lane = in_lane < self._lane_length + self._lookahead
        is_token = is_in_lane & (positions >= 0) & (positions < len(self._tokens))
        ids = np.where(is_token, self._tokens[np.where(is_token, positions, 0)], self._eos_id)
        is_label = (is_token & (in_lane < self._lane_length))[:, 1 : 1 + self._window]
        return Batch({"ids": ids.astype(np.int32), "weights": is_label.astype(np.float32)})


class LineBatches:
    """Batches in which every token of some lines is a label exactly once, each line in a lane of its own.

    Lane b holds line b, and those behind the last line hold padding. Lane b of batch s + 1 goes on where lane b of
    batch s ended: carry the state, starting from zeros at step 0. The input of a label is the token before it; that of
    a line's first is `eos_id`.

    Attributes:
      num_steps: batches.
      num_labels: tokens.
    """

    def __init__(self, lines, *, batch_size: int, window: int, eos_id: int):
        """Plans the lanes.

        Args:
          lines: at most batch_size arrays [tokens] of integer ids, one of them at least not empty.
          batch_size: number of lanes.
          window: labels per lane and step.
          eos_id: the id that stands before each line, and in the padding.
        Raises:
          ValueError: if there are no tokens or too many lines, or a size is below 1.
        """
        lengths = [len(line) for line in lines]
        if not any(lengths) or len(lines) > batch_size or window < 1:
            raise ValueError(
                "There must be 1 to batch_size lines with a token at least, and window must be at least 1. Received: "
                f"{len(lines)} lines of {sum(lengths)} tokens, batch_size={batch_size}, window={window}."
            )
        self._window = window
        self.num_steps = -(-max(lengths) // window)
        self.num_labels = sum(lengths)
        self._ids = np.full([batch_size, self.num_steps * window + 1], eos_id, np.int32)
        self._weights = np.zeros([batch_size, self.num_steps * window], np.float32)
        for lane, line in enumerate(lines):
            self._ids[lane, 1 : len(line) + 1] = line
            self._weights[lane, : len(line)] = 1

    def at(self, step: int, examples: slice = ALL) -> Batch:
        """The batch of a step in 0 .. num_steps - 1; or some of its examples."""
        start, stop = step * self._window, (step + 1) * self._window
        return Batch(
            {"ids": self._ids[examples, start : stop + 1], "weights": self._weights[examples, start:stop]}
        )


def _check_training_arguments(tokens, global_batch_size, window, seed):
    if global_batch_size < 1 or window < 1 or not 0 <= seed < 2**63:
        raise ValueError(
            "global_batch_size and window must be at least 1 and seed in 0 .. 2**63 - 1. Received: "
            f"global_batch_size={global_batch_size}, window={window}, seed={seed}."
        )
    if len(np.shape(tokens)) != 1:
        raise ValueError(f"tokens must be one stream of ids. Received: shape {np.shape(tokens)}.")


def _too_short(tokens, global_batch_size, window, needed):
    return (
        f"One batch needs {needed:,} tokens. Received: {len(tokens):,} tokens, "
        f"global_batch_size={global_batch_size}, window={window}. "
        "Use a smaller batch or window, or more text."
    )


def checked_step(step):
    if step < 0:
        raise ValueError(f"step must be at least 0. Received: step={step}.")
    return int(step)


def _windows(tokens, starts, window):
    """Ids [rows, window + 1] int32 read from `starts` [rows, 1] on, around the ring of tokens."""
    positions = (starts + np.arange(window + 1, dtype=np.int64)) % len(tokens)
    return np.asarray(tokens[positions], dtype=np.int32)


# The generator is written out here, rather than taken from a library, because a resumed run relies on
# the same step reading the same tokens, also under the next version of that library.

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x):
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014): a bijection of 64-bit words.

    Args:
      x: uint64 array.
    """
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def _key(*, seed, epoch):
    """A uint64 array of shape [1] which depends on both numbers."""
    with np.errstate(over="ignore"):
        words = np.array([seed, epoch], dtype=np.uint64)
        return _mix(_mix(words[:1] + _GOLDEN) + words[1:] * _GOLDEN)


def _random_below(bound, *, seed, epoch):
    """An integer in 0 .. bound - 1, uniform over (seed, epoch) up to a bias of bound / 2**64."""
    return int(_mix(_key(seed=seed, epoch=epoch) + _GOLDEN)[0]) * int(bound) >> 64


def permuted(places, size, *, seed, epoch):
    """Where a pseudorandom permutation of 0 .. size - 1, keyed by (seed, epoch), sends `places`.

    A Feistel network permutes the numbers of an even count of bits, the least that holds `size`; a
    result out of range is sent through again until it falls inside, fewer than 4 times on average.

    Args:
      places: int64 array.
    Returns:
      int64 array of the same shape.
    Source: Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains", sections 3 and 4.
    """
    half_bits = np.uint64(max(1, (int(size - 1).bit_length() + 1) // 2))
    low_mask = (np.uint64(1) << half_bits) - np.uint64(1)
    with np.errstate(over="ignore"):
        round_keys = _mix(_key(seed=seed, epoch=epoch) + np.arange(2, 10, dtype=np.uint64) * _GOLDEN)

    def encrypt(x):
        left, right = x >> half_bits, x & low_mask
        for round_key in round_keys:
            left, right = right, left ^ (_mix(right ^ round_key) & low_mask)
        return left << half_bits | right

    result = encrypt(places.astype(np.uint64))
    while (outside := result >= np.uint64(size)).any():
        result[outside] = encrypt(result[outside])
    return result.astype(np.int64)
