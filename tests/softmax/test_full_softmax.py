"""The streamed full softmax against float64 numpy and TensorFlow's own op, on one and on several devices."""

import gc
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from lmscale.distribution import collectives
from lmscale.softmax import exact, streamed
from lmscale.tables.placement import Placement

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
TOKENS, EMBED_DIM, VOCAB_SIZE = 37, 13, 10_007


def make_case(*, vocab_size=VOCAB_SIZE, tokens=TOKENS, with_bias=True, scale=1.0, seed=0):
    """hidden, rows, bias or None, labels, loss_weights as float32 (int32) arrays."""
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(tokens, EMBED_DIM)).astype(np.float32)
    rows = (scale * rng.normal(size=(vocab_size, EMBED_DIM))).astype(np.float32)
    bias = rng.normal(size=vocab_size).astype(np.float32) if with_bias else None
    labels = rng.integers(vocab_size, size=tokens).astype(np.int32)
    labels[1] = labels[0]  # Two tokens add to the gradient of one row.
    labels[-1] = vocab_size - 1
    loss_weights = rng.uniform(size=tokens).astype(np.float32)
    return {"hidden": hidden, "rows": rows, "bias": bias, "labels": labels, "loss_weights": loss_weights}


def reference(case):
    """loss, d_hidden, d_rows, d_bias in float64, all logits at once."""
    hidden, rows = case["hidden"].astype(np.float64), case["rows"].astype(np.float64)
    logits = hidden @ rows.T + (0 if case["bias"] is None else case["bias"].astype(np.float64))
    largest = logits.max(axis=1, keepdims=True)
    logsumexp = largest + np.log(np.exp(logits - largest).sum(axis=1, keepdims=True))
    tokens = np.arange(len(hidden))
    loss = logsumexp[:, 0] - logits[tokens, case["labels"]]
    d_logits = np.exp(logits - logsumexp)
    d_logits[tokens, case["labels"]] -= 1
    d_logits *= case["loss_weights"][:, None]
    d_bias = None if case["bias"] is None else d_logits.sum(axis=0)
    return loss, d_logits @ rows, d_logits.T @ hidden, d_bias


def run_full_softmax(case, *, rows=None, bias=None, num_valid_rows=None, **options):
    """FullSoftmaxGradients of a case on one device; rows and bias replace the case's, with padding for example."""
    return exact.full_softmax_value_and_gradients(
        tf.constant(case["hidden"]),
        labels=tf.constant(case["labels"]),
        loss_weights=tf.constant(case["loss_weights"]),
        rows=tf.constant(case["rows"]) if rows is None else rows,
        bias=None if case["bias"] is None else tf.constant(case["bias"] if bias is None else bias),
        num_valid_rows=len(case["rows"]) if num_valid_rows is None else num_valid_rows,
        **options,
    )


def assert_equal_to_reference(result, case, *, rtol=2e-5, atol=2e-6):
    """float32 sums of up to VOCAB_SIZE terms, products of EMBED_DIM: a few units in the 6th digit."""
    loss, d_hidden, d_rows, d_bias = reference(case)
    np.testing.assert_allclose(result.loss_nats, loss, rtol=rtol, atol=atol)
    np.testing.assert_allclose(result.d_hidden, d_hidden, rtol=rtol, atol=atol)
    np.testing.assert_allclose(result.d_rows[: len(d_rows)], d_rows, rtol=rtol, atol=atol)
    if d_bias is None:
        assert result.d_bias is None
    else:
        np.testing.assert_allclose(result.d_bias[: len(d_bias)], d_bias, rtol=rtol, atol=atol)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("block_rows", [None, 1000, 20_000])
def test_against_plain_float64(block_rows, with_bias):
    """Blocks chosen by memory, blocks that divide nothing, one block larger than the vocabulary."""
    case = make_case(with_bias=with_bias)
    assert_equal_to_reference(run_full_softmax(case, block_rows=block_rows), case)


def test_against_the_op_of_tensorflow():
    case = make_case()
    variables = [tf.Variable(case[name]) for name in ("hidden", "rows", "bias")]
    with tf.GradientTape() as tape:
        logits = tf.matmul(variables[0], variables[1], transpose_b=True) + variables[2]
        loss = tf.nn.sparse_softmax_cross_entropy_with_logits(case["labels"], logits)
        weighted = tf.reduce_sum(case["loss_weights"] * loss)
    result = run_full_softmax(case, block_rows=999)
    np.testing.assert_allclose(result.loss_nats, loss, rtol=1e-5)
    gradients = (result.d_hidden, result.d_rows, result.d_bias)
    for ours, theirs in zip(gradients, tape.gradient(weighted, variables), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-6)


def test_the_loss_alone_equals_the_loss_with_gradients():
    """But for the rounding of the products, which the two leave to different libraries."""
    case = make_case(vocab_size=101)
    loss = exact.full_softmax_loss(
        tf.constant(case["hidden"]),
        labels=tf.constant(case["labels"], tf.int64),
        rows=tf.Variable(case["rows"]),
        bias=tf.Variable(case["bias"]),
        num_valid_rows=101,
        block_rows=7,
    )
    np.testing.assert_allclose(loss, run_full_softmax(case, block_rows=7).loss_nats, rtol=1e-6, atol=1e-6)


def test_vocabulary_of_one_word():
    case = make_case(vocab_size=1)
    result = run_full_softmax(case)
    for value in result:
        np.testing.assert_allclose(value, np.zeros(value.shape), atol=2e-6)


@pytest.mark.parametrize("offset", [-3e4, 3e4])
def test_extreme_logits(offset):
    """exp of any of these over- or underflows; float32 logits near 3e4 are 0.002 apart."""
    case = make_case(vocab_size=301, scale=300.0)
    case["bias"] += np.float32(offset)
    case["bias"][[5, 250]] += np.float32(8000)  # The maximum rises in the first block and in the last.
    assert_equal_to_reference(run_full_softmax(case, block_rows=100), case, rtol=1e-5, atol=0.02)


def test_padding_never_counts():
    """Whatever the rows behind the valid ones hold, also where a block has none but them."""
    case = make_case(vocab_size=101)
    garbage = np.full((30, EMBED_DIM), np.nan, np.float32)
    garbage[::2] = np.inf
    result = run_full_softmax(
        case,
        rows=tf.Variable(np.concatenate([case["rows"], garbage])),
        bias=np.concatenate([case["bias"], garbage[:, 0]]),
        num_valid_rows=tf.constant(101),
        block_rows=10,
    )
    assert_equal_to_reference(result, case)
    np.testing.assert_array_equal(result.d_rows[101:], np.zeros([30, EMBED_DIM]))
    np.testing.assert_array_equal(result.d_bias[101:], np.zeros([30]))


def test_a_shard_without_valid_rows():
    rows = tf.fill([2, EMBED_DIM], float("nan"))
    logsumexp = streamed.shard_logsumexp(
        tf.ones([3, EMBED_DIM]), reference=tf.zeros([3]), rows=rows, bias=None, num_valid_rows=0, block_rows=1
    )
    np.testing.assert_array_equal(logsumexp, np.full([3], -np.inf))


@pytest.mark.parametrize("in_graph", [False, True])
@pytest.mark.parametrize("offset", [-100, -60, 0, 60, 80, 100])
def test_any_reference_gives_the_same_logsumexp(offset, in_graph):
    """At 80 above, half of the sum is of terms that underflow one by one, though the sum itself does not."""
    case = make_case(scale=0.01)
    case["bias"] = np.zeros(VOCAB_SIZE, np.float32)
    case["bias"][5] = np.log(VOCAB_SIZE)
    logits = case["hidden"].astype(np.float64) @ case["rows"].T.astype(np.float64) + case["bias"]
    expected = np.log(np.exp(logits).sum(axis=1))

    def logsumexp(reference):
        return streamed.shard_logsumexp(
            tf.constant(case["hidden"]),
            reference=reference,
            rows=tf.constant(case["rows"]),
            bias=tf.constant(case["bias"]),
            num_valid_rows=VOCAB_SIZE,
            block_rows=1000,
        )

    if in_graph:
        logsumexp = tf.function(logsumexp, autograph=False)
    # Near 10 nats; half of the sum would be 0.7. The reference is rounded near 100, to 4e-6.
    np.testing.assert_allclose(logsumexp(tf.constant(expected + offset, tf.float32)), expected, atol=2e-5)


def test_a_label_outside_the_vocabulary_gives_nan():
    case = make_case(vocab_size=101)
    expected = reference(case)[0]
    case["labels"][[3, 7]] = [-1, 101]
    padded = tf.constant(np.pad(case["rows"], ((0, 2), (0, 0))))
    loss = run_full_softmax(case, rows=padded, bias=np.pad(case["bias"], (0, 2))).loss_nats.numpy()
    assert np.isnan(loss[[3, 7]]).all()
    np.testing.assert_allclose(np.delete(loss, [3, 7]), np.delete(expected, [3, 7]), rtol=2e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_products_have_float32_logits(dtype):
    """Equal to float32 accuracy to the exact loss of the rounded inputs: logits are not rounded."""
    case = make_case(with_bias=False)
    rounded = case | {
        name: tf.cast(tf.cast(case[name], dtype), tf.float32).numpy() for name in ("hidden", "rows")
    }
    result = run_full_softmax(case, block_rows=1000, compute_dtype=dtype)
    loss, d_hidden, d_rows, _ = reference(rounded)
    np.testing.assert_allclose(result.loss_nats, loss, rtol=2e-5)
    # d_logits is rounded, to 8 bits in bfloat16, for the second product.
    assert result.d_hidden.dtype == result.d_rows.dtype == tf.float32
    np.testing.assert_allclose(result.d_hidden, d_hidden, rtol=2**-7, atol=2**-7)
    np.testing.assert_allclose(result.d_rows, d_rows, rtol=2**-7, atol=2**-9)


@pytest.mark.parametrize("with_gradients", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16", "float16"])
def test_compiles_with_xla(compute_dtype, with_bias, with_gradients):
    case = make_case(with_bias=with_bias)
    function, weights = exact.full_softmax_loss, {}
    if with_gradients:
        function = exact.full_softmax_value_and_gradients
        weights = {"loss_weights": tf.constant(case["loss_weights"])}

    def run(hidden, rows, bias):
        return function(
            hidden,
            labels=tf.constant(case["labels"]),
            rows=rows,
            bias=bias,
            num_valid_rows=VOCAB_SIZE,
            block_rows=1000,
            compute_dtype=compute_dtype,
            **weights,
        )

    arguments = [
        None if case[name] is None else tf.constant(case[name]) for name in ("hidden", "rows", "bias")
    ]
    compiled, plain = tf.function(run, jit_compile=True)(*arguments), run(*arguments)
    if not with_gradients:
        compiled, plain = [compiled], [plain]
    (loss, *gradients), (plain_loss, *plain_gradients) = compiled, plain
    np.testing.assert_allclose(loss, plain_loss, rtol=2e-5)
    # d_logits may be rounded to the other bfloat16 (8 bits).
    rtol, atol = (2e-5, 2e-6) if compute_dtype == "float32" else (2**-7, 2**-9)
    for ours, theirs in zip(gradients, plain_gradients, strict=True):
        if theirs is not None:
            np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=atol)


def test_default_block_rows():
    for tokens, shard_rows in [(1, 1), (37, 100), (4096, 793_471), (70_000, 793_471), (10**7, 5000)]:
        block_rows = streamed.default_block_rows(tokens=tokens, embed_dim=256, shard_rows=shard_rows)
        assert 1 <= block_rows <= shard_rows
        assert block_rows == shard_rows or block_rows % 128 == 0
        assert block_rows <= 128 or (tokens + 256) * block_rows * 4 <= 64 * 2**20


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"hidden": [2, 3, 4]}, r"\[tokens, embed_dim\]. Received: \(2, 3, 4\)"),
        ({"labels": [6]}, r"labels .*shape \[5\].*Received: \(6,\)"),
        ({"rows": [9, 3]}, r"\[shard_rows, 4\].*Received: \(9, 3\)"),
        ({"rows": [0, 4]}, r"at least 1. Received: \(0, 4\)"),
        ({"bias": [8]}, r"bias .*shape \[9\].*Received: \(8,\)"),
    ],
)
def test_shapes_that_disagree_are_errors(shapes, message):
    shapes = {"hidden": [5, 4], "labels": [5], "rows": [9, 4], "bias": [9]} | shapes
    arguments = {
        name: tf.zeros(shape, tf.int32 if name == "labels" else tf.float32) for name, shape in shapes.items()
    }
    with pytest.raises(ValueError, match=message):
        exact.full_softmax_loss(arguments.pop("hidden"), num_valid_rows=9, **arguments)


def test_block_rows_must_be_positive():
    with pytest.raises(ValueError, match=r"block_rows must be at least 1. Received: 0"):
        run_full_softmax(make_case(vocab_size=9), block_rows=0)


def padded_case(*, padding, **options):
    """A case some of whose tokens have the weight 0, and anything for hidden and label."""
    case = make_case(**options)
    case["loss_weights"][padding] = 0
    case["hidden"][padding] *= 100
    return case


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(
    ("block_tokens", "num_computed"), [(1, 14), (5, 15), (14, 14), (36, 36), (1000, TOKENS)]
)
def test_blocks_of_padding_are_left_out(block_tokens, num_computed, with_bias):
    """What remains is the same; of 37 tokens 14 have a weight."""
    padding = np.random.default_rng(1).permutation(TOKENS)[14:]
    case = padded_case(padding=padding, with_bias=with_bias)
    result = run_full_softmax(case, block_tokens=block_tokens, block_rows=999)
    counts = case["loss_weights"] > 0
    loss, d_hidden, d_rows, d_bias = reference(case)
    np.testing.assert_allclose(result.loss_nats.numpy()[counts], loss[counts], rtol=2e-5, atol=2e-6)
    # As stated: losses of tokens in blocks that are left out are 0, and those of others what they are.
    assert np.count_nonzero(result.loss_nats) == num_computed
    np.testing.assert_allclose(result.d_hidden, d_hidden, rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(result.d_rows, d_rows, rtol=2e-5, atol=2e-6)
    if with_bias:
        np.testing.assert_allclose(result.d_bias, d_bias, rtol=2e-5, atol=2e-6)
    else:
        assert result.d_bias is None


def test_nothing_but_padding():
    result = run_full_softmax(padded_case(padding=slice(None)), block_tokens=5)
    for value in result:
        np.testing.assert_array_equal(value, np.zeros(value.shape))


@pytest.mark.parametrize("block_tokens", [None, 5])
@pytest.mark.parametrize("vocab_size", [VOCAB_SIZE, 2])
@pytest.mark.parametrize("num_shards", [1, 2, 3])
def test_independent_of_the_number_of_devices(mirrored, num_shards, vocab_size, block_tokens):
    """The same loss and gradients from every split, uneven ones and one with a shard without rows included."""
    case = make_case(vocab_size=vocab_size, tokens=42)
    placement = Placement(vocab_size=vocab_size, num_shards=num_shards)
    strategy = mirrored(num_shards)
    tokens = 42 // num_shards

    def shard_of(x, shard_id):
        own = np.full([placement.allocated_rows, *x.shape[1:]], np.nan, np.float32)
        own[: placement.num_valid_rows(shard_id)] = x[shard_id::num_shards]
        return tf.constant(own)

    @tf.function
    def step():
        def replica_step():
            shard_id = collectives.replica_id()
            own = {
                name: tf.constant(case[name][shard_id * tokens : (shard_id + 1) * tokens])
                for name in ("hidden", "labels", "loss_weights")
            }
            shard = {
                "rows": shard_of(case["rows"], shard_id),
                "bias": shard_of(case["bias"], shard_id),
                "num_valid_rows": placement.num_valid_rows(shard_id),
                "block_rows": 1000,
                "block_tokens": block_tokens,
            }
            result = exact.full_softmax_value_and_gradients(own.pop("hidden"), **own, **shard)
            return tuple(result)

        return strategy.run(replica_step)

    def of_replicas(x):
        return [value.numpy() for value in strategy.experimental_local_results(x)]

    def in_id_order(shards):
        whole = np.full([vocab_size, *shards[0].shape[1:]], np.nan)
        for shard_id, shard in enumerate(shards):
            whole[shard_id::num_shards] = shard[: placement.num_valid_rows(shard_id)]
        return whole

    loss, d_hidden, d_rows, d_bias = map(of_replicas, step())
    whole = exact.FullSoftmaxGradients(
        np.concatenate(loss), np.concatenate(d_hidden), in_id_order(d_rows), in_id_order(d_bias)
    )
    assert_equal_to_reference(whole, case)


def test_a_later_table_of_the_same_shape():
    """A program may build one model after another: nothing is kept of variables that are gone."""
    case = make_case(vocab_size=VOCAB_SIZE, tokens=42)
    for _ in range(2):
        rows, bias = tf.Variable(case["rows"]), tf.Variable(case["bias"])

        @tf.function
        def step(rows=rows, bias=bias):
            return exact.full_softmax_value_and_gradients(
                tf.constant(case["hidden"]),
                labels=tf.constant(case["labels"]),
                loss_weights=tf.constant(case["loss_weights"]),
                rows=rows,
                bias=bias,
                num_valid_rows=VOCAB_SIZE,
            )

        assert_equal_to_reference(step(), case)
        del rows, bias, step
        gc.collect()


def measure_peak_memory(*arguments):
    """The JSON that the script prints, run in a process of its own."""
    script = pathlib.Path(__file__).with_name("full_softmax_peak_memory.py")
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(REPOSITORY),
        "MALLOC_MMAP_THRESHOLD_": str(2**20),  # What is in use, not what the allocator keeps of it.
    }
    completed = subprocess.run(
        [sys.executable, str(script), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr
    print(completed.stdout)
    return json.loads(completed.stdout)


def test_peak_memory_of_evaluation():
    """793,470 rows of 256, 4,096 tokens: the logits would be 12,400 MiB, the table is 775 MiB."""
    measured = measure_peak_memory("evaluation", "793470", "4096")
    assert measured["worst_error_nats"] < 1e-4
    assert measured["peak_above_table_mib"] <= 256


def test_peak_memory_of_training():
    """A gradient of the size of the table, 195 MiB, twice while its blocks are joined, and three blocks of 64 MiB."""
    measured = measure_peak_memory("training", "200001", "1024")
    assert measured["peak_above_table_mib"] <= 2 * measured["table_mib"] + 3 * 64
