"""The language model: each token of a text from those before it."""

from collections.abc import Callable, Mapping

import keras
import tensorflow as tf

from lmscale.bodies.body import Body
from lmscale.data.batches import ContiguousBatches, ShuffledWindows
from lmscale.softmax.head import Head
from lmscale.tables.rows import Lookup
from lmscale.tables.table_config import TableConfig
from lmscale.tasks.left_to_right import LeftToRightTask
from lmscale.tasks.task import TaskContext
from lmscale.tasks.text import check_sizes, flat_hidden, flat_labels

_ROLE, _HEAD = "inputs", "next"


class NextToken(LeftToRightTask):
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
        super().__init__(
            context, tables=tables, inputs=inputs, outputs=outputs, window=window, eval_window=eval_window
        )
        check_sizes(input_dim=input_dim)
        self.heads = {_HEAD: self.make_head(head, table=outputs)}
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
        self.encoder = self.make_encoder(body(), input_dim=input_dim or embed_dim)
        first = {"input_projection": self._input_layer} if self._input_layer else {}
        self.layers = first | self.encoder.layers

    def training_batches(self):
        """Streams that continue for a body with carried state, shuffled windows for others."""
        make = ContiguousBatches if self.encoder.body.stateful else ShuffledWindows
        return make(
            self.context.text.split("train"),
            global_batch_size=self.context.global_batch_size,
            window=self.window,
            seed=self.context.seed,
        )

    def lookups(self, features):
        """The inputs: all tokens of a window but its last."""
        return {_ROLE: Lookup(self.inputs, features["ids"][:, :-1])}

    def labels(self, features):
        """All tokens of a window but its first."""
        return {_HEAD: flat_labels(features["ids"][:, 1:], features.get("weights"))}

    def initial_state(self, batch_size):
        """That of the body."""
        return self.encoder.body.initial_state(batch_size)

    def forward(self, rows, features, state, *, dropout):
        """Embeddings of a window to the hidden state before each label."""
        del features
        hidden, state = self.encoder(self._inputs_of(rows), state, dropout=dropout)
        return {_HEAD: flat_hidden(hidden)}, state

    def decoding_features(self, ids):
        """A window whose label is not read."""
        return {"ids": tf.pad(ids, [[0, 0], [0, 1]])}

    def decoding_state(self, batch_size, length):
        """That of the body."""
        return self.encoder.body.decoding_state(batch_size, length)

    def decode(self, rows, state):
        """As `forward`, by the body's `decode`."""
        hidden, state = self.encoder.decode(self._inputs_of(rows), state)
        return tf.cast(hidden, tf.float32), state

    def _inputs_of(self, rows):
        """What the body reads."""
        inputs = rows[_ROLE].embedding
        return inputs if self._input_layer is None else self._input_layer(inputs)
