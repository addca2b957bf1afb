"""Word vectors from the words around each word: skip-gram and CBOW (Mikolov et al. 2013, arXiv:1301.3781)."""

from collections.abc import Callable, Mapping

import tensorflow as tf

from lmscale.data.word_chunks import WordChunks
from lmscale.softmax.bands import Neighbours
from lmscale.softmax.head import Head
from lmscale.tables.rows import Lookup
from lmscale.tables.table_config import TableConfig
from lmscale.tasks.task import Labels, Task, TaskContext

_ROLE, _HEAD = "words", "neighbours"


class SkipGram(Task):
    """Each word's neighbours from the word alone.

    An example is a chunk of consecutive words; a step reads each of them once from the input table, and once, with the
    words at either end, from the output table. One table for both is tied.
    """

    layers: Mapping = {}

    def __init__(
        self,
        context: TaskContext,
        *,
        tables: Mapping[str, TableConfig],
        inputs: str,
        outputs: str,
        head: Callable[..., Head],
        window: int = 5,
        chunk: int = 32,
        subsampling: float | None = 1e-3,
        dynamic_window: bool = True,
        cross_lines: bool = False,
    ):
        """Args:
          context: `TaskContext`; a batch's examples are chunks.
          tables: {name: `TableConfig`} of the tables named by `inputs` and `outputs`.
          inputs: name of the table that holds the word vectors.
          outputs: name of the table that holds the softmax rows.
          head: function (table=, vocab_size=, counts=) that returns a `Head`.
          window, subsampling, dynamic_window, cross_lines: as of `WordChunks`.
          chunk: words of an example.

        Raises:
          ValueError: for tables that are not there or not used, and a head that takes one label a state.
        """
        data = context.data
        self.tables = tables
        self.heads = {_HEAD: head(table=outputs, vocab_size=data.vocab_size, counts=data.counts)}
        self._context, self._inputs, self._window = context, inputs, window
        self._batches = {
            "chunk": chunk,
            "window": window,
            "subsampling": subsampling,
            "dynamic_window": dynamic_window,
            "cross_lines": cross_lines,
        }

    def training_batches(self):
        context, data = self._context, self._context.data
        return WordChunks(
            data.split("train"),
            counts=data.counts,
            no_words={data.unk_id, data.eos_id},
            eos_id=data.eos_id,
            global_batch_size=context.global_batch_size,
            seed=context.seed,
            **self._batches,
        )

    def evaluation_batches(self, split, *, limit=None):
        raise NotImplementedError

    def lookups(self, features):
        ids = features["ids"]
        return {_ROLE: Lookup(self._inputs, ids[:, self._window : ids.shape[1] - self._window])}

    def labels(self, features):
        ids, window = features["ids"], self._window
        before, after = (tf.reshape(features["reach"][..., i], [-1]) for i in range(2))
        centres = tf.reshape(ids[:, window : ids.shape[1] - window], [-1])
        neighbours = Neighbours(before, after, centres, window)
        return {_HEAD: Labels(tf.reshape(ids, [-1]), neighbours.num_labels(), neighbours)}

    def forward(self, rows, features, state, *, dropout):
        embedding = rows[_ROLE].embedding
        return {_HEAD: tf.reshape(embedding, [-1, embedding.shape[-1]])}, state
