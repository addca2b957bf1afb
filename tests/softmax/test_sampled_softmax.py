import numpy as np
import pytest
import tensorflow as tf

from lmscale.softmax import sampled as sampled_softmax
from lmscale.softmax.samplers import LogUniformSampler, UnigramSampler

VOCAB_SIZE = 101
EMBED_DIM = 13
TOKENS = 37
NUM_SAMPLED = 23

SOURCES = ("hidden", "true_rows", "sampled_rows", "true_bias", "sampled_bias")
# The order of the values and gradients compared below.
FIELDS = ("loss_nats", *(f"d_{source}" for source in SOURCES))


def _problem(*, tokens=TOKENS, num_sampled=NUM_SAMPLED, embed_dim=EMBED_DIM, scale=1.0, seed=0):
    """A batch in float64, with duplicate ids, accidental hits, and unequal weights of which one is 0."""
    rng = np.random.default_rng(seed)
    table = rng.normal(size=[VOCAB_SIZE, embed_dim])
    bias = rng.normal(size=[VOCAB_SIZE])
    log_expected_count = rng.normal(size=[VOCAB_SIZE]) - 1.0
    sampled_ids = rng.integers(0, VOCAB_SIZE, num_sampled)
    sampled_ids[-1] = sampled_ids[0]
    labels = rng.integers(0, VOCAB_SIZE, tokens)
    labels[::3] = rng.choice(sampled_ids, len(labels[::3]))
    loss_weights = rng.uniform(size=[tokens])
    loss_weights[-1] = 0.0
    return {
        "hidden": scale * rng.normal(size=[tokens, embed_dim]),
        "true_rows": table[labels],
        "sampled_rows": table[sampled_ids],
        "labels": labels,
        "sampled_ids": sampled_ids,
        "true_log_expected_count": log_expected_count[labels],
        "sampled_log_expected_count": log_expected_count[sampled_ids],
        "true_bias": bias[labels],
        "sampled_bias": bias[sampled_ids],
        "loss_weights": loss_weights,
    }


def _reference(problem, *, remove_accidental_hits=True):
    """{field: value} in float64, by the plain formula."""
    p = problem
    sampled = p["hidden"] @ p["sampled_rows"].T + p["sampled_bias"] - p["sampled_log_expected_count"]
    if remove_accidental_hits:
        sampled = np.where(p["labels"][:, None] == p["sampled_ids"], -np.inf, sampled)
    true = np.sum(p["hidden"] * p["true_rows"], axis=1) + p["true_bias"] - p["true_log_expected_count"]
    logits = np.concatenate([true[:, None], sampled], axis=1)
    maximum = logits.max(axis=1, keepdims=True)
    exp = np.exp(logits - maximum)
    total = exp.sum(axis=1, keepdims=True)
    d_logits = exp / total
    d_logits[:, 0] -= 1
    d_logits *= p["loss_weights"][:, None]
    return {
        "loss_nats": np.log(total[:, 0]) + maximum[:, 0] - true,
        "d_hidden": d_logits[:, 1:] @ p["sampled_rows"] + d_logits[:, :1] * p["true_rows"],
        "d_true_rows": d_logits[:, :1] * p["hidden"],
        "d_sampled_rows": d_logits[:, 1:].T @ p["hidden"],
        "d_true_bias": d_logits[:, 0],
        "d_sampled_bias": d_logits[:, 1:].sum(axis=0),
    }


def _tensors(problem, dtype=tf.float32):
    in_compute_dtype = ("hidden", "true_rows", "sampled_rows")
    integer = ("labels", "sampled_ids")
    return {
        key: tf.constant(
            value, tf.int32 if key in integer else dtype if key in in_compute_dtype else tf.float32
        )
        for key, value in problem.items()
    }


def _rounded(problem, dtype):
    """The problem with the values that a compute dtype leaves of it."""
    return {
        key: tf.cast(tf.cast(value, dtype), tf.float64).numpy()
        if key in ("hidden", "true_rows", "sampled_rows")
        else value
        for key, value in problem.items()
    }


def _value_and_gradients(tensors, **kwargs):
    result = sampled_softmax.sampled_softmax_value_and_gradients(**tensors, **kwargs)
    return {field: getattr(result, field) for field in FIELDS}


def _tape(tensors, **kwargs):
    tensors = dict(tensors)
    loss_weights = tensors.pop("loss_weights")
    sources = {f"d_{key}": tensors[key] for key in SOURCES}
    with tf.GradientTape() as tape:
        tape.watch(sources)
        loss = sampled_softmax.sampled_softmax_loss(**tensors, **kwargs)
        total = tf.reduce_sum(loss_weights * loss)
    return {"loss_nats": loss, **tape.gradient(total, sources)}


FORMS = pytest.mark.parametrize("form", [_value_and_gradients, _tape], ids=["value_and_gradients", "tape"])
HITS = pytest.mark.parametrize("remove_accidental_hits", [True, False], ids=["hits_removed", "hits_kept"])


def _assert_close(actual, expected, *, rtol, atol):
    for field in FIELDS:
        np.testing.assert_allclose(
            tf.cast(actual[field], tf.float64), expected[field], rtol=rtol, atol=atol, err_msg=field
        )


@FORMS
@HITS
@pytest.mark.parametrize(("tokens", "num_sampled"), [(TOKENS, NUM_SAMPLED), (1, 2), (5, 97)])
def test_against_float64(form, remove_accidental_hits, tokens, num_sampled):
    problem = _problem(tokens=tokens, num_sampled=num_sampled)
    actual = form(_tensors(problem), remove_accidental_hits=remove_accidental_hits)
    expected = _reference(problem, remove_accidental_hits=remove_accidental_hits)
    # float32 sums of at most 97 terms of size about 5.
    _assert_close(actual, expected, rtol=1e-5, atol=5e-6)


@FORMS
@HITS
def test_against_tensorflow(form, remove_accidental_hits):
    """Loss and dense gradients of tf.nn.sampled_softmax_loss, given the same candidates."""
    rng = np.random.default_rng(1)
    table = tf.constant(rng.normal(size=[VOCAB_SIZE, EMBED_DIM]), tf.float32)
    bias = tf.constant(rng.normal(size=[VOCAB_SIZE]), tf.float32)
    # Of a hit drawn twice, tf.nn.compute_accidental_hits reports one position only, so TensorFlow's op would
    # keep the other. Duplicates are compared where hits stay, and above, against float64, where they go.
    sampler = LogUniformSampler(
        vocab_size=VOCAB_SIZE, num_sampled=NUM_SAMPLED, replacement=not remove_accidental_hits
    )
    candidates = sampler.candidates(seed=tf.constant([3, 4]))
    ids = candidates.sampled_ids
    assert (len(np.unique(ids)) == NUM_SAMPLED) == remove_accidental_hits
    labels = tf.constant(np.concatenate([ids.numpy()[:9], rng.integers(0, VOCAB_SIZE, 20)]), tf.int32)
    hidden = tf.constant(rng.normal(size=[29, EMBED_DIM]), tf.float32)
    loss_weights = tf.constant(rng.uniform(size=[29]), tf.float32)
    true_log_expected_count = sampler.log_expected_count(labels)

    with tf.GradientTape() as tape:
        tape.watch([hidden, table, bias])
        expected_loss = tf.nn.sampled_softmax_loss(
            table,
            bias,
            labels[:, None],
            hidden,
            num_sampled=NUM_SAMPLED,
            num_classes=VOCAB_SIZE,
            sampled_values=(
                tf.cast(ids, tf.int64),
                tf.exp(true_log_expected_count)[:, None],
                tf.exp(candidates.sampled_log_expected_count),
            ),
            remove_accidental_hits=remove_accidental_hits,
        )
        total = tf.reduce_sum(loss_weights * expected_loss)
    expected = [tf.convert_to_tensor(g) for g in tape.gradient(total, [hidden, table, bias])]

    actual = form(
        {
            "hidden": hidden,
            "true_rows": tf.gather(table, labels),
            "sampled_rows": tf.gather(table, ids),
            "labels": labels,
            "sampled_ids": ids,
            "true_log_expected_count": true_log_expected_count,
            "sampled_log_expected_count": candidates.sampled_log_expected_count,
            "true_bias": tf.gather(bias, labels),
            "sampled_bias": tf.gather(bias, ids),
            "loss_weights": loss_weights,
        },
        remove_accidental_hits=remove_accidental_hits,
    )
    touched = tf.concat([labels, ids], axis=0)[:, None]
    d_rows = tf.concat([actual["d_true_rows"], actual["d_sampled_rows"]], axis=0)
    d_bias = tf.concat([actual["d_true_bias"], actual["d_sampled_bias"]], axis=0)
    # Both sides float32, summed in different orders.
    np.testing.assert_allclose(actual["loss_nats"], expected_loss, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(actual["d_hidden"], expected[0], atol=1e-5)
    np.testing.assert_allclose(tf.scatter_nd(touched, d_rows, table.shape), expected[1], atol=1e-5)
    np.testing.assert_allclose(tf.scatter_nd(touched, d_bias, bias.shape), expected[2], atol=1e-5)


@pytest.mark.parametrize("correction", [True, False], ids=["corrected", "uncorrected"])
@pytest.mark.parametrize("sampler_class", [LogUniformSampler, UnigramSampler])
def test_every_class_sampled_once_is_the_full_softmax(sampler_class, correction):
    rng = np.random.default_rng(2)
    counts = rng.integers(0, 1000, VOCAB_SIZE)
    sampler = sampler_class(vocab_size=VOCAB_SIZE, counts=counts, num_sampled=VOCAB_SIZE, replacement=False)
    ids = sampler.sample(seed=tf.constant([5, 6]))
    labels = tf.constant(rng.integers(0, VOCAB_SIZE, TOKENS), tf.int32)
    table = tf.constant(rng.normal(size=[VOCAB_SIZE, EMBED_DIM]), tf.float32)
    hidden = tf.constant(rng.normal(size=[TOKENS, EMBED_DIM]), tf.float32)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch([table, hidden])
        full = tf.nn.sparse_softmax_cross_entropy_with_logits(
            labels, tf.matmul(hidden, table, transpose_b=True)
        )
        sampled = sampled_softmax.sampled_softmax_loss(
            hidden,
            true_rows=tf.gather(table, labels),
            sampled_rows=tf.gather(table, ids),
            labels=labels,
            sampled_ids=ids,
            true_log_expected_count=sampler.log_expected_count(labels) if correction else tf.zeros([TOKENS]),
            sampled_log_expected_count=sampler.log_expected_count(ids)
            if correction
            else tf.zeros([VOCAB_SIZE]),
        )
    np.testing.assert_allclose(sampled, full, rtol=1e-5, atol=1e-5)
    for source in (hidden, table):
        np.testing.assert_allclose(
            tf.convert_to_tensor(tape.gradient(sampled, source)),
            tf.convert_to_tensor(tape.gradient(full, source)),
            atol=2e-5,
        )


@FORMS
@HITS
@pytest.mark.parametrize("dtype", [tf.bfloat16, tf.float16], ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("jit_compile", [False, True], ids=["plain", "xla"])
def test_narrow_dtypes_against_float64(form, remove_accidental_hits, dtype, jit_compile):
    problem = _problem(num_sampled=64, embed_dim=40)
    function = tf.function(
        lambda tensors: form(tensors, remove_accidental_hits=remove_accidental_hits),
        autograph=False,
        jit_compile=jit_compile,
    )
    actual = function(_tensors(problem, dtype))
    expected = _reference(_rounded(problem, dtype), remove_accidental_hits=remove_accidental_hits)
    # The logits are float32 sums of exact products, so the loss is as good as in float32.
    np.testing.assert_allclose(actual["loss_nats"], expected["loss_nats"], rtol=1e-5, atol=2e-5)
    # Gradients round probabilities, hidden and the sum to the compute dtype: 8 bits in bfloat16.
    _assert_close({**actual, "loss_nats": expected["loss_nats"]}, expected, rtol=2e-2, atol=2e-2)
    assert actual["loss_nats"].dtype == tf.float32
    assert actual["d_hidden"].dtype == dtype
    assert actual["d_sampled_rows"].dtype == (dtype if form is _tape else tf.float32)


@FORMS
def test_xla_against_float64(form):
    problem = _problem()
    actual = tf.function(form, autograph=False, jit_compile=True)(_tensors(problem))
    _assert_close(actual, _reference(problem), rtol=1e-5, atol=5e-6)


@FORMS
@HITS
@pytest.mark.parametrize("dtype", [tf.float32, tf.bfloat16], ids=lambda dtype: dtype.name)
def test_extreme_logits_stay_finite(form, remove_accidental_hits, dtype):
    problem = _rounded(_problem(scale=1e4), dtype)
    actual = form(_tensors(problem, dtype), remove_accidental_hits=remove_accidental_hits)
    expected = _reference(problem, remove_accidental_hits=remove_accidental_hits)
    assert np.max(expected["loss_nats"]) > 1e4
    # Logits of size 1e5 in float32: an ulp is 0.008, and sums of 13 products lose a few.
    np.testing.assert_allclose(actual["loss_nats"], expected["loss_nats"], rtol=1e-5, atol=0.1)
    for field in FIELDS:
        assert np.all(np.isfinite(tf.cast(actual[field], tf.float32))), field


@FORMS
@pytest.mark.parametrize("dtype", [tf.float32, tf.bfloat16], ids=lambda dtype: dtype.name)
def test_no_sampled_class_left(form, dtype):
    """A token whose every sampled id is its label has no competitor: loss 0, gradient 0."""
    problem = _problem(num_sampled=7, scale=1e4)
    problem["sampled_ids"][:] = 5
    problem["labels"][:] = 5
    actual = form(_tensors(problem, dtype))
    for field in FIELDS:
        np.testing.assert_array_equal(tf.cast(actual[field], tf.float32), 0.0, err_msg=field)


@FORMS
def test_absent_bias_is_a_bias_of_zeros(form):
    problem = _tensors(_problem())
    zeros = {**problem, "true_bias": tf.zeros([TOKENS]), "sampled_bias": tf.zeros([NUM_SAMPLED])}
    absent = {key: value for key, value in problem.items() if key not in ("true_bias", "sampled_bias")}
    expected = _value_and_gradients(zeros)
    if form is _value_and_gradients:
        actual = _value_and_gradients(absent)
    else:
        loss_weights = absent.pop("loss_weights")
        with tf.GradientTape() as tape:
            tape.watch(absent["hidden"])
            loss = sampled_softmax.sampled_softmax_loss(**absent)
            total = tf.reduce_sum(loss * loss_weights)
        actual = {"loss_nats": loss, "d_hidden": tape.gradient(total, absent["hidden"])}
    for field, value in actual.items():
        np.testing.assert_array_equal(value, expected[field], err_msg=field)


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "message"),
    [
        ("true_rows", [37, 14], "float32", r"true_rows must have shape \(37, 13\).*\(37, 14\)"),
        ("sampled_ids", [22], "int32", r"sampled_ids must have shape \(23,\).*\(22,\)"),
        ("labels", [37, 1], "int32", r"labels must have shape \(37,\).*\(37, 1\)"),
        ("sampled_bias", [37], "float32", r"sampled_bias must have shape \(23,\).*\(37,\)"),
        ("loss_weights", [1], "float32", r"loss_weights must have shape \(37,\).*\(1,\)"),
        ("hidden", [5, 7, 13], "float32", r"hidden=\(5, 7, 13\).*Flatten"),
        ("hidden", [37, 13], "bfloat16", "hidden=bfloat16, true_rows=float32"),
        ("hidden", [37, 13], "float64", "hidden=float64"),
    ],
)
def test_errors(name, shape, dtype, message):
    with pytest.raises(ValueError, match=message):
        _value_and_gradients({**_tensors(_problem()), name: tf.zeros(shape, dtype)})
