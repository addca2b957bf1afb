"""Heads whose hidden states have several labels, and negative sampling, against loops over pairs in float64."""

import functools
import types

import numpy as np
import pytest
import tensorflow as tf
from references import log_softmax, sigmoid

from lmscale.softmax.bands import Neighbours, band_mask
from lmscale.softmax.negative_sampling import NegativeSampling
from lmscale.softmax.sampled import SampledSoftmax
from lmscale.softmax.samplers import InBatchSampler, UnigramSampler
from lmscale.tables.rows import Rows

VOCAB_SIZE, DIM, EXAMPLES, CHUNK, WINDOW, NUM_SAMPLED = 61, 5, 3, 7, 2, 21
COUNTS = (900 / (np.arange(VOCAB_SIZE) + 1.0)).astype(np.int64)
SAMPLER = functools.partial(UnigramSampler, num_sampled=NUM_SAMPLED, power=0.75)


class _Problem:
    """Examples whose hidden states depend on an id, a table, and each pair of a state and a label."""

    def __init__(self, *, bias=True):
        rng = np.random.default_rng(1)
        self.rows = rng.normal(size=[VOCAB_SIZE, DIM]).astype(np.float32)
        self.bias = (
            rng.normal(size=[VOCAB_SIZE]).astype(np.float32) if bias else np.zeros([VOCAB_SIZE], np.float32)
        )
        self.has_bias = bias
        self.labels = rng.integers(0, 30, [EXAMPLES, CHUNK + 2 * WINDOW]).astype(np.int32)
        self.states = self.labels[:, WINDOW:-WINDOW]
        self.inputs = rng.normal(size=[VOCAB_SIZE, DIM]).astype(np.float32)
        self.hidden = self.inputs[self.states].reshape(-1, DIM)
        self.before, self.after = rng.integers(0, WINDOW + 1, [2, EXAMPLES, CHUNK]).astype(np.int32)
        self.before[0, 3] = self.after[0, 3] = 0
        self.loss_weights = rng.uniform(size=EXAMPLES * CHUNK).astype(np.float32)

    def neighbours(self):
        """(state, place of a label) of all pairs, by state."""
        pairs = []
        for e in range(EXAMPLES):
            for i in range(CHUNK):
                places = [i + o for o in range(-self.before[e, i], self.after[e, i] + 1) if o]
                pairs.append([e * (CHUNK + 2 * WINDOW) + WINDOW + place for place in places])
        return pairs

    def run(self, make_head, *, one_label=False):
        """(loss, {name: gradient}, sampled ids) of a head; gradients of rows by id."""
        head = make_head(table="words", vocab_size=VOCAB_SIZE, counts=COUNTS)
        candidates = head.candidates(seed=tf.constant([3, 4]), labels=None)
        sampled_ids = candidates.sampled_ids.numpy()
        labels = self.states.reshape(-1) if one_label else self.labels.reshape(-1)
        neighbours = Neighbours(
            tf.constant(self.before.reshape(-1)),
            tf.constant(self.after.reshape(-1)),
            tf.constant(self.states.reshape(-1)),
            num_examples=EXAMPLES,
            window=WINDOW,
        )

        class Table:
            pass

        Table.static_shapes = False

        def rows(ids):
            return Rows(tf.constant(self.rows[ids]), tf.constant(self.bias[ids]) if self.has_bias else None)

        @tf.function(autograph=False)
        def compute(hidden, loss_weights):
            result = head.value_and_gradients(
                hidden,
                labels=tf.constant(labels),
                loss_weights=loss_weights,
                label_rows=rows(labels),
                candidate_rows=rows(sampled_ids),
                candidates=candidates,
                table=Table,
                **({} if one_label else {"neighbours": neighbours}),
            )
            return result.loss, result.d_hidden, vars(result.d_label_rows), vars(result.d_candidate_rows)

        loss, d_hidden, d_labels, d_candidates = compute(
            tf.constant(self.hidden), tf.constant(self.loss_weights)
        )
        # Of states of one id, only the sum matters.
        d_inputs = np.zeros([VOCAB_SIZE, DIM])
        np.add.at(d_inputs, self.states.reshape(-1), d_hidden.numpy())
        gradients = {"inputs": d_inputs}
        for name in ("embedding", "bias") if self.has_bias else ("embedding",):
            gradients[name] = np.zeros([VOCAB_SIZE, *d_labels[name].shape[1:]])
            np.add.at(gradients[name], labels, d_labels[name].numpy())
            np.add.at(gradients[name], sampled_ids, d_candidates[name].numpy())
        assert d_labels["bias"] is None or self.has_bias
        return loss.numpy(), gradients, sampled_ids

    def reference(self, loss_of_state, sampled_ids):
        """The same from the loss of a state: function (logits of its labels, of the sample, labels) to (loss, d, d)."""
        rows, bias = self.rows.astype(np.float64), self.bias.astype(np.float64)
        losses = []
        gradients = {
            "inputs": np.zeros([VOCAB_SIZE, DIM]),
            "embedding": np.zeros([VOCAB_SIZE, DIM]),
            "bias": np.zeros([VOCAB_SIZE]),
        }
        states = self.states.reshape(-1)
        for state, places in enumerate(self.pairs):
            h, weight = self.hidden[state].astype(np.float64), self.loss_weights[state]
            labels = self.labels.reshape(-1)[places]
            loss, d_labels, d_sampled = loss_of_state(
                rows[labels] @ h + bias[labels],
                rows[sampled_ids] @ h + bias[sampled_ids],
                labels,
                state,
            )
            losses.append(loss)
            ids = np.concatenate([labels, sampled_ids])
            d_logits = weight * np.concatenate([d_labels, d_sampled])
            np.add.at(gradients["inputs"], states[state], d_logits @ rows[ids])
            np.add.at(gradients["embedding"], ids, d_logits[:, None] * h)
            np.add.at(gradients["bias"], ids, d_logits)
        return np.array(losses), gradients


def _negative_sampling(
    labels, sampled, ids, state, *, num_negatives, groups=1, calibration=0.0, states_per_example=CHUNK
):
    """Mean over the labels of the logistic loss of each against `num_negatives` of the sample, in expectation.

    The sample falls into groups by number, and so do examples.

    Of a label, -log(sigmoid(logit)**beta), with beta as gSASRec's paper writes it.
    """
    alpha = num_negatives / (VOCAB_SIZE - 1)
    beta = alpha * (calibration * (1 - 1 / alpha) + 1 / alpha)
    own = np.arange(len(sampled)) % groups == state // states_per_example % groups
    share, count = num_negatives / own.sum() * own, max(len(ids), 1)
    loss = -np.log(sigmoid(labels) ** beta).sum() / count + share @ np.logaddexp(0, sampled)
    return loss, -beta * sigmoid(-labels) / count, share * sigmoid(sampled)


def _sampled_softmax(labels, sampled, ids, state, *, sampled_ids, log_expected_count, remove):
    """Mean over the labels of each one's cross-entropy against the sample, less that of its labels that is in it."""
    sampled = sampled - log_expected_count[sampled_ids]
    if remove:
        sampled = np.where(np.isin(sampled_ids, ids), -np.inf, sampled)
    losses, d_labels, d_sampled = [], [], np.zeros([NUM_SAMPLED])
    for logit, label in zip(labels, ids, strict=True):
        log_probabilities = log_softmax(np.concatenate([[logit - log_expected_count[label]], sampled]))
        losses.append(-log_probabilities[0])
        d_labels.append((np.exp(log_probabilities[0]) - 1) / len(ids))
        d_sampled += np.exp(log_probabilities[1:]) / len(ids)
    return np.mean(losses) if losses else 0.0, np.array(d_labels), d_sampled


def _assert_close(found, expected):
    np.testing.assert_allclose(found[0], expected[0], rtol=2e-5, atol=1e-6)
    for name, gradient in found[1].items():
        np.testing.assert_allclose(gradient, expected[1][name], rtol=2e-4, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("calibration", [0.0, 0.7])
def test_negative_sampling_of_neighbours(bias, groups, calibration):
    problem = _Problem(bias=bias)
    problem.pairs = problem.neighbours()
    head = functools.partial(
        NegativeSampling, sampler=SAMPLER, num_negatives=3, noise_groups=groups, calibration=calibration
    )
    *found, sampled_ids = problem.run(head)
    loss_of_state = functools.partial(
        _negative_sampling, num_negatives=3, groups=groups, calibration=calibration
    )
    expected = problem.reference(loss_of_state, sampled_ids)
    _assert_close(found, expected)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 7])
@pytest.mark.parametrize("calibration", [0.0, 0.7, 1.0])
def test_negative_sampling_of_one_label(bias, groups, calibration):
    problem = _Problem(bias=bias)
    places = np.arange(EXAMPLES)[:, None] * (CHUNK + 2 * WINDOW) + WINDOW + np.arange(CHUNK)
    problem.pairs = [[place] for place in places.reshape(-1)]
    head = functools.partial(
        NegativeSampling, sampler=SAMPLER, num_negatives=3, noise_groups=groups, calibration=calibration
    )
    *found, sampled_ids = problem.run(head, one_label=True)
    loss_of_state = functools.partial(
        _negative_sampling,
        num_negatives=3,
        groups=groups,
        calibration=calibration,
        states_per_example=1,
    )
    expected = problem.reference(loss_of_state, sampled_ids)
    _assert_close(found, expected)


def test_negative_sampling_is_that_of_tensorflow_where_the_sample_counts_once():
    """With as many negatives as samples, each weighs 1: tf.nn.nce_loss without its correction of logits."""
    problem = _Problem()
    head = functools.partial(NegativeSampling, sampler=SAMPLER, num_negatives=NUM_SAMPLED)
    loss, _, sampled_ids = problem.run(head, one_label=True)
    ones = tf.ones([EXAMPLES * CHUNK, 1]), tf.ones([NUM_SAMPLED])
    # An expected count of 1 has the logarithm 0.
    expected = tf.nn.nce_loss(
        problem.rows,
        problem.bias,
        problem.states.reshape(-1, 1),
        problem.hidden,
        num_sampled=NUM_SAMPLED,
        num_classes=VOCAB_SIZE,
        sampled_values=(tf.constant(sampled_ids, tf.int64), *ones),
    )
    np.testing.assert_allclose(loss, expected, rtol=2e-5)


@pytest.mark.parametrize("calibration", [0.0, 0.7, 1.0])
@pytest.mark.parametrize(
    "noise", [np.ones(7, int), np.array([1, 4, 2, 1, 3, 7, 5])], ids=["uniform", "other"]
)
def test_where_calibrated_logits_end(noise, calibration):
    """Labels of probabilities p, noise of probabilities q: the gradient vanishes at log(beta / (k q) p)."""
    num_rows, k = len(noise), 3
    p, q = np.random.default_rng(5).dirichlet(np.ones(num_rows)), noise / noise.sum()
    beta = 1 - calibration * (1 - k / (num_rows - 1))
    logits = np.log(beta / (k * q) * p)
    if calibration == 1 and q.min() == q.max():
        np.testing.assert_allclose(logits, np.log(p * num_rows / (num_rows - 1)))
    sampled_ids = np.repeat(np.arange(num_rows), noise)
    sampler = types.SimpleNamespace(samples_are_labels=False, num_sampled=len(sampled_ids))
    head = NegativeSampling(
        table="words",
        vocab_size=num_rows,
        counts=None,
        sampler=lambda **_: sampler,
        num_negatives=k,
        calibration=calibration,
    )

    def gradient(logits):
        # A state for each label, all alike, with the label's probability as its weight. The logits are biases.
        result = head.value_and_gradients(
            tf.zeros([num_rows, DIM]),
            labels=tf.range(num_rows),
            loss_weights=tf.constant(p, tf.float32),
            label_rows=Rows(tf.zeros([num_rows, DIM]), tf.constant(logits, tf.float32)),
            candidate_rows=Rows(
                tf.zeros([len(sampled_ids), DIM]), tf.constant(logits[sampled_ids], tf.float32)
            ),
            candidates=None,
            table=None,
        )
        total = result.d_label_rows.bias.numpy().astype(np.float64)
        np.add.at(total, sampled_ids, result.d_candidate_rows.bias.numpy())
        return total

    np.testing.assert_allclose(gradient(logits), 0, atol=1e-6)
    assert (gradient(logits + 0.1) > 1e-4).all()
    assert (gradient(logits - 0.1) < -1e-4).all()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("remove", [True, False])
def test_sampled_softmax_of_neighbours(bias, remove):
    problem = _Problem(bias=bias)
    problem.pairs = problem.neighbours()
    head = functools.partial(SampledSoftmax, sampler=SAMPLER, remove_accidental_hits=remove)
    *found, sampled_ids = problem.run(head)
    assert any(np.isin(problem.labels.reshape(-1)[places], sampled_ids).any() for places in problem.pairs)
    log_expected_count = SAMPLER(vocab_size=VOCAB_SIZE, counts=COUNTS).log_expected_count(
        np.arange(VOCAB_SIZE)
    )
    loss_of_state = functools.partial(
        _sampled_softmax,
        sampled_ids=sampled_ids,
        log_expected_count=log_expected_count.numpy().astype(np.float64),
        remove=remove,
    )
    _assert_close(found, problem.reference(loss_of_state, sampled_ids))


def test_extreme_logits_have_finite_losses():
    problem = _Problem(bias=False)
    problem.rows *= 1000
    for head in (NegativeSampling, SampledSoftmax):
        loss, gradients, _ = problem.run(functools.partial(head, sampler=SAMPLER))
        assert np.isfinite(loss).all()
        assert all(np.isfinite(gradient).all() for gradient in gradients.values())
        assert loss.max() > 100


def test_mask_is_the_window_without_its_centre():
    before, after = np.int32([[0, 1, 2]]), np.int32([[2, 1, 0]])
    mask = band_mask(tf.constant(before), tf.constant(after), window=2).numpy().astype(int)
    np.testing.assert_array_equal(
        mask[0], [[0, 0, 0, 1, 1, 0, 0], [0, 0, 1, 0, 1, 0, 0], [0, 0, 1, 1, 0, 0, 0]]
    )


def test_refused():
    def make(**changes):
        return NegativeSampling(
            table="words", vocab_size=VOCAB_SIZE, counts=COUNTS, **({"sampler": SAMPLER} | changes)
        )

    with pytest.raises(ValueError, match=r"num_negatives must be above 0. Received: num_negatives=0"):
        make(num_negatives=0)
    for calibration in (-0.1, 1.01, float("nan")):
        with pytest.raises(ValueError, match=rf"from 0 .* to 1 .*Received: calibration={calibration}"):
            make(calibration=calibration)
    with pytest.raises(ValueError, match=r"as there are other rows. Received: num_negatives=60.5, 61 rows"):
        make(num_negatives=60.5, calibration=0.5)
    # All other rows at full rate: nothing to correct. And without a calibration any number goes.
    assert make(num_negatives=60, calibration=1.0).label_weight == 1
    assert make(num_negatives=70).label_weight == 1
    with pytest.raises(ValueError, match=r"divide the sample. Received: noise_groups=4, num_sampled=21"):
        make(noise_groups=4)
    with pytest.raises(ValueError, match="noise that does not depend on the labels"):
        make(sampler=InBatchSampler)
    head = functools.partial(NegativeSampling, sampler=SAMPLER, noise_groups=7)
    with pytest.raises(ValueError, match="Received: 3 examples of a replica and micro-batch, noise_groups=7"):
        _Problem().run(head)
