"""Batches of words with their windows, as word2vec reads a text: pure functions of (tokens, seed, step).

A token that is no word (`<unk>`, `<eos>`) leaves the text, and of frequent words some occurrences do, others in each
epoch (subsampling, Mikolov et al. 2013, arXiv:1310.4546, section 2.3): then windows are cut, so that they reach further
in a text of frequent words. Each word has a window of its own, at most `window` words to either side.

An example is a chunk of consecutive words of that stream, with the `window` words before and after it, which are
context alone. What an epoch reads is made once an epoch, in O(tokens); it depends on (seed, epoch) alone.
"""

import dataclasses

import numpy as np

from lmscale.data.batches import ALL, Batch, permuted

# Tokens that are subsampled together: what is beside the stream in memory.
_BLOCK = 1 << 20
_SUBSAMPLING, _RADII = 0, 1


@dataclasses.dataclass(frozen=True)
class WordStream:
    """The words of an epoch, and how far each one's window goes.

    Attributes:
      ids: [words] int32.
      reach: [words, 2] uint8: labels before and after each word, consecutive.
    """

    ids: np.ndarray
    reach: np.ndarray


class WordChunks:
    """Training batches: chunks of an epoch's words, in a new order each epoch.

    The chunks of an epoch are as many as the expected number of words needs to fill whole batches, and begin at equal
    distances in the stream, so that nearly every word is a centre once and a few are twice.

    Attributes:
      steps_per_epoch: batches.
      labels_per_step: words of a batch that are centres.
      words_per_epoch: words of the text, before subsampling.
    """

    def __init__(
        self,
        tokens,
        *,
        counts,
        no_words,
        eos_id,
        global_batch_size,
        chunk,
        window,
        subsampling,
        dynamic_window,
        cross_lines,
        seed,
    ):
        """Checks the arguments and counts the words.

        Args:
          tokens: [n] integer ids, an array or memory map.
          counts: [vocab_size] int, how often each id occurs.
          no_words: ids that are no words and leave the text.
          eos_id: the id that ends a line.
          global_batch_size: chunks of a batch, over all devices together.
          chunk: words of a chunk.
          window: words to either side of a window at most, 1 to 255.
          subsampling: frequency t from which occurrences are dropped: of a word with the share f of all words, one is
            kept with probability min(1, sqrt(t / f) + t / f). None keeps all.
          dynamic_window: whether each word's window is drawn from 1 to `window`, rather than `window`.
          cross_lines: whether windows go on beyond the ends of lines.
          seed: integer >= 0.

        Raises:
          ValueError: if an argument is out of range, or there are no words.
        """
        for name, value in (("global_batch_size", global_batch_size), ("chunk", chunk), ("window", window)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1. Received: {name}={value}.")
        if window > 255:
            raise ValueError(f"window must be in 1 .. 255. Received: window={window}.")
        if subsampling is not None and not 0 < subsampling <= 1:
            raise ValueError(
                "subsampling must be in (0, 1], or None to keep all words. Received: "
                f"subsampling={subsampling}. Usual are 1e-3 for small texts and 1e-5 for large ones."
            )
        counts = np.asarray(counts, np.int64).copy()
        counts[list(no_words)] = 0
        self.words_per_epoch = int(counts.sum())
        if not self.words_per_epoch:
            raise ValueError(
                f"The training text must have words. Received: {len(tokens):,} tokens, none of them a word."
            )
        self._keep = keep_probabilities(counts, subsampling=subsampling)
        self._tokens, self._eos_id, self._seed = tokens, eos_id, seed
        self._chunk, self._window = chunk, window
        self._dynamic_window, self._cross_lines = dynamic_window, cross_lines
        self._examples = np.arange(global_batch_size, dtype=np.int64)
        self.labels_per_step = global_batch_size * chunk
        expected = float(counts @ self._keep)
        self.steps_per_epoch = max(1, int(np.ceil(expected / self.labels_per_step)))
        self._epoch, self._stream, self._starts = -1, None, None

    def at(self, step, examples=ALL):
        """The batch of a step, counted from 0 over all epochs; or some of its examples.

        Features:
          ids: [examples, window + chunk + window] int32: the words of a chunk and those around it. Beyond the ends of
            the text, 0, which no window reaches.
          reach: [examples, chunk, 2] int32: labels before and after each word of the chunk.
        """
        if step < 0:
            raise ValueError(f"step must be at least 0. Received: step={step}.")
        epoch, step_in_epoch = divmod(int(step), self.steps_per_epoch)
        stream = self.stream(epoch)
        starts = self._starts[step_in_epoch * len(self._examples) + self._examples[examples]]
        return Batch(
            chunks_at(stream, starts, chunk=self._chunk, window=self._window), starts_epoch=True, epoch=epoch
        )

    def stream(self, epoch):
        """The `WordStream` of an epoch. That of the last call is kept."""
        if epoch != self._epoch:
            self._stream = None  # Not two at a time.
            self._stream = word_stream(
                self._tokens,
                keep=self._keep,
                eos_id=self._eos_id,
                window=self._window,
                dynamic_window=self._dynamic_window,
                cross_lines=self._cross_lines,
                seed=self._seed,
                epoch=epoch,
            )
            self._starts = self._shuffled_starts(epoch)
            self._epoch = epoch
        return self._stream

    def _shuffled_starts(self, epoch):
        """[chunks of the epoch] int64: places in the stream where they begin, in the order in which they are read."""
        num_chunks = self.steps_per_epoch * len(self._examples)
        slack = max(0, len(self._stream.ids) - self._chunk)
        numbers = permuted(np.arange(num_chunks, dtype=np.int64), num_chunks, seed=self._seed, epoch=epoch)
        return numbers * slack // max(1, num_chunks - 1)


def keep_probabilities(counts, *, subsampling):
    """[vocab_size] float64: how likely an occurrence of each id is to stay; 0 for ids that do not occur.

    Args:
      counts: [vocab_size] int, 0 for what is no word.
      subsampling: as of `WordChunks`.

    Source: the program of Mikolov et al. 2013 (word2vec.c); their paper has another formula.
    """
    share = counts / counts.sum()
    with np.errstate(divide="ignore"):
        ratio = np.inf if subsampling is None else subsampling / share
        keep = np.minimum(1.0, np.sqrt(ratio) + ratio)
    return np.where(counts > 0, keep, 0.0)


def word_stream(tokens, *, keep, eos_id, window, dynamic_window, cross_lines, seed, epoch):
    """The `WordStream` of an epoch; arguments as of `WordChunks`, `keep` as `keep_probabilities` returns it."""
    # A draw is one of 2**32: a word of probability 1 stays whatever is drawn.
    bounds = np.round(keep * 2.0**32).astype(np.uint64)
    kept_ids, kept_lines, lines = [], [], 0
    for start in range(0, len(tokens), _BLOCK):
        ids = np.asarray(tokens[start : start + _BLOCK])
        draws = _draws(len(ids), seed=seed, epoch=epoch, purpose=_SUBSAMPLING, start=start)
        is_kept = draws < bounds[ids]
        kept_ids.append(ids[is_kept].astype(np.int32))
        if not cross_lines:
            line = np.cumsum(ids == eos_id, dtype=np.int64) + lines
            lines = int(line[-1])
            kept_lines.append(line[is_kept].astype(np.int32))
    ids = np.concatenate(kept_ids or [np.zeros([0], np.int32)])
    lines = None if cross_lines else np.concatenate(kept_lines or [np.zeros([0], np.int32)])
    radii = np.full(ids.shape, window, np.uint8)
    if dynamic_window:
        for start in range(0, len(ids), _BLOCK):
            part = radii[start : start + _BLOCK]
            draws = _draws(len(part), seed=seed, epoch=epoch, purpose=_RADII, start=start)
            part[:] = (draws.astype(np.uint64) * np.uint64(window) >> np.uint64(32)) + np.uint64(1)
    return WordStream(ids, _reach(radii, lines, window=window))


def _reach(radii, lines, *, window):
    """[words, 2] uint8: how many words before and after each one are in its radius and its line."""
    before, after = np.zeros(radii.shape, np.uint8), np.zeros(radii.shape, np.uint8)
    for offset in range(1, min(window, len(radii) - 1) + 1):
        # Lines only rise: where a word at this distance is of the same line, so are those between.
        is_near = True if lines is None else lines[offset:] == lines[:-offset]
        before[offset:] += is_near
        after[:-offset] += is_near
    return np.stack([np.minimum(before, radii), np.minimum(after, radii)], axis=1)


def chunks_at(stream, starts, *, chunk, window):
    """{"ids", "reach"} of the chunks that begin at `starts` [examples] int64; as of `WordChunks.at`."""
    places = starts[:, None] + np.arange(-window, chunk + window, dtype=np.int64)
    is_word = (places >= 0) & (places < len(stream.ids))
    places = np.where(is_word, places, 0)
    centres = slice(window, window + chunk)
    reach = np.where(is_word[:, centres, None], stream.reach[places[:, centres]], 0)
    return {"ids": np.where(is_word, stream.ids[places], 0), "reach": reach.astype(np.int32)}


def _draws(count, *, seed, epoch, purpose, start):
    """[count] uint32 draws from number `start` on, an even one; a function of all arguments.

    The generator is numpy's Philox, whose raw numbers stay the same from version to version (NEP 19).
    """
    key = np.array([seed, (epoch << 1) + purpose], np.uint64)
    generator = np.random.Philox(key=key)
    # A step of the counter is four numbers of 64 bits, eight draws.
    generator.advance(start // 8)
    raw = generator.random_raw((start % 8 + count + 1) // 2)
    return raw.astype("<u8", copy=False).view("<u4")[start % 8 : start % 8 + count]


class ConsecutiveChunks:
    """Batches of evaluation: a stream in consecutive chunks, every word once.

    Attributes:
      num_steps: batches.
      num_labels: what the losses are a mean over.
    """

    def __init__(self, stream, *, batch_size, chunk, window, num_labels):
        """Args:
        stream: `WordStream`.
        batch_size: chunks of a batch; any number.
        chunk, window: as of `WordChunks`.
        num_labels: int, labels that the task makes of the stream.
        """
        self._stream, self._chunk, self._window = stream, chunk, window
        self._examples = np.arange(batch_size, dtype=np.int64)
        self.num_steps = -(-len(stream.ids) // (batch_size * chunk))
        self.num_labels = num_labels

    def at(self, step, examples=ALL):
        """The batch of a step in 0 .. num_steps - 1, or some of its examples; features as of `WordChunks.at`."""
        if not 0 <= step < self.num_steps:
            raise ValueError(f"step must be in 0 .. {self.num_steps - 1}. Received: step={step}.")
        starts = (step * len(self._examples) + self._examples[examples]) * self._chunk
        return Batch(chunks_at(self._stream, starts, chunk=self._chunk, window=self._window))
