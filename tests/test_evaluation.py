"""Exact evaluation against numpy: every token once, whatever the batch size, the window and the number of devices."""

import functools
import math

import keras
import numpy as np
import pytest
from references import log_softmax, lstm, lstm_weights

from lmscale.bodies.body import keras_body
from lmscale.bodies.lstm import lstm_body
from lmscale.evaluation import EvaluationResult, Evaluator
from lmscale.experiment import Experiment
from lmscale.model import LanguageModel
from lmscale.parameters.update_rules import SGD
from lmscale.softmax.full import FullSoftmax
from lmscale.softmax.sampled import SampledSoftmax
from lmscale.softmax.samplers import LogUniformSampler

VOCAB_SIZE, EMBED_DIM, EOS_ID = 211, 6, 2
TOKENS = np.random.default_rng(1).integers(0, VOCAB_SIZE, 101)


def identity():
    return keras_body(layer=keras.layers.Identity)


def two_lstm_layers():
    return lstm_body(num_layers=2, hidden_dim=EMBED_DIM, dropout=0.5)


class _Case:
    """A model with rows far from uniform, and its evaluator."""

    def __init__(self, strategy, *, body, batch_size, window, make_loss=None):
        experiment = Experiment(
            data_dir="",
            train_steps=1,
            global_batch_size=1,
            window=1,
            embed_dim=EMBED_DIM,
            body=body,
            loss=None,
            row_optimizer=SGD(learning_rate=1.0),
            body_optimizer=SGD(learning_rate=1.0),
            seed=3,
            log_every=1,
            eval_every=1,
            save_every=1,
        )
        rng = np.random.default_rng(0)
        self.rows = rng.normal(size=[VOCAB_SIZE, EMBED_DIM]).astype(np.float32)
        self.bias = rng.normal(size=[VOCAB_SIZE]).astype(np.float32)
        with strategy.scope():
            self.model = LanguageModel(experiment, vocab_size=VOCAB_SIZE, trainable=False)
            loss = make_loss(vocab_size=VOCAB_SIZE, counts=None) if make_loss else None
        self.model.table.write_rows("embedding", 0, self.rows)
        self.model.table.write_rows("bias", 0, self.bias)
        self.evaluator = Evaluator(
            self.model,
            strategy=strategy,
            batch_size=batch_size,
            window=window,
            eos_id=EOS_ID,
            loss=loss,
            seed=7,
        )

    def losses(self, hidden):
        """[tokens] of hidden states [tokens, embed_dim] that predict TOKENS."""
        logits = hidden @ self.rows.T.astype(np.float64) + self.bias
        return -log_softmax(logits)[np.arange(len(TOKENS)), TOKENS]

    def inputs(self):
        return self.rows[np.concatenate([[EOS_ID], TOKENS[:-1]])].astype(np.float64)


@pytest.mark.parametrize("num_replicas", [1, 2, 3, 8])
@pytest.mark.parametrize(
    ("batch_size", "window"),
    [(1, 1000), (7, 4), (8, 13), (3, 1), (150, 2)],
)
def test_against_numpy(mirrored, num_replicas, batch_size, window):
    case = _Case(mirrored(num_replicas), body=identity, batch_size=batch_size, window=window)
    result = case.evaluator.evaluate(TOKENS)
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
        for layer in case.model.encoder.body.layers:
            zeros = np.zeros([1, EMBED_DIM])
            x, _, _ = lstm(x, **lstm_weights(layer), h=zeros, c=zeros)
        hidden.append(x[0])
    expected = case.losses(np.concatenate(hidden)).mean()
    assert case.evaluator.evaluate(TOKENS).loss_nats == pytest.approx(expected, rel=2e-6)


@pytest.mark.parametrize("num_replicas", [1, 3])
def test_training_loss_beside_the_exact_one(mirrored, num_replicas):
    every_class = functools.partial(LogUniformSampler, num_sampled=VOCAB_SIZE, replacement=False)
    for make_loss in (functools.partial(SampledSoftmax, sampler=every_class), FullSoftmax):
        case = _Case(mirrored(num_replicas), body=identity, batch_size=7, window=4, make_loss=make_loss)
        result = case.evaluator.evaluate(TOKENS, with_training_loss=True)
        assert result.training_loss_nats == pytest.approx(result.loss_nats, rel=1e-5)
    few = functools.partial(LogUniformSampler, num_sampled=9, replacement=False)
    make_loss = functools.partial(SampledSoftmax, sampler=few)
    case = _Case(mirrored(num_replicas), body=identity, batch_size=7, window=4, make_loss=make_loss)
    result = case.evaluator.evaluate(TOKENS, with_training_loss=True)
    assert abs(result.training_loss_nats - result.loss_nats) > 0.01


def test_progress_counts_every_batch(mirrored):
    case = _Case(mirrored(2), body=identity, batch_size=7, window=4)
    seen = []
    case.evaluator.evaluate(TOKENS, on_step=seen.append)
    assert seen == list(range(1, case.evaluator.num_steps(TOKENS) + 1))
    assert len(seen) == 4  # 15 tokens a lane, 4 at a time.


def test_text_shorter_than_the_batch(mirrored):
    case = _Case(mirrored(3), body=identity, batch_size=5, window=4)
    result = case.evaluator.evaluate(TOKENS[:1])
    logits = case.rows[EOS_ID].astype(np.float64) @ case.rows.T.astype(np.float64) + case.bias
    assert result.loss_nats == pytest.approx(-log_softmax(logits)[TOKENS[0]], rel=2e-6)


def test_perplexity_overflows_to_infinity():
    assert EvaluationResult(loss_nats=1e4, tokens=1, seconds=0.0).perplexity == math.inf
    assert EvaluationResult(loss_nats=math.log(7), tokens=1, seconds=0.0).perplexity == pytest.approx(7)


def test_one_bad_token_makes_the_loss_non_finite(mirrored):
    case = _Case(mirrored(2), body=identity, batch_size=7, window=4)
    case.model.table.write_rows("embedding", int(TOKENS[50]), np.full([1, EMBED_DIM], np.nan, np.float32))
    assert not math.isfinite(case.evaluator.evaluate(TOKENS).loss_nats)
