"""What tasks over windows of one running text have in common: tables at both ends, encoders, lanes of evaluation."""

from collections.abc import Mapping

import tensorflow as tf

from lmscale.bodies.encoder import Encoder
from lmscale.data.batches import EvaluationBatches
from lmscale.tables.table_config import TableConfig, check_inputs_and_outputs
from lmscale.tasks.task import Labels, Task, TaskContext


class TextTask(Task):
    """Base of tasks that read a window of tokens from one table and predict tokens by another, or by the same one.

    Attributes:
      inputs, outputs: names of the tables.
      window, eval_window: labels of an example in training, and in evaluations.
      lookahead: whether a window has the token after its last label.
    """

    lookahead = False

    def __init__(
        self,
        context: TaskContext,
        *,
        tables: Mapping[str, TableConfig],
        inputs: str,
        outputs: str,
        window: int,
        eval_window: int,
    ):
        """Raises ValueError for tables that are not there or not used, a bias without effect, and sizes below 1."""
        check_inputs_and_outputs(tables, inputs=inputs, outputs=outputs)
        check_sizes(window=window, eval_window=eval_window)
        super().__init__(context, tables=tables)
        self.inputs, self.outputs = inputs, outputs
        self.window, self.eval_window = window, eval_window

    def make_encoder(self, body, *, input_dim):
        """The `Encoder` of a body over inputs of a width, to that of the output table."""
        context = self.context
        trained = context.per_replica_batch_size, self.window
        evaluated = context.per_replica_eval_batch_size, self.eval_window
        batch_size, time = trained if context.training else evaluated
        return Encoder(
            body,
            input_dim=input_dim,
            output_dim=self.tables[self.outputs].embed_dim,
            batch_size=batch_size,
            window=time,
            probe_shape=evaluated,
        )

    def evaluation_batches(self, split, *, limit=None):
        """The text in eval_batch_size lanes, each of which starts without context."""
        tokens = self.context.text.split(split)
        if not len(tokens):
            raise ValueError(
                f"The split to evaluate must have tokens. Received: {split}, empty. Prepare data with such a split."
            )
        return EvaluationBatches(
            tokens[:limit],
            batch_size=self.context.eval_batch_size,
            window=self.eval_window,
            eos_id=self.context.text.eos_id,
            lookahead=self.lookahead,
        )


def flat_labels(ids, weights):
    """`Labels` of [examples, window] ids; weights likewise, None for ones."""
    ids = tf.reshape(ids, [-1])
    return Labels(ids, tf.ones(ids.shape) if weights is None else tf.reshape(weights, [-1]))


def flat_hidden(hidden):
    """[examples, window, dim] -> [labels, dim] float32, as heads take it."""
    return tf.reshape(tf.cast(hidden, tf.float32), [-1, hidden.shape[-1]])


def check_sizes(**sizes):
    """Raises ValueError unless every size is at least 1, or None."""
    for name, value in sizes.items():
        if value is not None and value < 1:
            raise ValueError(
                f"{name} must be at least 1. Received: {name}={value}. Give it a whole number from 1 on."
            )
