"""The rows of a table that point the same way as those of given words: by cosine, over every row."""

import itertools

import numpy as np
import tensorflow as tf

from lmscale.data.vocab import Vocabulary
from lmscale.distribution import collectives
from lmscale.distribution.strategies import first_local_replica
from lmscale.softmax.top_k import top_k

_BATCH_SIZE = 64


class NearestRows:
    """Finds the nearest words in a table of a restored model, on its devices.

    Attributes:
      vocabulary: `Vocabulary` of the table.
    """

    def __init__(self, restored, *, table=None):
        """Args:
          restored: `RestoredModel`.
          table: name of the table; None for that of the head.

        Raises:
          ValueError: if there is no such table, several heads have one each and none is named, or its rows have no
            words.
        """
        task = restored.task
        of_heads = list(dict.fromkeys(head.table for head in task.heads.values()))
        if table is None and len(of_heads) > 1:
            raise ValueError(
                f"The table must be named where heads have several. Received: none, of {', '.join(of_heads)}. Pass "
                f"--table={of_heads[0]}, say."
            )
        self._name = table or of_heads[0]
        if self._name not in task.tables:
            raise ValueError(
                f"The table must be one of the run's, {', '.join(task.tables)}. Received: {self._name}. Pass another "
                "--table."
            )
        self.vocabulary = task.vocabularies[self._name]
        if not isinstance(self.vocabulary, Vocabulary):
            raise ValueError(
                f"The rows of the table must have words. Received: {self._name}, whose rows are numbers. Pass another "
                "--table."
            )
        self._table = restored.model.tables[self._name]
        self._strategy = restored.strategy

    def ids(self, words):
        """The id of each word.

        Raises:
          ValueError: naming the words that the vocabulary lacks, and what may have been meant.
        """
        if unknown := self.vocabulary.unknown(words):
            raise ValueError(
                f"Each word must be in the vocabulary of the table {self._name!r}, of {len(self.vocabulary):,} words. "
                f"Received: {unknown}. Write a word as the prepared text does."
            )
        return [self.vocabulary.ids[word] for word in words]

    def nearest(self, ids, *, k):
        """The k nearest rows of each of some rows, without itself.

        Args:
          ids: iterable of ids.
          k: int.

        Yields:
          (ids [k], cosines [k]) of each, the nearest first, of equal ones the smaller id; fewer if there are no more.
        """
        num_local = len(self._strategy.extended.worker_devices)
        num_replicas = self._strategy.num_replicas_in_sync
        per_replica = -(-_BATCH_SIZE // num_replicas)
        first = first_local_replica(self._strategy, num_local=num_local) * per_replica
        k = min(k, len(self.vocabulary))
        ids = iter(ids)
        while batch := list(itertools.islice(ids, _BATCH_SIZE)):
            padded = np.zeros([num_replicas * per_replica], np.int32)
            padded[: len(batch)] = batch
            results = self._nearest(
                tf.constant(padded[first : first + num_local * per_replica]), first=first, k=k
            )
            found, cosines = (self._strategy.experimental_local_results(x)[0].numpy() for x in results)
            for i in range(len(batch)):
                is_row = found[i] >= 0
                yield found[i][is_row], cosines[i][is_row]

    @tf.function(autograph=False)
    def _nearest(self, ids, *, first, k):
        def replica_step():
            per_replica = ids.shape[0] // len(self._strategy.extended.worker_devices)
            own = collectives.block(ids, collectives.replica_id() * per_replica - first, per_replica)
            best = top_k(
                self._table.pull(own).embedding,
                k=k,
                rows=self._table.local_parameter("embedding"),
                bias=None,
                num_valid_rows=self._table.num_valid_rows,
                excluded=own[:, tf.newaxis],
                cosine=True,
            )
            return [collectives.all_gather(x) for x in (best.ids, best.scores)]

        return self._strategy.run(replica_step)
