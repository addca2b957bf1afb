"""Word vectors from the words around each word: skip-gram and CBOW (Mikolov et al. 2013, arXiv:1301.3781)."""

import abc
from collections.abc import Callable, Mapping

import numpy as np
import tensorflow as tf

from lmscale.data.word_chunks import ConsecutiveChunks, WordChunks, keep_probabilities, word_stream
from lmscale.softmax.bands import Neighbours, band_mask
from lmscale.softmax.head import Head
from lmscale.tables.rows import Lookup
from lmscale.tables.table_config import TableConfig, check_inputs_and_outputs
from lmscale.tasks.task import Labels, Task, TaskContext

_ROLE, _HEAD = "words", "words"


class Word2Vec(Task):
    """What both models have in common. An example is a chunk of consecutive words with those around it."""

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
          tables: {name: `TableConfig`} of the tables named by `inputs` and `outputs`. One for both is tied.
          inputs: name of the table that holds the word vectors.
          outputs: name of the table that holds the softmax rows.
          head: function (table=, vocab_size=, counts=) that returns a `Head`.
          window, subsampling, dynamic_window, cross_lines: as of `WordChunks`.
          chunk: words of an example. A longer one reads fewer rows, since those at its ends are read twice; skip-gram
            then compares a word with more others that are none of its labels.

        Raises:
          ValueError: for tables that are not there or not used or differ in width, a head that does not fit, and what
            `WordChunks` refuses.
        """
        check_inputs_and_outputs(tables, inputs=inputs, outputs=outputs)
        widths = {name: config.embed_dim for name, config in tables.items()}
        if len(set(widths.values())) > 1:
            raise ValueError(
                "Word vectors and softmax rows must have one width: nothing lies between them. Received: embed_dim "
                f"{', '.join(f'{width} of {name!r}' for name, width in widths.items())}. Give both tables the same."
            )
        super().__init__(context, tables=tables)
        self.heads = {_HEAD: self.make_head(head, table=outputs)}
        self._check_head(self.heads[_HEAD])
        self._inputs, self._window, self._chunk = inputs, window, chunk
        self._cross_lines = cross_lines
        self._subsampling, self._dynamic_window = subsampling, dynamic_window

    def training_batches(self):
        """Chunks of the subsampled text, in a new order each epoch."""
        data = self.context.data
        return WordChunks(
            data.split("train"),
            counts=data.counts,
            no_words=self._no_words(),
            eos_id=data.eos_id,
            global_batch_size=self.context.global_batch_size,
            chunk=self._chunk,
            window=self._window,
            subsampling=self._subsampling,
            dynamic_window=self._dynamic_window,
            cross_lines=self._cross_lines,
            seed=self.context.seed,
        )

    def evaluation_batches(self, split, *, limit=None):
        """The text without subsampling, each word with the whole of its window; `limit` counts tokens."""
        data = self.context.data
        is_word = np.ones([data.vocab_size], np.int64)
        is_word[list(self._no_words())] = 0
        stream = word_stream(
            data.split(split)[:limit],
            keep=keep_probabilities(is_word, subsampling=None),
            eos_id=data.eos_id,
            window=self._window,
            dynamic_window=False,
            cross_lines=self._cross_lines,
            seed=0,
            epoch=0,
        )
        num_labels = self._num_labels(stream.reach)
        if not num_labels:
            raise ValueError(
                "The split to evaluate must have words with other words around them. Received: "
                f"{split}, with none. Prepare data with such a split, or evaluate on more tokens."
            )
        return ConsecutiveChunks(
            stream,
            batch_size=self.context.eval_batch_size,
            chunk=self._chunk,
            window=self._window,
            num_labels=num_labels,
        )

    def _check_head(self, head):
        """Raises ValueError for a head that the model cannot have."""

    def _no_words(self):
        return {self.context.data.unk_id, self.context.data.eos_id}

    def _centres(self, features):
        """[examples, chunk] int32: the ids of the words of the chunks, without those around them."""
        ids = features["ids"]
        return ids[:, self._window : ids.shape[1] - self._window]

    @staticmethod
    @abc.abstractmethod
    def _num_labels(reach):
        """Labels of a text whose words reach so far, [words, 2]."""


class SkipGram(Word2Vec):
    """Each word's neighbours from the word alone."""

    def _check_head(self, head):
        if not head.takes_neighbours:
            raise ValueError(
                "The head of SkipGram must take several labels a word. Received: "
                f"{type(head).__name__}, which takes one. Use NegativeSampling or SampledSoftmax, or the task CBOW."
            )

    def lookups(self, features):
        """The words of the chunks."""
        return {_ROLE: Lookup(self._inputs, self._centres(features))}

    def labels(self, features):
        """The words around each word, as far as it reaches."""
        before, after = (tf.reshape(features["reach"][..., i], [-1]) for i in range(2))
        words = tf.reshape(self._centres(features), [-1])
        neighbours = Neighbours(
            before, after, words, num_examples=features["ids"].shape[0], window=self._window
        )
        return {_HEAD: Labels(tf.reshape(features["ids"], [-1]), neighbours.num_labels(), neighbours)}

    def forward(self, rows, features, state, *, dropout):
        """A word's hidden state is its vector."""
        embedding = rows[_ROLE].embedding
        return {_HEAD: tf.reshape(embedding, [-1, embedding.shape[-1]])}, state

    @staticmethod
    def _num_labels(reach):
        return int(reach.sum(dtype=np.int64))


class CBOW(Word2Vec):
    """Each word from the mean of the vectors of those around it.

    The gradient is that of the mean. (The program of Mikolov et al. gives each word the gradient of the sum: Irsoy et
    al. 2020, arXiv:2012.15332.)
    """

    def lookups(self, features):
        """The words of the chunks, and those around them."""
        return {_ROLE: Lookup(self._inputs, features["ids"])}

    def labels(self, features):
        """The words of the chunks that have others around them."""
        has_context = tf.reduce_any(features["reach"] > 0, axis=2)
        weights = tf.reshape(tf.cast(has_context, tf.float32), [-1])
        return {_HEAD: Labels(tf.reshape(self._centres(features), [-1]), weights)}

    def forward(self, rows, features, state, *, dropout):
        """The mean over each word's window, as one small matrix product an example; zero without any."""
        before, after = tf.unstack(features["reach"], axis=2)
        shares = tf.cast(band_mask(before, after, window=self._window), tf.float32)
        shares /= tf.maximum(tf.cast(before + after, tf.float32), 1.0)[..., tf.newaxis]
        embedding = rows[_ROLE].embedding
        return {_HEAD: tf.reshape(tf.matmul(shares, embedding), [-1, embedding.shape[-1]])}, state

    @staticmethod
    def _num_labels(reach):
        return int(np.count_nonzero(reach.any(axis=1)))
