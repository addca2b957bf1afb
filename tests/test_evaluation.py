"""Exact evaluation against numpy: every token once, whatever the batch size, the window and the number of devices."""

import functools
import math

import numpy as np
import pytest
from references import log_softmax, lstm, lstm_weights
from tiny_experiments import Text, experiment, identity, language_model, one_rule, tied, untied

from lmscale.assembly import make_task
from lmscale.bodies.lstm import lstm_body
from lmscale.evaluation import EvaluationResult, Evaluator
from lmscale.model import Model
from lmscale.softmax.full import FullSoftmax
from lmscale.softmax.sampled import SampledSoftmax
from lmscale.softmax.samplers import InBatchSampler, LogUniformSampler

VOCAB_SIZE, EMBED_DIM, EOS_ID = 211, 6, 2
TOKENS = np.random.default_rng(1).integers(0, VOCAB_SIZE, 101)


def two_lstm_layers():
    return lstm_body(num_layers=2, hidden_dim=EMBED_DIM, dropout=0.5)


class _Case:
    """A model with rows far from uniform, its text, and its evaluator."""

    def __init__(
        self,
        strategy,
        *,
        body=identity,
        batch_size,
        window,
        head=FullSoftmax,
        tokens=TOKENS,
        tables=None,
    ):
        settings = experiment(
            task=language_model(
                body=body, head=head, eval_window=window, **(tables or tied(embed_dim=EMBED_DIM))
            ),
            global_batch_size=1,
            eval_batch_size=batch_size,
            seed=7,
        )
        rng = np.random.default_rng(0)
        self.tokens = tokens
        with strategy.scope():
            self.task = make_task(
                settings,
                data=Text(vocab_size=VOCAB_SIZE, ids=tokens, eos_id=EOS_ID),
                num_replicas=strategy.num_replicas_in_sync,
                training=False,
            )
            self.model = Model(self.task, groups=one_rule(), seed=3, training=False)
        self.rows = {}
        for name, table in self.model.tables.items():
            self.rows[name] = rng.normal(size=[VOCAB_SIZE, table.embed_dim]).astype(np.float32)
            table.write_rows("embedding", 0, self.rows[name])
        self.bias = rng.normal(size=[VOCAB_SIZE]).astype(np.float32)
        self.inputs_table, self.outputs_table = ("inputs", "outputs") if tables else ("words", "words")
        self.model.tables[self.outputs_table].write_rows("bias", 0, self.bias)
        self.evaluator = Evaluator.of_experiment(settings, self.model, strategy=strategy)

    def evaluate(self, **kwargs):
        return self.evaluator.evaluate(self.task.evaluation_batches("valid"), **kwargs)

    def losses(self, hidden):
        """[tokens] of hidden states [tokens, embed_dim] that predict the tokens."""
        logits = hidden @ self.rows[self.outputs_table].T.astype(np.float64) + self.bias
        return -log_softmax(logits)[np.arange(len(self.tokens)), self.tokens]

    def inputs(self):
        return self.rows[self.inputs_table][np.concatenate([[EOS_ID], self.tokens[:-1]])].astype(np.float64)


@pytest.mark.parametrize("num_replicas", [1, 2, 3, 8])
@pytest.mark.parametrize(
    ("batch_size", "window"),
    [(1, 1000), (7, 4), (8, 13), (3, 1), (150, 2)],
)
def test_against_numpy(mirrored, num_replicas, batch_size, window):
    case = _Case(mirrored(num_replicas), batch_size=batch_size, window=window)
    result = case.evaluate()
    expected = case.losses(case.inputs()).mean()
    assert result.tokens == len(TOKENS)
    assert result.loss_nats == pytest.approx(expected, rel=2e-6)
    assert result.perplexity == pytest.approx(math.exp(expected), rel=1e-5)
    assert result.training_loss_nats is None


@pytest.mark.parametrize(("batch_size", "window"), [(1, 9), (4, 7), (5, 21)])
@pytest.mark.parametrize("num_replicas", [1, 3])
def test_state_is_carried_along_a_lane_and_dropout_is_off(mirrored, num_replicas, batch_size, window):
    case = _Case(mirrored(num_replicas), body=two_lstm_layers, batch_size=batch_size, window=window)
    length = -(-len(TOKENS) // batch_size)
    hidden = []
    for start in range(0, len(TOKENS), length):
        x = case.inputs()[None, start : start + length]
        for layer in case.task.encoder.body.layers.values():
            zeros = np.zeros([1, EMBED_DIM])
            x, _, _ = lstm(x, **lstm_weights(layer), h=zeros, c=zeros)
        hidden.append(x[0])
    expected = case.losses(np.concatenate(hidden)).mean()
    assert case.evaluate().loss_nats == pytest.approx(expected, rel=2e-6)


@pytest.mark.parametrize("num_replicas", [1, 3])
def test_two_tables_of_two_widths(mirrored, num_replicas):
    case = _Case(
        mirrored(num_replicas),
        body=two_lstm_layers,
        batch_size=1,
        window=13,
        tables=untied(input_dim=4, output_dim=9),
    )
    x = case.inputs()[np.newaxis]
    for layer in case.task.encoder.body.layers.values():
        zeros = np.zeros([1, EMBED_DIM])
        x, _, _ = lstm(x, **lstm_weights(layer), h=zeros, c=zeros)
    kernel = case.task.layers["projection"].kernel.numpy().astype(np.float64)
    expected = case.losses(x[0] @ kernel).mean()
    assert case.evaluate().loss_nats == pytest.approx(expected, rel=2e-6)


@pytest.mark.parametrize("num_replicas", [1, 3])
def test_training_loss_beside_the_exact_one(mirrored, num_replicas):
    every_class = functools.partial(LogUniformSampler, num_sampled=VOCAB_SIZE, replacement=False)
    for head in (functools.partial(SampledSoftmax, sampler=every_class), FullSoftmax):
        case = _Case(mirrored(num_replicas), batch_size=7, window=4, head=head)
        result = case.evaluate(with_training_loss=True)
        assert result.training_loss_nats == pytest.approx(result.loss_nats, rel=1e-5)
    few = functools.partial(LogUniformSampler, num_sampled=9, replacement=False)
    head = functools.partial(SampledSoftmax, sampler=few)
    case = _Case(mirrored(num_replicas), batch_size=7, window=4, head=head)
    result = case.evaluate(with_training_loss=True)
    assert abs(result.training_loss_nats - result.loss_nats) > 0.01


@pytest.mark.parametrize(("num_replicas", "batch_size"), [(1, 7), (3, 7), (5, 1)])
def test_training_loss_against_the_labels_of_the_batch(mirrored, num_replicas, batch_size):
    """Against numpy, where some devices have examples of padding, or nothing else."""
    head = functools.partial(SampledSoftmax, sampler=InBatchSampler)
    case = _Case(mirrored(num_replicas), batch_size=batch_size, window=4, head=head)
    probability = np.maximum(np.bincount(TOKENS, minlength=VOCAB_SIZE), 1.0)
    probability /= probability.sum()
    rows, total = case.rows["words"].astype(np.float64), 0.0
    batches = case.task.evaluation_batches("valid")
    for step in range(batches.num_steps):
        features = batches.at(step).features
        labels, weights = features["ids"][:, 1:].ravel(), features["weights"].ravel()
        logits = rows[features["ids"][:, :-1].ravel()] @ rows[labels].T + case.bias[labels]
        # Labels are their own candidates: on the diagonal is the logit of each token's label.
        compared = logits - np.log(len(labels) * probability[labels])
        own = np.diag(compared)
        others = np.where(labels[:, None] == labels, -np.inf, compared)
        total += np.sum(weights * (np.logaddexp.reduce(np.column_stack([own, others]), axis=1) - own))
    result = case.evaluate(with_training_loss=True)
    assert result.training_loss_nats == pytest.approx(total / len(TOKENS), rel=1e-5)


def test_progress_counts_every_batch(mirrored):
    case = _Case(mirrored(2), batch_size=7, window=4)
    seen = []
    case.evaluate(on_step=seen.append)
    assert seen == [1, 2, 3, 4]  # 15 tokens a lane, 4 at a time.
    assert case.task.evaluation_batches("valid").num_steps == 4


@pytest.mark.parametrize("num_replicas", [1, 3])
def test_a_limit_evaluates_the_first_tokens(mirrored, num_replicas):
    case = _Case(mirrored(num_replicas), batch_size=7, window=4)
    result = case.evaluator.evaluate(case.task.evaluation_batches("train", limit=29))
    assert result.tokens == 29
    assert result.loss_nats == pytest.approx(case.losses(case.inputs())[:29].mean(), rel=2e-6)


def test_an_empty_split_is_refused(mirrored):
    case = _Case(mirrored(1), batch_size=7, window=4)
    case.task.context.data.ids = TOKENS[:0]
    with pytest.raises(ValueError, match=r"must have tokens\. Received: test, empty"):
        case.task.evaluation_batches("test")


def test_text_shorter_than_the_batch(mirrored):
    case = _Case(mirrored(3), batch_size=5, window=4, tokens=TOKENS[:1])
    assert case.evaluate().loss_nats == pytest.approx(case.losses(case.inputs())[0], rel=2e-6)


def test_perplexity_overflows_to_infinity():
    assert EvaluationResult(loss_nats=1e4, tokens=1, seconds=0.0, heads={}).perplexity == math.inf
    seven = EvaluationResult(loss_nats=math.log(7), tokens=1, seconds=0.0, heads={})
    assert seven.perplexity == pytest.approx(7)


def test_one_bad_token_makes_the_loss_non_finite(mirrored):
    case = _Case(mirrored(2), batch_size=7, window=4)
    case.model.tables["words"].write_rows(
        "embedding", int(TOKENS[50]), np.full([1, EMBED_DIM], np.nan, np.float32)
    )
    assert not math.isfinite(case.evaluate().loss_nats)
