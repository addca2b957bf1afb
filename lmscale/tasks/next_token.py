"""The language model: each token of a text from those before it."""

from collections.abc import Callable, Mapping

import keras
import tensorflow as tf

from lmscale.bodies.body import Body
from lmscale.bodies.encoder import Encoder
from lmscale.data.batches import ContiguousBatches, EvaluationBatches, ShuffledWindows
from lmscale.softmax.head import Head
from lmscale.tables.rows import Lookup
from lmscale.tables.table_config import TableConfig, check_inputs_and_outputs
from lmscale.tasks.task import Labels, Task, TaskContext

_ROLE, _HEAD = "inputs", "next"


class NextToken(Task):
    """A body between an input table and an output table. One table for both is tied, two are untied.

    Attributes:
      encoder: the body with its projections.
    """

    def __init__(
        self,
        context: TaskContext,
        *,
        tables: Mapping[str, TableConfig],
        inputs: str,
        outputs: str,
        body: Callable[[], Body],
        head: Callable[..., Head],
        window: int,
        eval_window: int = 70,
        input_dim: int | None = None,
    ):
        """Builds head and body.

        Args:
          context: `TaskContext`.
          tables: {name: `TableConfig`} of the tables named by `inputs` and `outputs`.
          inputs: name of the table whose rows the body reads.
          outputs: name of the table that holds the softmax rows.
          body: function of no arguments that returns a `Body`.
          head: function (table=, vocab_size=, counts=) that returns a `Head`.
          window: time steps of a training example.
          eval_window: time steps of an evaluation batch.
          input_dim: width of what the body reads, if it is not that of the input table: a learned layer without bias
            maps one to the other. None for none.

        Raises:
          ValueError: for tables that are not there or not used, a bias without effect, sizes below 1, and what
            `Encoder` refuses.
        """
        check_inputs_and_outputs(tables, inputs=inputs, outputs=outputs)
        for name, value in (("window", window), ("eval_window", eval_window), ("input_dim", input_dim)):
            if value is not None and value < 1:
                raise ValueError(
                    f"{name} must be at least 1. Received: {name}={value}. Give it a whole number from 1 on."
                )
        super().__init__(context, tables=tables)
        self.heads = {_HEAD: self.make_head(head, table=outputs)}
        self._inputs = inputs
        self._window = window
        self._eval_window = eval_window
        self._input_layer = None
        embed_dim = tables[inputs].embed_dim
        if input_dim is not None:
            if input_dim == embed_dim:
                raise ValueError(
                    "input_dim must differ from the width of the input table, or be left out. Received: "
                    f"input_dim={input_dim}, embed_dim={embed_dim}. Leave it out."
                )
            self._input_layer = keras.layers.Dense(input_dim, use_bias=False, name="input_projection")
            self._input_layer.build([None, None, embed_dim])
        trained = context.per_replica_batch_size, window
        evaluated = context.per_replica_eval_batch_size, eval_window
        batch_size, time = trained if context.training else evaluated
        self.encoder = Encoder(
            body(),
            input_dim=input_dim or embed_dim,
            output_dim=tables[outputs].embed_dim,
            batch_size=batch_size,
            window=time,
            probe_shape=evaluated,
        )
        first = {"input_projection": self._input_layer} if self._input_layer else {}
        self.layers = first | self.encoder.layers

    def training_batches(self):
        """Streams that continue for a body with carried state, shuffled windows for others."""
        make = ContiguousBatches if self.encoder.body.stateful else ShuffledWindows
        return make(
            self.context.text.split("train"),
            global_batch_size=self.context.global_batch_size,
            window=self._window,
            seed=self.context.seed,
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
            window=self._eval_window,
            eos_id=self.context.text.eos_id,
        )

    def lookups(self, features):
        """The inputs: all tokens of a window but its last."""
        return {_ROLE: Lookup(self._inputs, features["ids"][:, :-1])}

    def labels(self, features):
        """All tokens of a window but its first."""
        ids = tf.reshape(features["ids"][:, 1:], [-1])
        weights = features.get("weights")
        return {_HEAD: Labels(ids, tf.ones(ids.shape) if weights is None else tf.reshape(weights, [-1]))}

    def initial_state(self, batch_size):
        """That of the body."""
        return self.encoder.body.initial_state(batch_size)

    def forward(self, rows, features, state, *, dropout):
        """Embeddings of a window to the hidden state before each label."""
        del features
        inputs = rows[_ROLE].embedding
        if self._input_layer is not None:
            inputs = self._input_layer(inputs)
        hidden, state = self.encoder(inputs, state, dropout=dropout)
        return {_HEAD: tf.reshape(tf.cast(hidden, tf.float32), [-1, hidden.shape[-1]])}, state
