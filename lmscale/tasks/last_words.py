"""The next word from the last few, each through one matrix: a language model without recurrence."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from lmscale.data.last_words import NEXT, LastWordsColumns
from lmscale.softmax.head import Head
from lmscale.tables.table_config import TableConfig
from lmscale.tasks.classification import Classification
from lmscale.tasks.task import TaskContext


class LastWords(Classification):
    """`Classification` of a text: the features are the last words, which share one table, the class is the next word.

    Source: Bengio et al. 2003, "A neural probabilistic language model"; with `shared_dim` all places share one matrix.
    """

    def __init__(
        self,
        context: TaskContext,
        *,
        tables: Mapping[str, TableConfig],
        inputs: str,
        outputs: str,
        head: Callable[..., Head],
        num_words: int = 5,
        shared_dim: int | None = None,
        hidden_dims: Sequence[int] = (),
        activation: str = "relu",
        dropout: float = 0.0,
        measures: Sequence[str] = (),
    ):
        """Args:
          context: `TaskContext`, of a text.
          tables: {name: `TableConfig`} of the tables named by `inputs` and `outputs`; one for both is tied.
          inputs: name of the table that all words are read from.
          outputs: name of the table that holds the softmax rows.
          num_words: how many words are read.
          head, shared_dim, hidden_dims, activation, dropout, measures: as of `Classification`.

        Raises:
          ValueError: for num_words below 1, and what `Classification` refuses.
        """
        if num_words < 1:
            raise ValueError(f"num_words must be at least 1. Received: num_words={num_words}.")
        super().__init__(
            dataclasses.replace(context, data=LastWordsColumns(context.text, num_words=num_words)),
            tables=tables,
            features={f"word_{i}": inputs for i in range(1, num_words + 1)},
            labels={NEXT: outputs},
            head=head,
            shared_dim=shared_dim,
            hidden_dims=hidden_dims,
            activation=activation,
            dropout=dropout,
            measures=measures,
        )
