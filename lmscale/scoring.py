"""Exact log-probabilities of a text under a model, token by token."""

import dataclasses
import itertools

import numpy as np

from lmscale.evaluation import Evaluator
from lmscale.measures import perplexity
from lmscale.tasks.left_to_right import check_left_to_right

# Lines that are sorted by length, in batches: those of a batch then need few steps of padding.
_SORTED_BATCHES = 32


@dataclasses.dataclass(frozen=True)
class ScoredLine:
    """A line: the ids of its tokens [n], `<eos>` the last, and their log-probabilities [n] in nats."""

    ids: np.ndarray
    log_probs: np.ndarray


class Scorer:
    """Scores lines with a restored model, on its devices."""

    def __init__(self, restored, *, batch_size):
        """Args:
          restored: `RestoredModel`, filled.
          batch_size: lines side by side, over all devices.

        Raises:
          ValueError: for a task that does not predict text from left to right.
        """
        check_left_to_right(restored.task)
        self._task = restored.task
        self._restored = restored
        self._batch_size = batch_size

    def score_lines(self, lines):
        """Scores each line by itself, after an `<eos>`.

        Args:
          lines: iterable of [tokens] arrays of ids, none empty; read no further ahead than a few batches.

        Yields:
          `ScoredLine` of each, in their order.
        """
        evaluator = self._evaluator(self._batch_size)
        lines = iter(lines)
        while chunk := list(itertools.islice(lines, _SORTED_BATCHES * self._batch_size)):
            order = sorted(range(len(chunk)), key=lambda i: -len(chunk[i]))
            log_probs: dict[int, np.ndarray] = {}
            for start in range(0, len(order), self._batch_size):
                numbers = order[start : start + self._batch_size]
                batches = self._task.line_batches([chunk[i] for i in numbers], batch_size=self._batch_size)
                losses = self._losses(evaluator, batches)
                log_probs |= {i: -losses[lane, : len(chunk[i])] for lane, i in enumerate(numbers)}
            for i, ids in enumerate(chunk):
                yield ScoredLine(ids, log_probs[i])

    def score_stream(self, lines):
        """Scores lines as one text: each token after all before it, as an evaluation with one lane does.

        Args:
          lines: as of `score_lines`; all are read before the first is scored.

        Yields:
          As `score_lines`.
        """
        lines = list(lines)
        batches = self._task.stream_batches(np.concatenate(lines))
        losses = self._losses(self._evaluator(1), batches)[0]
        start = 0
        for ids in lines:
            yield ScoredLine(ids, -losses[start : start + len(ids)])
            start += len(ids)

    def _evaluator(self, batch_size):
        restored = self._restored
        return Evaluator(
            restored.model,
            strategy=restored.strategy,
            batch_size=batch_size,
            compute_dtype=restored.experiment.compute_dtype,
        )

    def _losses(self, evaluator, batches):
        """[lanes, steps * window] float64."""
        losses = evaluator.label_losses(batches, head=self._task.token_head)
        return np.concatenate(list(losses), axis=1).astype(np.float64)


@dataclasses.dataclass
class Total:
    """What is told of all scored lines together."""

    lines: int = 0
    tokens: int = 0
    loss_nats: float = 0.0

    def add(self, line):
        """Counts a `ScoredLine`."""
        self.lines += 1
        self.tokens += len(line.ids)
        self.loss_nats -= float(line.log_probs.sum())

    def report(self):
        """{"lines", "tokens", "log_prob", "loss_nats", "perplexity"}: the sum, and the mean of a token."""
        mean = self.loss_nats / self.tokens
        return {
            "lines": self.lines,
            "tokens": self.tokens,
            "log_prob": -self.loss_nats,
            "loss_nats": mean,
            "perplexity": perplexity(mean),
        }
