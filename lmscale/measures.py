"""What an evaluation tells of one head: loss by how frequent the labels are, and measures of their ranks."""

import math
import re

import numpy as np
import tensorflow as tf

from lmscale.data.vocab import UNK

NUM_DECILES = 10

# Of a label's rank and a cutoff k; one relevant row a label.
_OF_RANK = {
    "accuracy": lambda rank, k: tf.cast(rank <= k, tf.float32),
    "hr": lambda rank, k: tf.cast(rank <= k, tf.float32),
    "ndcg": lambda rank, k: tf.where(
        rank <= k, math.log(2) / tf.math.log(1.0 + tf.cast(rank, tf.float32)), 0.0
    ),
    "mrr": lambda rank, k: tf.where(rank <= k, 1.0 / tf.cast(rank, tf.float32), 0.0),
}


def check_names(names):
    """Raises ValueError unless each is NAME@K, K from 1 on, or `mrr` over all ranks."""
    for name in names:
        _function(name)


class HeadMeasures:
    """Sums over labels, in the graph, and what they come to, on the host.

    Frequency: rows by falling frequency in the training data are cut into ten parts, deciles, of a tenth of all its
    tokens each, as nearly as whole rows allow; the row of unknown words is apart.
    """

    def __init__(self, *, vocabulary, names=()):
        """Args:
          vocabulary: of the head's table, with `counts`; None there, or in another order than falling: no deciles.
          names: measures of ranks, such as "accuracy@1", "hr@10", "ndcg@10", "mrr".

        Raises:
          ValueError: for a measure that does not exist.
        """
        self._functions = {name: _function(name) for name in names}
        self.uses_ranks = bool(names)
        self._counts = vocabulary.counts
        self._unk_id = vocabulary.unk_id if UNK in getattr(vocabulary, "ids", ()) else None
        self._starts = _decile_starts(self._counts, self._unk_id)

    def sums(self, *, loss, labels, ranks=None):
        """One replica's sums.

        Args:
          loss: [n] float32 nats; anything where the weight is 0.
          labels: `Labels` [n].
          ranks: [n] int32; None without measures of ranks.

        Returns:
          {name: float32 scalar or vector}, to be added up over replicas and batches.
        """
        counted = labels.weights > 0
        loss = tf.where(counted, loss * labels.weights, 0.0)
        sums = {"loss": tf.reduce_sum(loss), "weight": tf.reduce_sum(labels.weights)}
        for name, function in self._functions.items():
            sums[name] = tf.reduce_sum(tf.where(counted, function(ranks) * labels.weights, 0.0))
        if self._starts is not None:
            group = self._group(labels.counted_ids)
            sums["loss_by_frequency"] = tf.math.unsorted_segment_sum(loss, group, NUM_DECILES + 1)
            sums["weight_by_frequency"] = tf.math.unsorted_segment_sum(labels.weights, group, NUM_DECILES + 1)
        return sums

    def _group(self, ids):
        """[n] int32: decile of each id, from 0 on; NUM_DECILES for unknown words."""
        group = tf.reduce_sum(tf.cast(ids[:, tf.newaxis] >= self._starts[1:], tf.int32), axis=1)
        return group if self._unk_id is None else tf.where(ids == self._unk_id, NUM_DECILES, group)

    def results(self, sums):
        """What sums over all labels come to.

        Args:
          sums: {name: float64 array}, as of `sums`.

        Returns:
          {"loss_nats", "perplexity", "labels", measures of ranks, "by_frequency": [{"decile", "rows": [first, last],
          "labels", "loss_nats", "perplexity"}], "unknown": the same without a decile}; the last two where there are
          counts. A loss over no labels is NaN.
        """
        found = _loss(sums["loss"], sums["weight"])
        for name in self._functions:
            found[name] = float(sums[name] / sums["weight"])
        if self._starts is not None:
            stops = [*self._starts[1:], len(self._counts)]
            by_group = [
                _loss(loss, weight)
                for loss, weight in zip(sums["loss_by_frequency"], sums["weight_by_frequency"], strict=True)
            ]
            found["by_frequency"] = [
                {"decile": decile + 1, "rows": [int(start), int(stop)], **by_group[decile]}
                for decile, (start, stop) in enumerate(zip(self._starts, stops, strict=True))
            ]
            if self._unk_id is not None:
                found["unknown"] = by_group[NUM_DECILES]
        return found


def perplexity(loss_nats):
    """exp(loss_nats), infinite where that overflows."""
    return math.inf if loss_nats >= 700 else math.exp(loss_nats)


def _loss(loss, weight):
    mean = float(loss / weight) if weight else math.nan
    return {"loss_nats": mean, "perplexity": perplexity(mean), "labels": int(weight)}


def _decile_starts(counts, unk_id):
    """[NUM_DECILES] int32, first row of each decile; None where there are no counts, or not of falling order."""
    if counts is None:
        return None
    counts = np.array(counts, np.float64)
    if np.any(np.diff(counts) > 0):
        return None
    if unk_id is not None:
        counts[unk_id] = 0
    ends = np.cumsum(counts)
    if not ends[-1]:
        return None
    # A row belongs to the decile in which its first token lies.
    return np.searchsorted(ends - counts, np.arange(NUM_DECILES) * ends[-1] / NUM_DECILES).astype(np.int32)


def _function(name):
    match = re.fullmatch(r"(?P<measure>[a-z]+)(@(?P<k>[1-9][0-9]*))?", name)
    if not match or match["measure"] not in _OF_RANK or (match["k"] is None and match["measure"] != "mrr"):
        raise ValueError(
            f"A measure must be {', '.join(f'{known}@K' for known in _OF_RANK)}, K a whole number from 1 on, or mrr. "
            f"Received: {name!r}."
        )
    k = 2**31 - 1 if match["k"] is None else int(match["k"])
    return lambda ranks: _OF_RANK[match["measure"]](ranks, k)
