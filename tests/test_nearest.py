"""The nearest words against numpy."""

import types

import numpy as np
import pytest
from tiny_experiments import Text, experiment, language_model, one_rule, untied

from lmscale.assembly import make_task
from lmscale.data.vocab import EOS, UNK, Vocabulary
from lmscale.model import Model
from lmscale.nearest import NearestRows

VOCAB_SIZE = 211
WORDS = (EOS, UNK, *(f"word{i}" for i in range(2, VOCAB_SIZE)))


@pytest.fixture(scope="module")
def restored(mirrored):
    strategy = mirrored(3)
    data = Text(vocab_size=VOCAB_SIZE)
    data.vocabularies = {"words": Vocabulary(tokens=WORDS, counts=data.counts)}
    settings = experiment(task=language_model(**untied(input_dim=4, output_dim=6), input_dim=6))
    with strategy.scope():
        task = make_task(settings, data=data, num_replicas=3, training=False)
        model = Model(task, groups=one_rule(), seed=3, training=False)
    rng = np.random.default_rng(0)
    for table in model.tables.values():
        table.write_rows("embedding", 0, rng.normal(size=[VOCAB_SIZE, table.embed_dim]).astype(np.float32))
    return types.SimpleNamespace(task=task, model=model, strategy=strategy)


@pytest.mark.parametrize(("table", "k"), [(None, 5), ("inputs", 1_000)])
def test_against_numpy(restored, table, k):
    """More words than a batch has, one of them twice."""
    nearest = NearestRows(restored, table=table)
    words = [*WORDS[100:170], WORDS[100]]
    found = list(nearest.nearest(nearest.ids(words), k=k))
    rows = restored.model.tables[table or "outputs"].read_rows("embedding", 0, VOCAB_SIZE).astype(np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    assert len(found) == len(words)
    for word, (ids, cosines) in zip(words, found, strict=True):
        own = WORDS.index(word)
        expected = rows @ rows[own]
        expected[own] = -np.inf
        order = np.argsort(-expected, kind="stable")[: min(k, VOCAB_SIZE - 1)]
        np.testing.assert_allclose(cosines, expected[order], atol=2e-6)
        np.testing.assert_allclose(expected[ids], expected[order], atol=2e-6)
        assert len(set(ids)) == len(order)


def test_unknown_words_are_refused(restored):
    with pytest.raises(
        ValueError, match=r"'outputs'.*Received: 'wrd12' \(did you mean word12 or .*\), 'q+'\. Write"
    ):
        NearestRows(restored).ids(["word3", "wrd12", "q" * 9])


def test_unknown_tables_are_refused(restored):
    with pytest.raises(ValueError, match=r"one of the run's, inputs, outputs\. Received: words\."):
        NearestRows(restored, table="words")


def test_rows_without_words_are_refused(restored):
    vocabularies = {name: Text(vocab_size=VOCAB_SIZE).vocabularies["words"] for name in ("inputs", "outputs")}
    task = types.SimpleNamespace(
        heads=restored.task.heads, tables=restored.task.tables, vocabularies=vocabularies
    )
    with pytest.raises(ValueError, match=r"must have words\. Received: outputs"):
        NearestRows(types.SimpleNamespace(task=task, model=restored.model, strategy=restored.strategy))
