"""Ranks of labels among all rows against sorting in float64, on one and on several devices."""

import numpy as np
import pytest
import tensorflow as tf

from lmscale.distribution import collectives
from lmscale.softmax.ranks import label_ranks
from lmscale.tables.placement import Placement

VOCAB_SIZE, DIM, TOKENS, NUM_EXCLUDED = 131, 5, 36, 7


def case(*, kind, seed=0):
    """Logits that are exact in float32 whatever the order of sums, with many ties; or any."""
    rng = np.random.default_rng(seed)
    if kind == "integers":
        hidden, rows, bias = (
            rng.integers(-2, 3, shape) for shape in ([TOKENS, DIM], [VOCAB_SIZE, DIM], [VOCAB_SIZE])
        )
    else:
        hidden, rows, bias = (
            rng.normal(size=[TOKENS, DIM]),
            rng.normal(size=[VOCAB_SIZE, DIM]),
            rng.normal(size=[VOCAB_SIZE]),
        )
    excluded = rng.integers(-1, VOCAB_SIZE, [TOKENS, NUM_EXCLUDED])
    excluded[:, 3] = excluded[:, 0]  # Told twice.
    labels = rng.integers(0, VOCAB_SIZE, TOKENS)
    excluded[::5, 1] = labels[::5]  # The label itself.
    return {
        "hidden": hidden.astype(np.float32),
        "rows": rows.astype(np.float32),
        "bias": bias.astype(np.float32),
        "labels": labels.astype(np.int32),
        "excluded": excluded.astype(np.int32),
    }


def expected_ranks(case, *, with_bias, with_excluded):
    """By sorting all ids by (falling logit, rising id)."""
    logits = case["hidden"].astype(np.float64) @ case["rows"].T.astype(np.float64)
    if with_bias:
        logits += case["bias"]
    found = []
    for i, label in enumerate(case["labels"]):
        out = set(case["excluded"][i]) - {label} if with_excluded else set()
        competing = [j for j in range(VOCAB_SIZE) if j not in out]
        order = sorted(competing, key=lambda j: (-logits[i, j], j))
        found.append(1 + order.index(label))
    return np.array(found)


def ranks(case, strategy, *, with_bias, with_excluded, block_rows):
    num = strategy.num_replicas_in_sync
    placement = Placement(vocab_size=VOCAB_SIZE, num_shards=num)

    def shard_of(x, shard_id):
        own = np.full([placement.allocated_rows, *x.shape[1:]], np.nan, np.float32)
        own[: placement.num_valid_rows(shard_id)] = x[shard_id::num]
        return tf.constant(own)

    @tf.function
    def step():
        def replica():
            shard_id, size = collectives.replica_id(), TOKENS // num
            own = {
                name: tf.constant(case[name][shard_id * size : (shard_id + 1) * size])
                for name in ("hidden", "labels", "excluded")
            }
            if not with_excluded:
                own["excluded"] = None
            return label_ranks(
                own.pop("hidden"),
                **own,
                rows=shard_of(case["rows"], shard_id),
                bias=shard_of(case["bias"], shard_id) if with_bias else None,
                num_valid_rows=placement.num_valid_rows(shard_id),
                block_rows=block_rows,
            )

        return strategy.run(replica)

    return np.concatenate([x.numpy() for x in strategy.experimental_local_results(step())])


@pytest.mark.parametrize(("num_devices", "block_rows"), [(1, None), (1, 17), (2, 9), (3, None), (4, 5)])
@pytest.mark.parametrize("kind", ["integers", "any"])
def test_against_sorting(mirrored, kind, num_devices, block_rows):
    """With ties, which the smaller id wins; with rows that do not compete, told twice or the label itself."""
    for seed, (with_bias, with_excluded) in enumerate([(True, True), (False, True), (True, False)]):
        given = case(kind=kind, seed=seed)
        settings = {"with_bias": with_bias, "with_excluded": with_excluded}
        found = ranks(given, mirrored(num_devices), block_rows=block_rows, **settings)
        np.testing.assert_array_equal(found, expected_ranks(given, **settings))


def test_equal_rows_tie(mirrored):
    """Where all rows are one, the rank is the id."""
    given = case(kind="integers")
    given["rows"][:] = given["rows"][0]
    found = ranks(given, mirrored(2), with_bias=False, with_excluded=False, block_rows=None)
    np.testing.assert_array_equal(found, given["labels"] + 1)


@pytest.mark.parametrize("num_devices", [1, 3])
def test_nan_is_last(mirrored, num_devices):
    """A row of NaN is behind all others; where all logits are NaN, the rank is the id."""
    given = case(kind="any")
    settings = {"with_bias": True, "with_excluded": False}
    row = given["labels"][0]
    expected = expected_ranks(
        given | {"bias": np.where(np.arange(VOCAB_SIZE) == row, -1e9, given["bias"])}, **settings
    )
    expected[1] = given["labels"][1] + 1
    assert expected[0] == VOCAB_SIZE
    given["bias"][row], given["hidden"][1] = np.nan, np.nan
    found = ranks(given, mirrored(num_devices), block_rows=17, **settings)
    np.testing.assert_array_equal(found, expected)
