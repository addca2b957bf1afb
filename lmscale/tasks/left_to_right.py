"""What a task has that predicts a text from left to right: `lmscale.score` and `lmscale.generate` ask for it."""

import abc

from lmscale.data.batches import EvaluationBatches, LineBatches
from lmscale.tasks.text import TextTask


class LeftToRightTask(TextTask):
    """Base of the text tasks with one head, which predicts each token from those before it; `<eos>` stands first."""

    @property
    def token_head(self):
        """Name of the head."""
        (name,) = self.heads
        return name

    def line_batches(self, lines, *, batch_size):
        """The batches in which every token of some lines is a label once, each line without what stands before it.

        Args:
          lines: at most `batch_size` arrays [tokens] of ids, one of them at least not empty.
          batch_size: examples of a batch: the lines and, behind them, padding.

        Returns:
          `LineBatches`, in windows as in evaluations; of lines that are all shorter, in narrower ones.
        """
        longest = max(map(len, lines))
        return LineBatches(
            lines,
            batch_size=batch_size,
            window=min(
                self.eval_window, 1 << (longest - 1).bit_length()
            ),  # Few widths: each is compiled anew.
            eos_id=self.context.text.eos_id,
        )

    def stream_batches(self, tokens):
        """The same of one text [tokens], in one lane of an evaluation."""
        return EvaluationBatches(
            tokens, batch_size=1, window=self.eval_window, eos_id=self.context.text.eos_id
        )

    @abc.abstractmethod
    def decoding_features(self, ids):
        """Features whose `lookups` are of these tokens: [batch, time] int32, known or drawn just now."""

    @abc.abstractmethod
    def decoding_state(self, batch_size, length):
        """What decoding carries, before the first token; arguments and result as of `Body.decoding_state`."""

    @abc.abstractmethod
    def decode(self, rows, state):
        """The hidden states behind the next tokens, without any collective.

        Args:
          rows: {role: `Rows`}, [batch, time, ...], of `decoding_features`: of the tokens that follow those before.
          state: as `decoding_state` or the call before returned it.

        Returns:
          (hidden [batch, time, embed_dim of the head's table] float32, new state).
        """


def check_left_to_right(task):
    """Raises ValueError unless the task can score and continue texts."""
    if not isinstance(task, LeftToRightTask):
        raise ValueError(
            "The task of the run must predict a text from left to right, as NextToken does. Received: a run of "
            f"{type(task).__name__}. Pass the work directory of a language model."
        )
