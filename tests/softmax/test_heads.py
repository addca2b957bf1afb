import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from references import log_softmax

from lmscale.distribution import collectives
from lmscale.softmax.full import FullSoftmax
from lmscale.softmax.sampled import SampledSoftmax
from lmscale.softmax.samplers import InBatchSampler, LogUniformSampler, UniformSampler, UnigramSampler
from lmscale.tables.rows import Rows
from lmscale.tables.table import RowGradients, ShardedTable

VOCAB_SIZE, EMBED_DIM, TOKENS = 1003, 5, 11  # Tokens of each replica.
NUM_UNIFORM = 499  # So many that some labels are among them.

SAMPLERS = {
    "uniform": functools.partial(UniformSampler, num_sampled=NUM_UNIFORM),
    "log_uniform": functools.partial(LogUniformSampler, num_sampled=67),
    "unigram_stratified": functools.partial(UnigramSampler, num_sampled=67, replacement=False),
    "in_batch": InBatchSampler,
}


def _counts(vocab_size):
    return (3000 / (np.arange(vocab_size) + 1.0)).astype(np.int64)


class _Problem:
    """Tokens of all replicas and a table in float64, with the values of float32."""

    def __init__(self, num_replicas, *, vocab_size=VOCAB_SIZE, bias=True, seed=0):
        rng = np.random.default_rng(seed)
        tokens = num_replicas * TOKENS
        self.num_replicas = num_replicas
        self.vocab_size = vocab_size
        self.rows = rng.normal(size=[vocab_size, EMBED_DIM]).astype(np.float32)
        self.bias = rng.normal(size=[vocab_size]).astype(np.float32) if bias else None
        self.hidden = rng.normal(size=[tokens, EMBED_DIM]).astype(np.float32)
        # Duplicate labels, and frequent ones, which samplers draw too.
        self.labels = np.minimum(rng.geometric(0.05, tokens) - 1, vocab_size - 1).astype(np.int32)
        self.labels[0] = vocab_size - 1
        self.loss_weights = (rng.uniform(size=tokens) / tokens).astype(np.float32)
        self.loss_weights[-1] = 0.0

    def table(self, strategy):
        with strategy.scope():
            table = ShardedTable(vocab_size=self.vocab_size, embed_dim=EMBED_DIM, bias=self.bias is not None)
        table.write_rows("embedding", 0, self.rows)
        if self.bias is not None:
            table.write_rows("bias", 0, self.bias)
        return table

    def logits(self):
        bias = 0 if self.bias is None else self.bias.astype(np.float64)
        return self.hidden.astype(np.float64) @ self.rows.T.astype(np.float64) + bias

    def gradients(self, d_logits):
        """{"hidden", "embedding", "bias"}: by the chain rule, given those of the logits, [tokens, vocab_size]."""
        d_logits = d_logits * self.loss_weights.astype(np.float64)[:, None]
        return {
            "hidden": d_logits @ self.rows,
            "embedding": d_logits.T @ self.hidden,
            "bias": d_logits.sum(axis=0),
        }

    def full_reference(self):
        """Loss of each token and {name: gradient}, over the whole vocabulary."""
        log_probabilities = log_softmax(self.logits())
        tokens = np.arange(len(self.labels))
        d_logits = np.exp(log_probabilities)
        d_logits[tokens, self.labels] -= 1
        return -log_probabilities[tokens, self.labels], self.gradients(d_logits)

    def sampled_reference(self, sampled_ids, log_expected_count):
        """The same over each token's label and the sampled classes, less copies of the label.

        `log_expected_count` is of every id, [vocab_size].
        """
        corrected = self.logits() - log_expected_count
        losses, d_logits = [], np.zeros_like(corrected)
        for token, label in enumerate(self.labels):
            ids = np.concatenate([[label], sampled_ids[sampled_ids != label]])
            log_probabilities = log_softmax(corrected[token, ids])
            losses.append(-log_probabilities[0])
            np.add.at(d_logits[token], ids, np.exp(log_probabilities))
            d_logits[token, label] -= 1
        return np.array(losses), self.gradients(d_logits)


def _run(strategy, problem, make_head):
    """Loss, {name: gradient} of all replicas together, and the sampled ids (None without), through the table."""
    table = problem.table(strategy)
    with strategy.scope():
        head = make_head(table="words", vocab_size=problem.vocab_size, counts=_counts(problem.vocab_size))
    assert head.table == "words"

    @tf.function
    def compute():
        def replica_compute():
            start = collectives.replica_id() * TOKENS
            own = {
                name: tf.constant(getattr(problem, name)[start : start + TOKENS])
                for name in ("hidden", "labels", "loss_weights")
            }
            candidates = head.candidates(seed=tf.constant([3, 4]), labels=tf.constant(problem.labels))
            sampled_ids = None if candidates is None else candidates.sampled_ids
            pulled = table.pull(own["labels"], sampled_ids)
            result = head.value_and_gradients(
                label_rows=Rows(pulled.embedding, pulled.bias) if head.needs_label_rows else None,
                candidate_rows=None
                if candidates is None
                else Rows(pulled.shared_embedding, pulled.shared_bias),
                candidates=candidates,
                table=table,
                **own,
            )
            d_labels, d_candidates = (
                Rows(None) if rows is None else rows
                for rows in (result.d_label_rows, result.d_candidate_rows)
            )
            collected = table.collect(
                pulled,
                RowGradients(
                    embedding=d_labels.embedding,
                    bias=d_labels.bias,
                    shared_embedding=d_candidates.embedding,
                    shared_bias=d_candidates.bias,
                ),
                dense=result.d_shard,
            )
            local_rows = collected.local_rows
            if local_rows is None:
                local_rows = tf.range(table.placement.allocated_rows)
            return {
                "loss": result.loss,
                "hidden": result.d_hidden,
                "local_rows": local_rows,
                "sampled_ids": tf.zeros([0]) if sampled_ids is None else sampled_ids,
                **collected.gradients,
            }

        return strategy.run(replica_compute)

    results = {
        name: [np.asarray(x) for x in strategy.experimental_local_results(value)]
        for name, value in compute().items()
    }
    for ids in results["sampled_ids"]:
        np.testing.assert_array_equal(ids, results["sampled_ids"][0])
    gradients = {"hidden": np.concatenate(results["hidden"])}
    for name in table.parameters:
        # Back to ids, scratch rows dropped.
        whole = np.zeros([problem.vocab_size + problem.num_replicas, *results[name][0].shape[1:]])
        for shard_id, (rows, values) in enumerate(zip(results["local_rows"], results[name], strict=True)):
            ids = rows * problem.num_replicas + shard_id
            inside = ids < problem.vocab_size
            assert len(np.unique(ids[inside])) == inside.sum()
            np.testing.assert_array_equal(values[~inside], 0.0)
            whole[ids[inside]] = values[inside]
        gradients[name] = whole[: problem.vocab_size]
    return np.concatenate(results["loss"]), gradients, results["sampled_ids"][0]


def _assert_close(loss, gradients, expected_loss, expected_gradients, *, rtol=1e-4, atol=1e-6):
    np.testing.assert_allclose(loss, expected_loss, rtol=rtol, atol=atol)
    for name, gradient in gradients.items():
        np.testing.assert_allclose(gradient, expected_gradients[name], rtol=rtol, atol=atol, err_msg=name)


@pytest.mark.parametrize("num_replicas", [1, 2, 3])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sampled_softmax_against_numpy(mirrored, num_replicas, sampler):
    strategy, problem = mirrored(num_replicas), _Problem(num_replicas)
    loss, gradients, sampled_ids = _run(
        strategy, problem, functools.partial(SampledSoftmax, sampler=SAMPLERS[sampler])
    )
    reference_sampler = SAMPLERS[sampler](vocab_size=VOCAB_SIZE, counts=_counts(VOCAB_SIZE))
    log_expected_count = reference_sampler.log_expected_count(
        tf.range(VOCAB_SIZE), num_draws=len(sampled_ids)
    ).numpy()
    # Some labels are among the candidates.
    assert np.isin(problem.labels, sampled_ids).any()
    _assert_close(loss, gradients, *problem.sampled_reference(sampled_ids, log_expected_count))


@pytest.mark.parametrize("num_replicas", [1, 2, 3])
@pytest.mark.parametrize("block_rows", [None, 100])
def test_full_softmax_against_numpy(mirrored, num_replicas, block_rows):
    problem = _Problem(num_replicas)
    make_head = functools.partial(FullSoftmax, block_rows=block_rows)
    loss, gradients, _ = _run(mirrored(num_replicas), problem, make_head)
    _assert_close(loss, gradients, *problem.full_reference())


@pytest.mark.parametrize("num_replicas", [1, 3])
def test_losses_without_bias_against_numpy(mirrored, num_replicas):
    strategy, problem = mirrored(num_replicas), _Problem(num_replicas, bias=False)
    loss, gradients, _ = _run(strategy, problem, FullSoftmax)
    _assert_close(loss, gradients, *problem.full_reference())
    make_head = functools.partial(SampledSoftmax, sampler=SAMPLERS["uniform"])
    loss, gradients, sampled_ids = _run(strategy, problem, make_head)
    _assert_close(loss, gradients, *problem.sampled_reference(sampled_ids, np.log(NUM_UNIFORM / VOCAB_SIZE)))


def test_full_softmax_with_fewer_words_than_devices(mirrored):
    problem = _Problem(3, vocab_size=2)
    loss, gradients, _ = _run(mirrored(3), problem, FullSoftmax)
    _assert_close(loss, gradients, *problem.full_reference())


@pytest.mark.parametrize("num_replicas", [1, 3])
@pytest.mark.parametrize("sampler", [LogUniformSampler, UnigramSampler])
def test_every_class_sampled_once_is_the_full_softmax(mirrored, num_replicas, sampler):
    problem = _Problem(num_replicas)
    every_class = functools.partial(sampler, num_sampled=VOCAB_SIZE, replacement=False)
    make_head = functools.partial(SampledSoftmax, sampler=every_class)
    loss, gradients, sampled_ids = _run(mirrored(num_replicas), problem, make_head)
    np.testing.assert_array_equal(np.sort(sampled_ids), np.arange(VOCAB_SIZE))
    _assert_close(loss, gradients, *problem.full_reference())


def test_keeping_accidental_hits_counts_the_label_twice(mirrored):
    problem = _Problem(1)
    every_class = functools.partial(LogUniformSampler, num_sampled=VOCAB_SIZE, replacement=False)
    make_head = functools.partial(SampledSoftmax, sampler=every_class, remove_accidental_hits=False)
    loss, _, _ = _run(mirrored(1), problem, make_head)
    logits = problem.logits()
    true = logits[np.arange(TOKENS), problem.labels]
    expected = np.log(np.exp(logits).sum(axis=1) + np.exp(true)) - true
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


@pytest.mark.parametrize(
    "make_head",
    [FullSoftmax, functools.partial(SampledSoftmax, sampler=SAMPLERS["uniform"])],
    ids=["full", "sampled"],
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_products_give_the_loss_of_the_rounded_values(mirrored, make_head, dtype, monkeypatch):
    # A part may compute in float16 where the whole experiment does.
    monkeypatch.setattr(keras.config, "dtype_policy", lambda: keras.DTypePolicy(f"mixed_{dtype}"))
    problem = _Problem(2)
    narrow = functools.partial(make_head, compute_dtype=dtype)
    loss, gradients, sampled_ids = _run(mirrored(2), problem, narrow)
    assert loss.dtype == np.float32
    for name in ("hidden", "rows"):
        rounded = tf.cast(tf.cast(getattr(problem, name), dtype), tf.float32).numpy()
        setattr(problem, name, rounded)
    if len(sampled_ids):
        expected, expected_gradients = problem.sampled_reference(
            sampled_ids, np.log(NUM_UNIFORM / VOCAB_SIZE)
        )
    else:
        expected, expected_gradients = problem.full_reference()
    # Products of narrow values are exact in float32, where they are summed. (The sampled loss keeps the product
    # with the label's own row in float32 after rounding both.)
    np.testing.assert_allclose(loss, expected, rtol=1e-4, atol=1e-5)
    # The gradients of the logits are rounded, to 8 bits in bfloat16, before they are multiplied.
    for name, gradient in gradients.items():
        scale = np.abs(expected_gradients[name]).max()
        np.testing.assert_allclose(gradient, expected_gradients[name], atol=scale / 64, err_msg=name)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_number_of_candidates_is_known_beforehand(sampler):
    head = SampledSoftmax(
        table="words", vocab_size=VOCAB_SIZE, counts=_counts(VOCAB_SIZE), sampler=SAMPLERS[sampler]
    )
    labels = tf.range(41)
    candidates = head.candidates(seed=tf.constant([0, 1]), labels=labels)
    assert head.num_candidates(global_tokens=41) == len(candidates.sampled_ids)
    full = FullSoftmax(table="words", vocab_size=VOCAB_SIZE, counts=None)
    assert full.num_candidates(global_tokens=41) == 0
    assert full.candidates(seed=tf.constant([0, 1]), labels=labels) is None
    assert (head.needs_label_rows, full.needs_label_rows) == (True, False)
