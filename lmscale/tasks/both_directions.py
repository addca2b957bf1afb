"""Two language models over one table: each token from those before it, and from those after it."""

from collections.abc import Callable, Mapping

import tensorflow as tf

from lmscale.bodies.body import Body
from lmscale.data.batches import ShuffledWindows
from lmscale.softmax.head import Head
from lmscale.tables.rows import Lookup
from lmscale.tables.table_config import TableConfig
from lmscale.tasks.task import TaskContext
from lmscale.tasks.text import TextTask, flat_hidden, flat_labels

_ROLE = "tokens"
# {head: the word for its direction in paths of parameters}.
_NEXT, _PREVIOUS = "next", "previous"
_DIRECTIONS = {_NEXT: "forward", _PREVIOUS: "backward"}


class BothDirections(TextTask):
    """A forward and a backward body; they share the input table and the output table, which may be one.

    The head `next` predicts each token of a window from those before it, the head `previous` from those after it. Both
    predict the same tokens; a window has one more at either end. It is a text of its own for both: what came before it
    would be known to one of them alone. The loss is the sum of both heads'.

    Attributes:
      encoders: {head: `Encoder`}.

    Source: Peters et al. 2018 (arXiv:1802.05365), section 3.1: token representation and softmax are shared, the
    recurrent layers are not.
    """

    lookahead = True

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
    ):
        """Builds heads and bodies.

        Args:
          context: `TaskContext`.
          tables: {name: `TableConfig`} of the tables named by `inputs` and `outputs`.
          inputs: name of the table whose rows the bodies read.
          outputs: name of the table that holds the softmax rows.
          body: function of no arguments that returns a causal `Body`; called once for each direction.
          head: function (table=, vocab_size=, counts=) that returns a `Head`; likewise.
          window: labels of a training example.
          eval_window: labels of an example in evaluations.

        Raises:
          ValueError: for tables that are not there or not used, a bias without effect, sizes below 1, a body that is
            not causal, and what `Encoder` refuses.
        """
        super().__init__(
            context, tables=tables, inputs=inputs, outputs=outputs, window=window, eval_window=eval_window
        )
        self.heads = {name: self.make_head(head, table=outputs) for name in _DIRECTIONS}
        self.encoders = {}
        self.layers = {}
        for name, direction in _DIRECTIONS.items():
            made = body()
            if not made.causal:
                raise ValueError(
                    "The body of each direction must not look ahead: it would see what it predicts. Received: "
                    f"{type(made).__name__}, whose causal is False. Name one that reads forward; the task turns the "
                    "text round for the other direction."
                )
            self.encoders[name] = self.make_encoder(made, input_dim=tables[inputs].embed_dim)
            self.layers |= {f"{direction}/{k}": layer for k, layer in self.encoders[name].layers.items()}

    def training_batches(self):
        """Shuffled windows."""
        return ShuffledWindows(
            self.context.text.split("train"),
            global_batch_size=self.context.global_batch_size,
            window=self.window,
            seed=self.context.seed,
            lookahead=self.lookahead,
        )

    def lookups(self, features):
        """All tokens of a window."""
        return {_ROLE: Lookup(self.inputs, features["ids"])}

    def labels(self, features):
        """All tokens of a window but its first and its last; those of `previous` from the last one on."""
        ids, weights = features["ids"][:, 1:-1], features.get("weights")
        return {
            _NEXT: flat_labels(ids, weights),
            _PREVIOUS: flat_labels(_turned(ids), None if weights is None else _turned(weights)),
        }

    def forward(self, rows, features, state, *, dropout):
        """Embeddings of a window to the hidden states before each label, and after each."""
        del features
        embedding = rows[_ROLE].embedding
        inputs = {_NEXT: embedding[:, :-2], _PREVIOUS: _turned(embedding[:, 2:])}
        hidden = {}
        for name, encoder in self.encoders.items():
            start = encoder.body.initial_state(embedding.shape[0])
            output, _ = encoder(inputs[name], start, dropout=dropout)
            hidden[name] = flat_hidden(output)
        return hidden, state


def _turned(x):
    """[examples, time, ...] with the last time step first."""
    return tf.reverse(x, [1])
