"""Texts against numpy: which token each rule chooses, what is carried, and that devices and batches do not matter."""

import functools
import types

import numpy as np
import pytest
import tensorflow as tf
from references import log_softmax
from tiny_experiments import Text, experiment, identity, language_model, one_rule, tied

from lmscale.assembly import make_task
from lmscale.bodies.lstm import lstm_body
from lmscale.bodies.transformer import transformer_body
from lmscale.generation import Generator
from lmscale.model import Model
from lmscale.sampling import Sampling
from lmscale.scoring import Scorer
from lmscale.softmax.gumbel import gumbel

VOCAB_SIZE, EMBED_DIM, EOS_ID, UNK_ID = 211, 6, 2, 0
RNG = np.random.default_rng(0)
ROWS = RNG.normal(scale=0.6, size=[VOCAB_SIZE, EMBED_DIM]).astype(np.float32)
BIAS = RNG.normal(size=[VOCAB_SIZE]).astype(np.float32)
BIAS[[UNK_ID, EOS_ID]] = 5, 4  # So that they are chosen often.
# The second one is read in two windows and some single tokens.
PROMPTS = [np.zeros([0], np.int32), RNG.integers(3, VOCAB_SIZE, 71), RNG.integers(3, VOCAB_SIZE, 4)]


def make_restored(strategy, *, body):
    """What `Generator` and `Scorer` take of a restored model."""
    settings = experiment(task=language_model(body=body, eval_window=100, **tied(embed_dim=EMBED_DIM)))
    data = Text(vocab_size=VOCAB_SIZE, eos_id=EOS_ID)
    data.unk_id = UNK_ID
    with strategy.scope():
        task = make_task(settings, data=data, num_replicas=strategy.num_replicas_in_sync, training=False)
        model = Model(task, groups=one_rule(), seed=3, training=False)
    model.tables["words"].write_rows("embedding", 0, ROWS)
    model.tables["words"].write_rows("bias", 0, BIAS)
    return types.SimpleNamespace(task=task, model=model, strategy=strategy, experiment=settings, data=data)


@pytest.fixture(scope="module")
def bigram(mirrored):
    """A model whose hidden state is the row of the token before, so that numpy can follow it."""
    return make_restored(mirrored(2), body=identity)


def write(restored, sampling, *, batch_size=4, num_samples=2, max_tokens=6, max_lines=2, prompts=PROMPTS):
    generator = Generator(restored, sampling=sampling, batch_size=batch_size)
    return list(
        generator.generate(prompts, num_samples=num_samples, max_tokens=max_tokens, max_lines=max_lines)
    )


def chosen_by_numpy(last, sampling, *, text, position):
    """(the token that follows `last`, its log-probability under the model)."""
    logits = ROWS.astype(np.float64) @ ROWS[last] + BIAS
    log_prob = log_softmax(logits)
    allowed = np.arange(VOCAB_SIZE) if sampling.with_unk else np.delete(np.arange(VOCAB_SIZE), UNK_ID)
    order = allowed[np.argsort(-logits[allowed], kind="stable")]
    if sampling.temperature == 0:
        return order[0], log_prob[order[0]]
    order = order[: sampling.top_k]
    scaled = logits[order] / sampling.temperature
    probabilities = np.exp(log_softmax(scaled))
    nucleus = np.searchsorted(np.cumsum(probabilities), sampling.top_p) + 1
    noise = gumbel(tf.constant([[sampling.seed, text, position]]), tf.range(VOCAB_SIZE)).numpy()[0]
    chosen = max(range(min(nucleus, len(order))), key=lambda i: scaled[i] + noise[order[i]])
    return order[chosen], log_prob[order[chosen]]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.6, seed=9),
        Sampling(with_unk=True),
        Sampling(temperature=0.0),
        Sampling(top_k=5, temperature=2.0),
        Sampling(top_p=0.4),
        # Of flat probabilities, so that more than the first 64 rows are looked at.
        Sampling(top_p=0.97, temperature=3.0, seed=1),
        Sampling(top_k=20, top_p=0.5, temperature=1.5, with_unk=True),
    ],
    ids=str,
)
def test_each_token_against_numpy(bigram, sampling):
    texts = write(bigram, sampling)
    assert [(text.prompt, text.sample) for text in texts] == [(p, s) for p in range(3) for s in range(2)]
    for number, text in enumerate(texts):
        last = [EOS_ID, *PROMPTS[text.prompt]][-1]
        for position, token in enumerate(text.ids):
            expected, log_prob = chosen_by_numpy(last, sampling, text=number, position=position)
            assert token == expected, (number, position)
            assert text.log_probs[position] == pytest.approx(log_prob, rel=1e-5, abs=1e-5)
            last = token
        num_lines = np.count_nonzero(text.ids == EOS_ID)
        assert text.is_finished == (num_lines == 2)
        assert len(text.ids) == 6 or (text.is_finished and text.ids[-1] == EOS_ID)
    everything = np.concatenate([text.ids for text in texts])
    assert (UNK_ID in everything) == sampling.with_unk


def test_a_text_ends_with_its_last_line(bigram):
    texts = write(bigram, Sampling(seed=2), max_tokens=300, max_lines=1, num_samples=1)
    assert all(text.is_finished for text in texts)
    assert all(np.count_nonzero(text.ids == EOS_ID) == 1 and text.ids[-1] == EOS_ID for text in texts)


@pytest.fixture(scope="module")
def recurrent(mirrored):
    """recurrent(n): a model with a state to carry, the same on any number of devices."""

    def build(num_replicas):
        return make_restored(
            mirrored(num_replicas), body=lambda: lstm_body(num_layers=2, hidden_dim=EMBED_DIM, dropout=0.5)
        )

    return build


SAMPLING = Sampling(temperature=1.2, top_p=0.9, seed=4)


@pytest.fixture(scope="module")
def on_one_device(recurrent):
    restored = recurrent(1)
    return restored, write(restored, SAMPLING)


def test_log_probabilities_are_those_of_the_scorer(on_one_device):
    assert_scored_alike(*on_one_device)


def test_a_body_that_keeps_keys_and_values(mirrored):
    """Prompts of several lengths side by side, the longest read in windows."""
    body = functools.partial(transformer_body, num_layers=2, hidden_dim=EMBED_DIM, num_heads=1, dropout=0.1)
    restored = make_restored(mirrored(2), body=body)
    assert_scored_alike(restored, write(restored, Sampling(top_k=9), num_samples=1))


def assert_scored_alike(restored, texts):
    lines = [np.concatenate([PROMPTS[text.prompt], text.ids]).astype(np.int32) for text in texts]
    scored = list(Scorer(restored, batch_size=3).score_lines(lines))
    for text, line in zip(texts, scored, strict=True):
        np.testing.assert_allclose(text.log_probs, line.log_probs[-len(text.ids) :], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("num_replicas", "batch_size"), [(2, 3), (3, 6), (4, 1)])
def test_the_same_texts_on_other_devices_and_in_other_batches(
    recurrent, on_one_device, num_replicas, batch_size
):
    texts = write(recurrent(num_replicas), SAMPLING, batch_size=batch_size)
    for text, expected in zip(texts, on_one_device[1], strict=True):
        np.testing.assert_array_equal(text.ids, expected.ids)
        np.testing.assert_allclose(text.log_probs, expected.log_probs, rtol=1e-4, atol=1e-5)


def test_a_seed_decides(on_one_device):
    restored, texts = on_one_device
    others = write(restored, Sampling(temperature=1.2, top_p=0.9, seed=5))
    assert [text.ids.tolist() for text in texts] != [text.ids.tolist() for text in others]
    assert len({tuple(text.ids) for text in texts}) == len(texts)


def test_a_model_that_is_not_finite_is_refused(bigram):
    table = bigram.model.tables["words"]
    table.write_rows("embedding", EOS_ID, np.full([1, EMBED_DIM], np.nan, np.float32))
    try:
        with pytest.raises(ValueError, match=r"must be finite.*Received: NaN or infinity"):
            write(bigram, Sampling(temperature=0.0))
    finally:
        table.write_rows("embedding", EOS_ID, ROWS[EOS_ID : EOS_ID + 1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, r"temperature must be .* Received: -0.1"),
        ({"temperature": 1e-9}, r"temperature must be 0 or a number from 1e-06 on. Received: 1e-09"),
        ({"temperature": float("nan")}, r"temperature must be .* Received: nan"),
        ({"top_k": 0}, r"top_k must be at least 1. Received: 0"),
        ({"top_p": 0.0}, r"top_p must be above 0 and at most 1. Received: 0.0"),
        ({"top_p": 1.5}, r"top_p must be above 0 and at most 1. Received: 1.5"),
        ({"seed": 2**31}, r"seed must be in \[0, 2\*\*31\). Received: 2147483648"),
    ],
)
def test_what_cannot_be_meant_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)
