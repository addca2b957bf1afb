"""What a step asks of a task. To add one, add a file beside this one with a subclass; name it as `Experiment.task`.

A task names its tables and its heads, makes batches as a pure function of the step, says which rows a batch reads and
which it predicts, and maps rows to the hidden states that its heads compare with their tables. It knows no devices, no
collectives and no optimizer: the step, in `trainer.py`, is the same for all tasks.
"""

import abc
import dataclasses
from collections.abc import Mapping, Sequence

import keras
import tensorflow as tf

from lmscale.data.columns import PreparedColumns
from lmscale.data.prepared import Prepared
from lmscale.data.token_files import PreparedData
from lmscale.data.vocab import UnnamedVocabulary, Vocabulary, VocabularyFile
from lmscale.softmax.bands import Neighbours
from lmscale.softmax.head import Head
from lmscale.tables.table_config import TableConfig


@dataclasses.dataclass(frozen=True)
class Labels:
    """What a head has to predict, in the order of the examples and as much for each of them.

    Attributes:
      ids: [n] int32, the label of each hidden state.
      weights: [n] float32, 1, or 0 for padding: losses are means over them, of the whole batch.
      neighbours: None; or each hidden state has several labels, those around its place: then there are more `ids`,
        `window` before and after the places of each example, and `weights` are how many labels a state has. Of heads
        that take them.
      excluded: [n, m] int32, ids that do not compete with the label where an evaluation ranks it, negative for none;
        None for none at all.
    """

    ids: tf.Tensor
    weights: tf.Tensor
    neighbours: Neighbours | None = None
    excluded: tf.Tensor | None = None

    @property
    def counted_ids(self):
        """[n] int32: the id that each loss is counted under: its label, or where it has several, that at its place."""
        return self.ids if self.neighbours is None else self.neighbours.state_ids

    def part(self, cut, *, num_parts):
        """Those of some of the examples: `cut` maps a tensor of all of them to one of `num_parts` equal parts."""
        return Labels(
            cut(self.ids),
            cut(self.weights),
            None if self.neighbours is None else self.neighbours.part(cut, num_parts=num_parts),
            None if self.excluded is None else cut(self.excluded),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskContext:
    """What a task is told of the run.

    Attributes:
      data: `PreparedData` or `PreparedColumns`; tasks ask for `text` or `columns`.
      seed: the run's.
      global_batch_size: examples of a training batch, over all devices.
      eval_batch_size: examples of an evaluation batch, over all devices.
      num_replicas: devices.
      training: whether steps of training will follow, rather than evaluations alone.
    """

    data: Prepared
    seed: int
    global_batch_size: int
    eval_batch_size: int
    num_replicas: int
    training: bool

    @property
    def text(self) -> PreparedData:
        """The data of a task that reads a text; ValueError for other data."""
        if isinstance(self.data, PreparedColumns):
            raise ValueError(
                f"The data of this task must be a text. Received: {self.data.directory}, examples in columns. Set "
                "DATA_DIR to what lmscale.prepare made of a text, or Experiment.task to a task of such examples."
            )
        return self.data

    @property
    def columns(self) -> PreparedColumns:
        """The data of a task that reads examples in columns; ValueError for other data."""
        if not isinstance(self.data, PreparedColumns):
            raise ValueError(
                f"The data of this task must be examples in columns. Received: {self.data.directory}, a text. Set "
                "DATA_DIR to what lmscale.prepare made with --format=histories or --format=table."
            )
        return self.data

    @property
    def per_replica_batch_size(self):
        """Examples of a training batch on each device."""
        return -(-self.global_batch_size // self.num_replicas)

    @property
    def per_replica_eval_batch_size(self):
        """Examples of an evaluation batch on each device; padding fills up what does not divide."""
        return -(-self.eval_batch_size // self.num_replicas)


class Task(abc.ABC):
    """Base of the tasks. Build it inside `strategy.scope()`.

    Attributes:
      context: `TaskContext`.
      tables: {name: `TableConfig`}.
      vocabularies: {name of a table: the vocabulary of its rows}.
      heads: {name: `Head`}, each over one of the tables.
      layers: {name: Keras layer}, built: all that `forward` reads.
      measures: {head: names of what evaluations tell of the ranks of its labels}, see `lmscale.measures`.
    """

    heads: Mapping[str, Head]
    layers: Mapping[str, keras.layers.Layer]
    measures: Mapping[str, Sequence[str]] = {}

    def __init__(self, context: TaskContext, *, tables: Mapping[str, TableConfig]):
        """Raises ValueError for a table whose vocabulary the data has not."""
        self.context = context
        self.tables = tables
        self.vocabularies: dict[str, Vocabulary | VocabularyFile | UnnamedVocabulary] = {}
        known = context.data.vocabularies
        for name, config in tables.items():
            if config.vocabulary not in known:
                raise ValueError(
                    f"The vocabulary of a table must be one of the data's, {', '.join(sorted(known))}. Received: "
                    f"vocabulary={config.vocabulary!r} of the table {name!r}. Set its TableConfig.vocabulary."
                )
            self.vocabularies[name] = known[config.vocabulary]

    def make_head(self, factory, *, table):
        """The `Head` that a factory (table=, vocab_size=, counts=) makes over the rows of the table named `table`."""
        vocabulary = self.vocabularies[table]
        return factory(table=table, vocab_size=len(vocabulary), counts=vocabulary.counts)

    def num_rows(self, table):
        """Rows of the table named `table`."""
        return len(self.vocabularies[table])

    @abc.abstractmethod
    def training_batches(self):
        """The batches of the training split.

        Returns:
          An object with `at(step, examples=slice(None)) -> Batch`, a pure function, `steps_per_epoch` and
          `labels_per_step`. Of several processes, each asks for its own examples of a batch alone.
        """

    @abc.abstractmethod
    def evaluation_batches(self, split, *, limit=None):
        """The batches in which every label of a split counts once.

        Args:
          split: "train", "valid" or "test".
          limit: labels to stop after; None for all.

        Returns:
          An object with `at(step, examples=slice(None)) -> Batch`, `num_steps` and `num_labels`. Entry i of batch
          s + 1 goes on where entry i of batch s ended, for tasks that carry a state.

        Raises:
          ValueError: if the split is empty.
        """

    @abc.abstractmethod
    def lookups(self, features):
        """The rows that `forward` reads.

        Args:
          features: {name: [examples, ...] tensor} of a `Batch`, or of some of its examples.

        Returns:
          {role: `Lookup`}, ids [examples, ...].
        """

    @abc.abstractmethod
    def labels(self, features):
        """{head: `Labels`} of these examples; arguments as of `lookups`."""

    def initial_state(self, batch_size):
        """What is carried from batch to batch, at its start: a list of [batch_size, ...] tensors."""
        del batch_size
        return []

    @abc.abstractmethod
    def forward(self, rows, features, state, *, dropout):
        """Rows to hidden states, without any collective.

        Args:
          rows: {role: `Rows`}, embedding [examples, ..., embed_dim], as `lookups` asked for them.
          features: as of `lookups`.
          state: as `initial_state` returns it.
          dropout: `DropoutStream` in training, None in evaluation.

        Returns:
          ({head: hidden [n, embed_dim of its table] float32}, new state), in the order of the labels.
        """
