"""The signatures of a SavedModel: words in, words and numbers out; of any number of examples."""

import tensorflow as tf

from lmscale.tasks.left_to_right import LeftToRightTask
from lmscale.tasks.next_item import NextItem


class _HashTable(tf.lookup.StaticHashTable):
    """A table that is filled where the SavedModel is loaded, not where it is written: that saves the memory."""

    def _initialize(self):
        return super()._initialize() if tf.inside_function() else None


class Words(tf.Module):
    """Words to ids and back, by a file of words in the order of ids, which becomes an asset."""

    def __init__(self, path, *, unknown_id):
        """`path`: vocab.txt, a word, tab and count a line; `unknown_id`: of every other word, -1 for none."""
        super().__init__()
        line, word = tf.lookup.TextFileIndex.LINE_NUMBER, 0
        self._asset = tf.saved_model.Asset(str(path))
        asset = self._asset.asset_path
        self._ids = _HashTable(
            tf.lookup.TextFileInitializer(asset, tf.string, word, tf.int64, line, delimiter="\t"),
            default_value=unknown_id,
        )
        self._words = _HashTable(
            tf.lookup.TextFileInitializer(asset, tf.int64, line, tf.string, word, delimiter="\t"),
            default_value="",
        )

    def ids(self, words):
        """int32 ids of a string tensor."""
        return tf.cast(self._ids.lookup(words), tf.int32)

    def words(self, ids):
        """The words of int32 ids; "" for -1."""
        return self._words.lookup(tf.cast(ids, tf.int64))


class Signatures(tf.Module):
    """Functions of a `ServedModel`, by name: those of `available`."""

    def __init__(self, model, vocabularies, *, table, batch_size, length, k):
        """Args:
        model: `ServedModel`.
        vocabularies: {table: `Words`}.
        table: table of `embed`.
        batch_size: examples that are computed at a time; more are computed one batch after the other.
        length: words or items of an example at most.
        k: words or items that are returned for each.
        """
        super().__init__()
        self._model, self._vocabularies, self._table = model, vocabularies, table
        self._batch_size, self._length, self._k = batch_size, length, k

    def functions(self, names):
        """{name: concrete function} for `tf.saved_model.save`."""
        texts, words = tf.TensorSpec([None, None], tf.string), tf.TensorSpec([None], tf.string)
        arguments = {
            "next_words": tf.TensorSpec(texts.shape, texts.dtype, name="words"),
            "score": tf.TensorSpec(texts.shape, texts.dtype, name="words"),
            "recommend": tf.TensorSpec(texts.shape, texts.dtype, name="items"),
            "embed": tf.TensorSpec(words.shape, words.dtype, name="words"),
        }
        return {
            name: tf.function(getattr(self, name), autograph=False).get_concrete_function(arguments[name])
            for name in names
        }

    def next_words(self, words):
        """The k likeliest words behind each text: {"words" [n, k], "log_probs" [n, k]}.

        Args:
          words: [n, t] string, texts from their first word on, "" behind the last. Of longer ones, the last words.
        """
        task, vocabulary = self._model.task, self._vocabularies[self._head_table()]
        ids, lengths = self._texts(vocabulary.ids(words), words)
        ids, lengths = _last(ids, lengths, self._length)

        def of_batch(ids, lengths):
            hidden = self._hidden(ids)
            last = tf.gather(hidden, tf.maximum(lengths - 1, 0), batch_dims=1)
            return self._model.best(last, head=task.token_head, k=self._k)

        found, log_probs = self._in_batches(of_batch, (ids, lengths), (tf.int32, tf.float32), [self._k])
        return {"words": vocabulary.words(found), "log_probs": log_probs}

    def score(self, words):
        """The natural log-probability of each word behind those before it: {"log_probs" [n, t]}, 0 behind the last.

        Args:
          words: [n, t] string, "" behind the last word; t at most the length that was exported.
        """
        task, vocabulary = self._model.task, self._vocabularies[self._head_table()]
        time = tf.shape(words)[1]
        with tf.control_dependencies(
            [
                tf.debugging.assert_less_equal(
                    time, self._length, message=f"A text must have at most {self._length} words: export more."
                )
            ]
        ):
            labels = tf.pad(vocabulary.ids(words), [[0, 0], [0, self._length - time]])
        labels = tf.ensure_shape(labels, [None, self._length])
        start = tf.fill([tf.shape(labels)[0], 1], task.context.text.eos_id)
        inputs = tf.concat([start, labels[:, :-1]], axis=1)

        def of_batch(inputs, labels):
            hidden = self._hidden(inputs)
            losses = self._model.losses(
                tf.reshape(hidden, [-1, hidden.shape[-1]]),
                head=task.token_head,
                labels=tf.reshape(labels, [-1]),
            )
            return (-tf.reshape(losses, [self._batch_size, self._length]),)

        (log_probs,) = self._in_batches(of_batch, (inputs, labels), (tf.float32,), [self._length])
        return {"log_probs": tf.where(words == "", 0.0, log_probs[:, :time])}

    def recommend(self, items):
        """The k best items behind each history: {"items" [n, k], "log_probs" [n, k]}; "" and -inf if there are no more.

        Args:
          items: [n, t] string, the oldest first, "" behind the last. Items that are not in the catalogue do not count;
            of a history without others nothing is known, and no item is returned.
        """
        vocabulary = self._vocabularies[self._head_table()]
        ids = vocabulary.ids(items)
        ids = tf.ragged.boolean_mask(ids, ids >= 0).to_tensor(-1)
        lengths = tf.reduce_sum(tf.cast(ids >= 0, tf.int32), axis=1)
        (head,) = self._model.task.heads

        def of_batch(seen, ids, lengths):
            features = {
                "ids": tf.maximum(ids, 0),
                "last": tf.maximum(lengths - 1, 0),
                "target": tf.zeros([self._batch_size], tf.int32),
                "weights": tf.ones([self._batch_size]),
            }
            hidden = self._model.hidden(features, batch_size=self._batch_size)[head]
            return self._model.best(hidden, head=head, k=self._k, excluded=seen)

        recent, recent_lengths = _last(ids, lengths, self._length)
        found, log_probs = self._in_batches(
            of_batch, (ids, recent, recent_lengths), (tf.int32, tf.float32), [self._k]
        )
        # The body would read row 0 where there is no item.
        has_history = lengths[:, tf.newaxis] > 0
        return {
            "items": tf.where(has_history, vocabulary.words(found), ""),
            "log_probs": tf.where(has_history, log_probs, -float("inf")),
        }

    def embed(self, words):
        """The row of each word: {"rows" [n, dim]}.

        Args:
          words: [n] string. An unknown one has the row of `<unk>`; where there is none, zeros.
        """
        ids = self._vocabularies[self._table].ids(words)
        rows = self._model.embed(self._table, tf.maximum(ids, 0))
        return {"rows": tf.where(ids[:, tf.newaxis] >= 0, rows, 0.0)}

    def _head_table(self):
        (head,) = self._model.task.heads.values()
        return head.table

    def _texts(self, ids, words):
        """Ids behind an `<eos>`, and how many they are."""
        start = tf.fill([tf.shape(ids)[0], 1], self._model.task.context.text.eos_id)
        return tf.concat([start, ids], axis=1), 1 + tf.reduce_sum(tf.cast(words != "", tf.int32), axis=1)

    def _hidden(self, ids):
        """[batch_size, length, dim] of the states behind each of ids [batch_size, length]."""
        task = self._model.task
        hidden = self._model.hidden(task.decoding_features(ids), batch_size=self._batch_size)[task.token_head]
        return tf.reshape(hidden, [self._batch_size, self._length, hidden.shape[-1]])

    def _in_batches(self, of_batch, tensors, dtypes, shape):
        """The results of `of_batch` for tensors [n, ...], computed for `batch_size` examples at a time."""
        size = self._batch_size
        n = tf.shape(tensors[0])[0]
        num_batches = tf.maximum((n + size - 1) // size, 1)
        padded = []
        for x in tensors:
            missing = [[0, num_batches * size - n]] + [[0, 0]] * (len(x.shape) - 1)
            x = tf.pad(x, missing)
            padded.append(tf.reshape(x, tf.concat([[num_batches, size], tf.shape(x)[1:]], axis=0)))
        static = [x.shape[1:] for x in tensors]

        def compute(batch):
            own = [tf.ensure_shape(x, [size, *s]) for x, s in zip(batch, static, strict=True)]
            return tuple(of_batch(*own))

        signature = tuple(tf.TensorSpec([size, *shape], dtype) for dtype in dtypes)
        found = tf.map_fn(compute, tuple(padded), fn_output_signature=signature, parallel_iterations=1)
        return [tf.reshape(x, [num_batches * size, *shape])[:n] for x in found]


def _last(ids, lengths, length):
    """([n, length] ids: the last ones of each, from the first place on, 0 behind; how many they are)."""
    start = tf.maximum(lengths - length, 0)
    places = start[:, tf.newaxis] + tf.range(length)
    padded = tf.pad(ids, [[0, 0], [0, length]])
    found = tf.gather(padded, places, batch_dims=1)
    lengths = tf.minimum(lengths, length)
    found = tf.where(tf.range(length) < lengths[:, tf.newaxis], found, 0)
    return tf.ensure_shape(found, [None, length]), lengths


def available(task):
    """Names of the signatures that a task has."""
    if isinstance(task, LeftToRightTask):
        return ["next_words", "score", "embed"]
    if isinstance(task, NextItem):
        return ["recommend", "embed"]
    return ["embed"]
