"""The streamed top-k against float64 numpy, on one and on several devices."""

import numpy as np
import pytest
import tensorflow as tf
from replicas import run_everywhere

from lmscale.distribution import collectives
from lmscale.softmax.gumbel import gumbel
from lmscale.softmax.top_k import top_k
from lmscale.tables.placement import Placement

EMBED_DIM = 5


def make_case(*, vocab_size=1_009, tokens=12, integers=False, seed=0):
    rng = np.random.default_rng(seed)

    def draw(*shape):
        if integers:  # Few values, so that many scores are equal, and exact in any precision.
            return rng.integers(-2, 3, shape).astype(np.float32)
        # Of so few digits that float32 has every score exactly: no order hangs on a rounding.
        return (rng.integers(-512, 513, shape) / 64).astype(np.float32)

    return {
        "hidden": draw(tokens, EMBED_DIM),
        "rows": draw(vocab_size, EMBED_DIM),
        "bias": draw(vocab_size),
        "excluded": rng.integers(-1, vocab_size, [tokens, 40]).astype(np.int32),
    }


def logits_of(case):
    return case["hidden"].astype(np.float64) @ case["rows"].astype(np.float64).T + case["bias"]


def without(scores, excluded):
    scores = scores.copy()
    for row, ids in zip(scores, excluded, strict=True):
        row[ids[ids >= 0]] = -np.inf
    return scores


def best(ranks, k):
    """Ids of the k highest, of equal ones the smaller id first; -1 for -inf."""
    ids = np.argsort(-ranks, axis=1, kind="stable")[:, :k]
    ids = np.where(np.isneginf(np.take_along_axis(ranks, ids, axis=1)), -1, ids)
    return np.pad(ids, ((0, 0), (0, k - ids.shape[1])), constant_values=-1)


def logsumexp(x):
    highest = x.max(axis=1)
    return highest + np.log(np.exp(x - highest[:, np.newaxis]).sum(axis=1))


def run(strategy, case, *, k, noise_keys=None, with_bias=True, compiled=True, **options):
    """`TopK` of all tokens, with garbage behind the valid rows of each shard."""
    num_shards = strategy.num_replicas_in_sync
    placement = Placement(vocab_size=len(case["rows"]), num_shards=num_shards)
    n = len(case["hidden"]) // num_shards

    def shard_of(x, shard_id):
        own = np.full([placement.allocated_rows, *x.shape[1:]], np.nan, np.float32)
        own[: placement.num_valid_rows(shard_id)] = x[shard_id::num_shards]
        own[placement.num_valid_rows(shard_id) :: 2] = np.inf
        return tf.constant(own)

    def function():
        shard_id = collectives.replica_id()
        own = slice(shard_id * n, (shard_id + 1) * n)
        arguments = dict(options)
        if "excluded" in case:
            arguments["excluded"] = tf.constant(case["excluded"][own])
        if noise_keys is not None:
            keys = collectives.all_gather(tf.constant(noise_keys[own]))
            arguments["noise"] = lambda ids: gumbel(keys, ids)
        found = top_k(
            tf.constant(case["hidden"][own]),
            k=k,
            rows=shard_of(case["rows"], shard_id),
            bias=shard_of(case["bias"], shard_id) if with_bias else None,
            num_valid_rows=placement.num_valid_rows(shard_id),
            **arguments,
        )
        return {name: x for name, x in found._asdict().items() if x is not None}

    of_replicas = run_everywhere(strategy, function, compiled=compiled)
    return {name: np.concatenate([found[name] for found in of_replicas]) for name in of_replicas[0]}


@pytest.mark.parametrize(
    ("num_shards", "k", "block_rows"),
    [(1, 1, None), (1, 7, 100), (2, 7, 33), (3, 20, 50), (4, 20, None), (3, 400, 90), (4, 1_100, 64)],
)
def test_against_numpy(mirrored, num_shards, k, block_rows):
    """Sizes that divide nothing; more asked for than a block, a shard or the vocabulary has."""
    case = make_case()
    found = run(
        mirrored(num_shards),
        case,
        k=k,
        block_rows=block_rows,
        temperature=tf.constant(0.7),
        with_logsumexp=True,
        with_allowed_logsumexp=True,
    )
    logits = logits_of(case)
    allowed = without(logits, case["excluded"])
    expected = best(allowed, k)
    np.testing.assert_array_equal(found["ids"], expected)
    scores = np.where(expected < 0, -np.inf, np.take_along_axis(logits, np.maximum(expected, 0), axis=1))
    np.testing.assert_allclose(found["scores"], scores, rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(found["logsumexp"], logsumexp(logits), rtol=1e-6)
    np.testing.assert_allclose(found["allowed_logsumexp"], logsumexp(allowed / 0.7), rtol=1e-6)


@pytest.mark.parametrize(("num_shards", "k"), [(1, 30), (2, 1), (3, 600), (4, 30)])
def test_of_equal_scores_the_smaller_id_comes_first(mirrored, num_shards, k):
    case = make_case(integers=True)
    expected = best(without(logits_of(case), case["excluded"]), k)
    assert len(np.unique(logits_of(case)[0])) < 50
    found = run(mirrored(num_shards), case, k=k, block_rows=61)
    np.testing.assert_array_equal(found["ids"], expected)
    assert set(found) == {"scores", "ids"}


@pytest.mark.parametrize("num_shards", [1, 3])
def test_fewer_rows_left_than_asked_for(mirrored, num_shards):
    """A shard without rows, tokens with all of them excluded, twice even."""
    case = make_case(vocab_size=2, tokens=3)
    case["excluded"] = np.array([[1, 1, -1, 0], [1, -1, 1, 1], [-1, -1, -1, -1]], np.int32)
    found = run(mirrored(num_shards), case, k=3, temperature=1.0, with_allowed_logsumexp=True)
    expected = best(without(logits_of(case), case["excluded"]), 3)
    np.testing.assert_array_equal(found["ids"], expected)
    np.testing.assert_array_equal(np.isneginf(found["scores"]), expected < 0)
    assert np.isneginf(found["allowed_logsumexp"][0])


@pytest.mark.parametrize("num_shards", [1, 3])
def test_cosine(mirrored, num_shards):
    case = make_case(vocab_size=307, tokens=6)
    case["rows"][[5, 77]] = 0
    hidden, rows = (case[name].astype(np.float64) for name in ("hidden", "rows"))
    norms = np.linalg.norm(rows, axis=1)
    cosines = hidden @ rows.T / np.linalg.norm(hidden, axis=1, keepdims=True) / np.where(norms > 0, norms, 1)
    del case["excluded"]
    found = run(mirrored(num_shards), case, k=307, with_bias=False, cosine=True, block_rows=50)
    np.testing.assert_array_equal(found["ids"], best(cosines, 307))
    np.testing.assert_allclose(found["scores"], np.take_along_axis(cosines, found["ids"], axis=1), atol=1e-6)


@pytest.mark.parametrize("num_shards", [1, 4])
def test_noise_ranks_and_scores_stay_without_it(mirrored, num_shards):
    case = make_case()
    keys = np.array([[3, text, 5] for text in range(12)], np.int32)
    noise = gumbel(tf.constant(keys), tf.range(1_009)).numpy().astype(np.float64)
    logits = logits_of(case)
    expected = best(without(logits / 0.5 + noise, case["excluded"]), 4)
    found = run(mirrored(num_shards), case, k=4, noise_keys=keys, temperature=0.5, block_rows=97)
    np.testing.assert_array_equal(found["ids"], expected)
    np.testing.assert_allclose(
        found["scores"], np.take_along_axis(logits, expected, axis=1), rtol=1e-5, atol=2e-6
    )


def test_the_best_with_noise_is_a_draw_from_the_softmax(mirrored):
    """Of 3,000 draws each row is as frequent as it is probable, within four standard errors."""
    case = make_case(vocab_size=23, tokens=1)
    num_draws, temperature = 3_000, 1.3
    case = {**case, "hidden": np.repeat(case["hidden"], num_draws, axis=0)}
    del case["excluded"]
    keys = np.array([[1, 0, position] for position in range(num_draws)], np.int32)
    found = run(mirrored(2), case, k=1, noise_keys=keys, temperature=temperature)
    scaled = logits_of(case)[0] / temperature
    probabilities = np.exp(scaled - logsumexp(scaled[np.newaxis]))
    frequencies = np.bincount(found["ids"][:, 0], minlength=23) / num_draws
    errors = np.sqrt(probabilities * (1 - probabilities) / num_draws)
    assert (np.abs(frequencies - probabilities) < 4 * errors).all()


def test_a_score_that_is_not_a_number_is_never_among_the_best(mirrored):
    case = make_case(vocab_size=50, tokens=2)
    case["rows"][7] = np.nan
    del case["excluded"]
    found = run(mirrored(2), case, k=50)
    assert set(found["ids"][0]) == {-1, *range(50)} - {7}


def test_narrow_products_have_float32_scores(mirrored):
    case = make_case(tokens=4)
    rounded = case | {
        n: tf.cast(tf.cast(case[n], tf.bfloat16), tf.float32).numpy() for n in ("hidden", "rows")
    }
    found = run(mirrored(2), case, k=5, compute_dtype=tf.bfloat16)
    np.testing.assert_array_equal(found["ids"], best(without(logits_of(rounded), case["excluded"]), 5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k must be at least 1. Received: k=0"),
        ({"block_rows": 0}, "block_rows must be at least 1. Received: 0"),
        ({"cosine": True}, "cosine=True and a bias"),
        ({"with_allowed_logsumexp": True}, "need a temperature. Received: none"),
        ({"noise": lambda ids: ids}, "need a temperature. Received: none"),
        ({"excluded": np.zeros([2, 1], np.int32)}, r"excluded must be \[3, m\].*Received: \(2, 1\)"),
        ({"rows": np.zeros([9, 4])}, r"\[shard_rows, 5\].*Received: \(9, 4\)"),
        ({"hidden": np.zeros([3])}, r"\[tokens, embed_dim\]. Received: \(3,\)"),
    ],
)
def test_what_cannot_be_meant_is_refused(options, message):
    arguments = {
        "hidden": np.zeros([3, 5]),
        "k": 2,
        "rows": np.zeros([9, 5]),
        "bias": np.zeros([9]),
    } | options
    arguments = {name: tf.constant(x) if isinstance(x, np.ndarray) else x for name, x in arguments.items()}
    with pytest.raises(ValueError, match=message):
        top_k(arguments.pop("hidden"), num_valid_rows=9, **arguments)
