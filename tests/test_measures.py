"""Measures of ranks and losses by frequency, each computed again by plain counting."""

import math

import numpy as np
import pytest
import tensorflow as tf

from lmscale.data.vocab import EOS, UNK, UnnamedVocabulary, Vocabulary
from lmscale.measures import NUM_DECILES, HeadMeasures
from lmscale.tasks.task import Labels

VOCAB_SIZE, NUM_LABELS = 211, 500


@pytest.fixture(scope="module")
def vocabulary():
    counts = (10_000 / np.arange(1, VOCAB_SIZE + 1)).astype(np.int64)
    tokens = [f"w{i}" for i in range(VOCAB_SIZE)]
    tokens[3], tokens[9] = UNK, EOS
    return Vocabulary(tokens=tuple(tokens), counts=counts)


@pytest.fixture(scope="module")
def labels():
    rng = np.random.default_rng(0)
    ids = np.minimum(rng.zipf(1.3, NUM_LABELS) - 1, VOCAB_SIZE - 1).astype(np.int32)
    return ids, (rng.random(NUM_LABELS) < 0.9).astype(np.float32)


def results(measures, batches):
    """`HeadMeasures.results` of [(loss, ids, weights, ranks)]."""
    total: dict = {}
    for loss, ids, weights, ranks in batches:
        sums = measures.sums(
            loss=tf.constant(loss, tf.float32),
            labels=Labels(tf.constant(ids), tf.constant(weights)),
            ranks=None if ranks is None else tf.constant(ranks),
        )
        for name, x in sums.items():
            total[name] = total.get(name, 0.0) + x.numpy().astype(np.float64)
    return measures.results(total)


def test_loss_by_frequency(vocabulary, labels):
    ids, weights = labels
    loss = np.random.default_rng(1).random(NUM_LABELS)
    loss[weights == 0] = np.nan  # Padding may hold anything.
    halves = [(loss[part], ids[part], weights[part], None) for part in (slice(0, 201), slice(201, None))]
    found = results(HeadMeasures(vocabulary=vocabulary), halves)
    # By hand: walk through the rows, and cut where a tenth of all known tokens is full.
    total = vocabulary.counts.sum() - vocabulary.counts[3]
    decile_of, before = {}, 0
    for row, count in enumerate(vocabulary.counts):
        if row != 3:
            decile_of[row] = 10 * before // total
            before += count
    counted = weights > 0
    assert found["labels"] == counted.sum()
    assert found["loss_nats"] == pytest.approx(loss[counted].mean(), rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(loss[counted].mean()), rel=1e-6)
    assert [entry["decile"] for entry in found["by_frequency"]] == list(range(1, NUM_DECILES + 1))
    for entry in found["by_frequency"]:
        rows = [row for row, decile in decile_of.items() if decile == entry["decile"] - 1]
        inside = counted & np.isin(ids, rows)
        assert entry["labels"] == inside.sum() > 0
        assert entry["loss_nats"] == pytest.approx(loss[inside].mean(), rel=1e-6)
        assert set(rows) <= set(range(*entry["rows"])) <= {*rows, 3}
    unknown = counted & (ids == 3)
    assert found["unknown"]["labels"] == unknown.sum() > 0
    assert found["unknown"]["loss_nats"] == pytest.approx(loss[unknown].mean(), rel=1e-6)
    of_groups = [*found["by_frequency"], found["unknown"]]
    assert sum(entry["labels"] for entry in of_groups) == found["labels"]


@pytest.mark.parametrize(
    "vocabulary",
    [
        UnnamedVocabulary(size=VOCAB_SIZE),
        UnnamedVocabulary(size=VOCAB_SIZE, counts=np.arange(VOCAB_SIZE)),
        UnnamedVocabulary(size=VOCAB_SIZE, counts=np.zeros(VOCAB_SIZE, np.int64)),
    ],
    ids=["nobody_counted", "not_falling", "no_tokens"],
)
def test_without_frequencies(vocabulary, labels):
    ids, weights = labels
    found = results(HeadMeasures(vocabulary=vocabulary), [(np.ones(NUM_LABELS), ids, weights, None)])
    assert found.keys() == {"loss_nats", "perplexity", "labels"}


def test_a_decile_without_labels_has_no_loss(vocabulary):
    ids = np.zeros([4], np.int32)
    found = results(HeadMeasures(vocabulary=vocabulary), [(np.ones(4), ids, np.ones(4, np.float32), None)])
    assert found["by_frequency"][0]["labels"] == 4
    last = found["by_frequency"][-1]
    assert last["labels"] == 0
    assert math.isnan(last["loss_nats"])


def test_measures_of_ranks(vocabulary, labels):
    """Järvelin & Kekäläinen 2002 for NDCG: with one relevant row the ideal gain is 1."""
    ids, weights = labels
    ranks = np.random.default_rng(2).integers(1, 40, NUM_LABELS).astype(np.int32)
    names = ["accuracy@1", "hr@10", "ndcg@10", "mrr", "mrr@5"]
    found = results(
        HeadMeasures(vocabulary=vocabulary, names=names), [(np.ones(NUM_LABELS), ids, weights, ranks)]
    )
    counted = ranks[weights > 0].astype(np.float64)
    expected = {
        "accuracy@1": np.mean(counted == 1),
        "hr@10": np.mean(counted <= 10),
        "ndcg@10": np.mean(np.where(counted <= 10, 1 / np.log2(1 + counted), 0)),
        "mrr": np.mean(1 / counted),
        "mrr@5": np.mean(np.where(counted <= 5, 1 / counted, 0)),
    }
    assert {name: found[name] for name in names} == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["recall", "ndcg", "hr@0", "hr@ten", "NDCG@10", "mrr@-1"])
def test_unknown_measures(vocabulary, name):
    with pytest.raises(ValueError, match=f"A measure must be .* Received: '{name}'"):
        HeadMeasures(vocabulary=vocabulary, names=[name])
