"""The best next items for histories, over the whole catalogue, by a restored model."""

import itertools

import numpy as np
import tensorflow as tf

from lmscale.data.vocab import Vocabulary
from lmscale.distribution import collectives
from lmscale.distribution.strategies import first_local_replica
from lmscale.tasks.next_item import NextItem

_BATCH_SIZE = 64


class Recommender:
    """Recommends items on the devices of a restored model.

    Attributes:
      vocabulary: `Vocabulary` of the items.
    """

    def __init__(self, restored):
        """Args:
          restored: `RestoredModel` of a run whose task is `NextItem`.

        Raises:
          ValueError: if the task is another one, or its items have no words.
        """
        self._task, self._model, self._strategy = restored.task, restored.model, restored.strategy
        if not isinstance(self._task, NextItem):
            raise ValueError(
                "The run's task must recommend: next_item.NextItem. Received: "
                f"{type(self._task).__name__}. Use lmscale.generate for texts, lmscale.neighbors for words."
            )
        (self._head,) = self._task.heads
        vocabulary = self._task.vocabularies[self._task.heads[self._head].table]
        if not isinstance(vocabulary, Vocabulary):
            raise ValueError("The items of the run must have words. Received: numbers alone.")
        self.vocabulary = vocabulary

    def ids(self, items, *, place):
        """The ids of a history's items, the oldest first.

        Args:
          items: texts.
          place: what to call the history in an error.

        Raises:
          ValueError: for an empty history; naming items that are not in the catalogue, and what may have been meant.
        """
        if not items:
            raise ValueError(f"{place}: a history must have an item. Received: none. Take it out.")
        if unknown := self.vocabulary.unknown(items):
            raise ValueError(
                f"{place}: each item must be in the catalogue, of {len(self.vocabulary):,}. Received: {unknown}. "
                "Correct the item, or take it out."
            )
        return [self.vocabulary.ids[item] for item in items]

    def best(self, histories, *, k, exclude_seen):
        """The k best items of each history.

        Args:
          histories: iterable of lists of ids, the oldest first, none empty.
          k: int.
          exclude_seen: whether items of a history are left out.

        Yields:
          (ids [k], log-probabilities [k]) of each, the best first, of equal ones the smaller id; fewer if there are no
          more. Probabilities are those of the softmax over all items.

        Raises:
          ValueError: if the model's logits are not finite.
        """
        num_local = len(self._strategy.extended.worker_devices)
        num_replicas = self._strategy.num_replicas_in_sync
        per_replica = -(-_BATCH_SIZE // num_replicas)
        first = first_local_replica(self._strategy, num_local=num_local) * per_replica
        k = min(k, len(self.vocabulary))
        histories = iter(histories)
        while batch := list(itertools.islice(histories, _BATCH_SIZE)):
            features = self._task.features_of(batch + [[0]] * (num_replicas * per_replica - len(batch)))
            if not exclude_seen:
                del features["seen"]
            results = self._best(
                {
                    name: tf.constant(x[first : first + num_local * per_replica])
                    for name, x in features.items()
                },
                first=first,
                k=k,
            )
            found, log_probs = (self._strategy.experimental_local_results(x)[0].numpy() for x in results)
            if np.isnan(log_probs[: len(batch)]).any():
                raise ValueError(
                    "The logits of a model must be finite to rank items by. Received: NaN or infinity. Restore another "
                    "checkpoint: --checkpoint."
                )
            for i in range(len(batch)):
                is_item = found[i] >= 0
                yield found[i][is_item], log_probs[i][is_item]

    @tf.function(autograph=False, reduce_retracing=True)
    def _best(self, features, *, first, k):
        def replica_step():
            per_replica = features["ids"].shape[0] // len(self._strategy.extended.worker_devices)
            start = collectives.replica_id() * per_replica
            own = {name: collectives.block(x, start - first, per_replica) for name, x in features.items()}
            reading = self._model.read(own, start)
            hidden, _ = self._model.forward(reading.rows.roles, own, [], dropout=None)
            best = self._model.top_k(
                hidden[self._head], head=self._head, k=k, excluded=own.get("seen"), with_logsumexp=True
            )
            log_probs = best.scores - best.logsumexp[:, tf.newaxis]
            return [collectives.all_gather(x) for x in (best.ids, log_probs)]

        return self._strategy.run(replica_step)
