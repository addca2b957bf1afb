"""What a task has that predicts a text token by token: `lmscale.score` and `lmscale.generate` ask for it."""

import abc

from lmscale.tasks.task import Task


class TextTask(Task):
    """Base of the tasks with one head, whose labels are the tokens of a text in their order.

    Its vocabulary is that of the text, `PreparedData.vocabulary`; before a text stands `<eos>`.
    """

    @property
    def token_head(self):
        """Name of the head that predicts tokens."""
        (name,) = self.heads
        return name

    @abc.abstractmethod
    def line_batches(self, lines, *, batch_size):
        """The batches in which every token of some lines is a label once, each line without what stands before it.

        Args:
          lines: at most `batch_size` arrays [tokens] of ids, one of them at least not empty.
          batch_size: examples of a batch: the lines and, behind them, padding.

        Returns:
          As `evaluation_batches`. Label number i of step s of a line is its token number s * (labels of a step) + i.
        """

    @abc.abstractmethod
    def stream_batches(self, tokens):
        """The same of one text [tokens], with all that stands before a token: as an evaluation with one lane."""

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


def check_reads_text(task):
    """Raises ValueError unless the task can score and continue texts."""
    if not isinstance(task, TextTask):
        raise ValueError(
            "The task of the run must predict a text token by token, as NextToken does. Received: a run of "
            f"{type(task).__name__}. Pass the work directory of a language model."
        )
