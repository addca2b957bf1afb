"""Log-probabilities of lines against numpy, and against evaluations of the same tokens."""

import types

import numpy as np
import pytest
from references import log_softmax, lstm, lstm_weights
from tiny_experiments import Text, experiment, language_model, one_rule, untied

from lmscale.assembly import make_task
from lmscale.bodies.lstm import lstm_body
from lmscale.evaluation import Evaluator
from lmscale.model import Model
from lmscale.scoring import Scorer, Total
from lmscale.tasks.left_to_right import check_left_to_right

VOCAB_SIZE, HIDDEN_DIM, EOS_ID, WINDOW = 53, 6, 2, 5
# Shorter and longer than a window, in no order; no two of a length that fills one.
LENGTHS = [3, 1, 13, 7, 1, 4, 11]


def two_lstm_layers():
    return lstm_body(num_layers=2, hidden_dim=HIDDEN_DIM, dropout=0.5)


@pytest.fixture(scope="module")
def lines():
    rng = np.random.default_rng(3)
    return [np.append(rng.integers(0, VOCAB_SIZE, n - 1), EOS_ID) for n in LENGTHS]


@pytest.fixture(scope="module", params=[1, 3])
def restored(request, mirrored):
    """What `Scorer` takes of a restored model: of an untied one with a projection, far from uniform."""
    strategy = mirrored(request.param)
    settings = experiment(
        task=language_model(body=two_lstm_layers, eval_window=WINDOW, **untied(input_dim=4, output_dim=9)),
        eval_batch_size=1,
    )
    with strategy.scope():
        task = make_task(
            settings,
            data=Text(vocab_size=VOCAB_SIZE, eos_id=EOS_ID),
            num_replicas=strategy.num_replicas_in_sync,
            training=False,
        )
        model = Model(task, groups=one_rule(), seed=3, training=False)
    rng = np.random.default_rng(0)
    for name, table in model.tables.items():
        rows = rng.normal(size=[VOCAB_SIZE, table.embed_dim]).astype(np.float32)
        table.write_rows("embedding", 0, rows)
        if name == "outputs":
            table.write_rows("bias", 0, rng.normal(size=[VOCAB_SIZE]).astype(np.float32))
    return types.SimpleNamespace(task=task, model=model, strategy=strategy, experiment=settings)


def expected_log_probs(restored, ids):
    """[tokens] float64 of a text behind <eos>, by numpy alone."""
    tables = restored.model.tables
    x = (
        tables["inputs"]
        .read_rows("embedding", 0, VOCAB_SIZE)
        .astype(np.float64)[[EOS_ID, *ids[:-1]]][np.newaxis]
    )
    zeros = np.zeros([1, HIDDEN_DIM])
    for layer in restored.task.encoder.body.layers.values():
        x, _, _ = lstm(x, **lstm_weights(layer), h=zeros, c=zeros)
    hidden = x[0] @ restored.task.layers["projection"].kernel.numpy().astype(np.float64)
    logits = hidden @ tables["outputs"].read_rows("embedding", 0, VOCAB_SIZE).astype(np.float64).T
    return log_softmax(logits + tables["outputs"].read_rows("bias", 0, VOCAB_SIZE))[np.arange(len(ids)), ids]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_lines_against_numpy(restored, lines, batch_size):
    scored = list(Scorer(restored, batch_size=batch_size).score_lines(iter(lines)))
    assert len(scored) == len(lines)
    for line, ids in zip(scored, lines, strict=True):
        np.testing.assert_array_equal(line.ids, ids)
        np.testing.assert_allclose(line.log_probs, expected_log_probs(restored, ids), rtol=1e-5, atol=2e-6)


def test_a_stream_is_an_evaluation_with_one_lane(restored, lines):
    text = np.concatenate(lines)
    total = Total()
    scored = list(Scorer(restored, batch_size=4).score_stream(iter(lines)))
    for line in scored:
        total.add(line)
    log_probs = np.concatenate([line.log_probs for line in scored])
    np.testing.assert_allclose(log_probs, expected_log_probs(restored, text), rtol=1e-5, atol=2e-6)
    evaluator = Evaluator.of_experiment(restored.experiment, restored.model, strategy=restored.strategy)
    restored.task.context.data.ids = text
    evaluated = evaluator.evaluate(restored.task.evaluation_batches("test"))
    report = total.report()
    assert (report["lines"], report["tokens"]) == (len(lines), len(text)) == (len(lines), evaluated.tokens)
    assert report["loss_nats"] == pytest.approx(evaluated.loss_nats, rel=1e-6)
    assert report["perplexity"] == pytest.approx(evaluated.perplexity, rel=1e-5)
    assert report["log_prob"] == pytest.approx(log_probs.sum())


def test_context_matters(restored, lines):
    """The two ways agree on the first line alone."""
    scorer = Scorer(restored, batch_size=4)
    alone = [line.log_probs for line in scorer.score_lines(lines)]
    stream = [line.log_probs for line in scorer.score_stream(lines)]
    np.testing.assert_allclose(alone[0], stream[0], rtol=1e-5, atol=2e-6)
    assert all(np.abs(a - b).max() > 1e-4 for a, b in zip(alone[1:], stream[1:], strict=True))


def test_other_tasks_are_refused():
    class SkipGram:
        pass

    with pytest.raises(ValueError, match=r"left to right.*Received: a run of SkipGram\. Pass"):
        check_left_to_right(SkipGram())
