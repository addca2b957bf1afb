import functools

import numpy as np
import pytest
import tensorflow as tf

from lmscale.softmax.samplers import InBatchSampler, LogUniformSampler, UniformSampler, UnigramSampler

VOCAB_SIZE = 1009
NUM_SAMPLED = 503
SEED = (20, 25)


def _counts(vocab_size, *, shuffled=True):
    """Counts like a text's: Zipf's law with zeros in its tail, ids in no particular order."""
    counts = (3000 / (np.arange(vocab_size) + 1.0) ** 1.1).astype(np.int64)
    return np.random.default_rng(7).permutation(counts) if shuffled else counts


SAMPLERS = {
    "uniform": UniformSampler,
    "log_uniform_independent": functools.partial(LogUniformSampler, replacement=True),
    "log_uniform_stratified": functools.partial(LogUniformSampler, replacement=False),
    "unigram_independent": functools.partial(UnigramSampler, replacement=True),
    "unigram_stratified": functools.partial(UnigramSampler, replacement=False),
}
INDEPENDENT = [name for name in SAMPLERS if not name.endswith("stratified")]
STRATIFIED = [name for name in SAMPLERS if name.endswith("stratified")]


def _make(name, vocab_size=VOCAB_SIZE, num_sampled=NUM_SAMPLED, **kwargs):
    return SAMPLERS[name](
        vocab_size=vocab_size, counts=_counts(vocab_size), num_sampled=num_sampled, **kwargs
    )


def _probabilities(name, vocab_size=VOCAB_SIZE):
    """[vocab_size] float64 by the formula in each sampler's docstring."""
    ids = np.arange(vocab_size)
    if name == "uniform":
        weights = np.ones(vocab_size)
    elif name.startswith("log_uniform"):
        weights = np.log((ids + 2) / (ids + 1))
    else:
        weights = np.maximum(_counts(vocab_size), 1) ** 0.75
    return weights / weights.sum()


def _expected_counts(name, vocab_size=VOCAB_SIZE, num_sampled=NUM_SAMPLED):
    """[vocab_size] float64: num_sampled * p, or min(1, scale * p) with the scale found by bisection."""
    probabilities = _probabilities(name, vocab_size)
    if name in INDEPENDENT:
        return num_sampled * probabilities
    low, high = 0.0, 1 / probabilities.min()
    for _ in range(200):
        middle = (low + high) / 2
        too_few = np.minimum(1, middle * probabilities).sum() < num_sampled
        low, high = (middle, high) if too_few else (low, middle)
    return np.minimum(1, high * probabilities)


def _draw_repeatedly(sampler, repeats, *, jit_compile=False):
    """[repeats, num_sampled]: one draw for each of as many seeds."""
    seeds = tf.stack([tf.range(repeats), tf.fill([repeats], 3)], axis=1)

    @tf.function(autograph=False, jit_compile=jit_compile)
    def draw():
        return tf.map_fn(lambda seed: sampler.sample(seed=seed), seeds)

    return draw().numpy()


@pytest.mark.parametrize("name", SAMPLERS)
def test_frequencies_of_a_million_draws(name):
    repeats = 2000
    draws = _draw_repeatedly(_make(name), repeats)
    observed = np.bincount(draws.ravel(), minlength=VOCAB_SIZE)
    expected = repeats * _expected_counts(name)
    # A class's count varies by no more than its mean, in either design. Of 1009 normal deviates none should
    # exceed 5 (probability 6e-4; the seeds are fixed).
    assert np.max(np.abs(observed - expected) / np.sqrt(expected)) < 5
    if name in INDEPENDENT:
        # Chi-square with 1008 degrees of freedom: mean 1008, variance 2016.
        chi_square = np.sum((observed - expected) ** 2 / expected)
        assert abs(chi_square - (VOCAB_SIZE - 1)) < 5 * np.sqrt(2 * (VOCAB_SIZE - 1))


@pytest.mark.parametrize("name", STRATIFIED)
def test_stratified_draws_repeat_little(name):
    draws = _draw_repeatedly(_make(name), 200)
    expected = _expected_counts(name)
    certain = expected >= 1 - 1e-12
    assert 10 < certain.sum() < NUM_SAMPLED
    times = np.stack([np.bincount(draw, minlength=VOCAB_SIZE) for draw in draws])
    assert np.all(times[:, certain] == 1)
    assert times.max() == 2
    # The strata are one draw long, so that the draws from any prefix of the line are its length, give or take
    # the one stratum that the prefix ends in.
    drawn = np.cumsum(times[:, ~certain], axis=1)
    assert np.max(np.abs(drawn - np.cumsum(expected[~certain]))) < 1 + 1e-6


@pytest.mark.parametrize("vocab_size", [1, 2, 7, VOCAB_SIZE])
@pytest.mark.parametrize("name", STRATIFIED)
def test_stratified_draw_of_everything(name, vocab_size):
    sampler = _make(name, vocab_size, vocab_size)
    for seed in ([0, 0], [1, 2]):
        np.testing.assert_array_equal(np.sort(sampler.sample(seed=tf.constant(seed))), np.arange(vocab_size))
    np.testing.assert_array_equal(sampler.log_expected_count(tf.range(vocab_size)), 0.0)


@pytest.mark.parametrize("num_sampled", [1, 2, NUM_SAMPLED, VOCAB_SIZE - 1, VOCAB_SIZE])
@pytest.mark.parametrize("name", SAMPLERS)
def test_log_expected_count_against_float64(name, num_sampled):
    sampler = _make(name, num_sampled=num_sampled)
    actual = sampler.log_expected_count(tf.range(VOCAB_SIZE), num_draws=num_sampled)
    # float32. The unigram line rounds lengths to 2**-40 of it, 1e-12; its shortest here is 1e-4.
    np.testing.assert_allclose(
        actual, np.log(_expected_counts(name, num_sampled=num_sampled)), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("shape", [[], [0], [3], [2, 5]])
@pytest.mark.parametrize("dtype", [tf.int32, tf.int64])
@pytest.mark.parametrize("name", SAMPLERS)
def test_log_expected_count_keeps_shape(name, dtype, shape):
    log_expected_count = _make(name).log_expected_count(tf.ones(shape, dtype))
    assert log_expected_count.shape == shape
    assert log_expected_count.dtype == tf.float32


@pytest.mark.parametrize("vocab_size", [2, 10_007, 10**7])
def test_log_uniform_expected_count_against_tensorflow(vocab_size):
    num_sampled = min(vocab_size, 64)
    sampler = LogUniformSampler(vocab_size=vocab_size, num_sampled=num_sampled)
    ids = np.unique(np.geomspace(1, vocab_size, 50).astype(np.int64)) - 1
    _, true_expected_count, _ = tf.random.log_uniform_candidate_sampler(
        ids[None], len(ids), num_sampled, unique=False, range_max=vocab_size
    )
    # TensorFlow takes the difference of two float32 logarithms, which cancels: 1e-7 * log(V) absolute.
    np.testing.assert_allclose(
        tf.exp(sampler.log_expected_count(ids)), true_expected_count[0], rtol=1e-5, atol=num_sampled * 2e-7
    )
    exact = np.log(num_sampled * np.log1p(1 / (ids + 1)) / np.log(vocab_size + 1))
    np.testing.assert_allclose(sampler.log_expected_count(ids), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", SAMPLERS)
def test_same_seed_same_draw(name):
    sampler, again = _make(name), _make(name)
    draw = sampler.sample(seed=tf.constant(SEED))
    assert draw.dtype == tf.int32
    assert draw.shape == [NUM_SAMPLED]
    np.testing.assert_array_equal(draw, again.sample(seed=tf.constant(SEED)))
    np.testing.assert_array_equal(draw, sampler.sample(seed=tf.constant(SEED), labels=tf.range(5)))
    for other in ([20, 26], [21, 25]):
        assert np.any(draw != sampler.sample(seed=tf.constant(other)))


@pytest.mark.parametrize("name", SAMPLERS)
def test_same_draw_on_every_replica(mirrored, name):
    strategy = mirrored(3)
    with strategy.scope():
        sampler = _make(name)

    @tf.function(autograph=False)
    def draw():
        return strategy.run(lambda: sampler.sample(seed=tf.constant(SEED)))

    for ids in strategy.experimental_local_results(draw()):
        np.testing.assert_array_equal(ids, _make(name).sample(seed=tf.constant(SEED)))


@pytest.mark.parametrize("name", SAMPLERS)
def test_candidates(name):
    sampler = _make(name)
    candidates = sampler.candidates(seed=tf.constant(SEED))
    np.testing.assert_array_equal(candidates.sampled_ids, sampler.sample(seed=tf.constant(SEED)))
    np.testing.assert_array_equal(
        candidates.sampled_log_expected_count, sampler.log_expected_count(candidates.sampled_ids)
    )


@pytest.mark.parametrize(("vocab_size", "num_sampled"), [(2, 1), (VOCAB_SIZE, NUM_SAMPLED), (10**6, 8191)])
@pytest.mark.parametrize("name", SAMPLERS)
def test_xla_draws_alike(name, vocab_size, num_sampled):
    sampler = _make(name, vocab_size, num_sampled)

    def draw(seed):
        candidates = sampler.candidates(seed=seed)
        return candidates.sampled_ids, candidates.sampled_log_expected_count

    plain_ids, plain_log_count = tf.function(draw, autograph=False)(tf.constant(SEED))
    xla_ids, xla_log_count = tf.function(draw, autograph=False, jit_compile=True)(tf.constant(SEED))
    if name.startswith("log_uniform"):
        # float32 arithmetic in another order moves a point across the border of two classes, rarely.
        assert np.max(np.abs(plain_ids - xla_ids)) <= 1
        assert np.mean(plain_ids != xla_ids) < 1e-3
        np.testing.assert_allclose(plain_log_count, xla_log_count, atol=1e-4)
    else:
        np.testing.assert_array_equal(plain_ids, xla_ids)
        np.testing.assert_array_equal(plain_log_count, xla_log_count)


@pytest.mark.parametrize("vocab_size", [1, 2, 3])
@pytest.mark.parametrize("name", SAMPLERS)
def test_tiny_vocabularies(name, vocab_size):
    draws = _draw_repeatedly(_make(name, vocab_size, 1), 200)
    np.testing.assert_array_equal(np.unique(draws), np.arange(vocab_size))


@pytest.mark.parametrize("replacement", [True, False])
@pytest.mark.parametrize("sampler_class", [LogUniformSampler, UnigramSampler])
def test_ten_million_classes(sampler_class, replacement):
    """Draws agree with the log-uniform distribution up to the last id; with unigram counts set to it, too."""
    vocab_size, num_sampled = 10**7, 10**6
    ids = np.arange(vocab_size)
    length = np.log1p(1 / (ids + 1))
    sampler = sampler_class(
        vocab_size=vocab_size,
        # Scaled so that the last id occurs 10 times, and no count is rounded up to 1.
        counts=length / length[-1] * 10 if sampler_class is UnigramSampler else None,
        num_sampled=num_sampled,
        replacement=replacement,
        **({"power": 1.0} if sampler_class is UnigramSampler else {}),
    )
    draw = sampler.sample(seed=tf.constant(SEED)).numpy()
    assert draw.min() == 0
    assert vocab_size - 1000 < draw.max() < vocab_size
    log_expected_count = sampler.log_expected_count(ids)
    expected = np.exp(np.float64(log_expected_count))
    assert abs(expected.sum() / num_sampled - 1) < 1e-6
    # Counts by 300 blocks of ids: normal deviates whose squares add up to 300, or less where stratified.
    blocks = np.unique(np.geomspace(100_000, vocab_size, 300).astype(np.int64))
    observed = np.histogram(draw, bins=blocks)[0]
    in_block = np.add.reduceat(expected[: blocks[-1]], blocks[:-1])
    z = (observed - in_block) / np.sqrt(in_block)
    assert np.max(np.abs(z)) < 4.5
    assert np.sum(z**2) < len(z) + 5 * np.sqrt(2 * len(z))
    # Every id of the upper half can be drawn, so that draws seldom meet: exp(u * log(V + 1)) in float32 would
    # reach one id in twenty, and its draws meet twenty times as often.
    upper = draw[draw >= vocab_size // 2]
    mean = expected[vocab_size // 2 :]
    distinct = np.sum(1 - np.exp(-mean))
    assert len(np.unique(upper)) > distinct - 5 * np.sqrt(distinct)


def _count_points(sampler, cell, first_id, last_id):
    """[ids] int64: how many of the 2**24 points of a cell belong to each id of first_id .. last_id."""
    ids_at = tf.function(sampler._ids_at, autograph=False)
    counts = np.zeros(last_id - first_id + 1, np.int64)
    for points in np.split(np.arange(2**24), 16):
        cells = tf.fill(points.shape, tf.constant(cell, tf.int64))
        ids = ids_at(cells, tf.constant(points / 2**24, tf.float32)).numpy()
        counts += np.bincount(ids - first_id, minlength=len(counts))
    return counts


def test_log_uniform_frequencies_within_a_cell():
    """Of all points of the last cell at V = 10**7, each id gets its share to 1e-3."""
    vocab_size = 10**7
    sampler = LogUniformSampler(vocab_size=vocab_size, num_sampled=64)
    start, end = np.exp(np.log(vocab_size + 1) * np.array([1 - 2.0**-16, 1]))
    first_id = int(start) - 1
    counts = _count_points(sampler, 2**16 - 1, first_id, vocab_size - 1)
    ids = np.arange(first_id + 1, vocab_size)  # the first id lies only partly in this cell
    expected = 2**24 * np.log1p(1 / (ids + 1)) / np.log(end / start)
    # Ids of a cell are told apart by offsets of up to 2459, whose float32 ulp is 2.4e-4.
    np.testing.assert_allclose(counts[1:], expected, rtol=1e-3)


def test_unigram_frequencies_within_a_cell():
    """Of all points of the first and of the last cell, each id gets exactly what its expected count says."""
    vocab_size = 10**6
    counts = np.where(np.arange(vocab_size) % 2, 10**6, 1)[::-1]
    sampler = UnigramSampler(vocab_size=vocab_size, counts=counts, num_sampled=64, power=1.0)
    expected = np.exp(np.float64(sampler.log_expected_count(tf.range(vocab_size)))) / 64 * 2**40
    # About 15 ids lie in a cell, the last of the first cell and the first of the last one only partly.
    first = _count_points(sampler, 0, 0, 19)
    last = _count_points(sampler, 2**16 - 1, vocab_size - 20, vocab_size - 1)
    assert np.all(expected[1:14:2] < 4)
    # Expected counts are float32, and tell the short lengths exactly.
    np.testing.assert_allclose(first[:14], expected[:14], rtol=1e-5)
    np.testing.assert_allclose(last[-14:], expected[-14:], rtol=1e-5)


@pytest.mark.parametrize("replacement", [True, False])
@pytest.mark.parametrize(
    "counts",
    [
        [10**18, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 10**18],
        [5, 5, 5, 5, 5, 5, 5],
        [0, 0, 0, 0, 0, 0, 0],
        [0, 10**9, 3, 10**9, 1, 10**9, 0],
    ],
)
def test_unigram_extreme_counts(counts, replacement):
    """Every class keeps a finite expected count, and frequent ones are neither lost nor repeated."""
    for num_sampled in (1, 3, 6, 7):
        sampler = UnigramSampler(
            vocab_size=7, counts=counts, num_sampled=num_sampled, power=1.0, replacement=replacement
        )
        expected = np.exp(np.float64(sampler.log_expected_count(tf.range(7))))
        assert np.all(expected > 0)
        np.testing.assert_allclose(expected.sum(), num_sampled, rtol=1e-6)
        draws = _draw_repeatedly(sampler, 50)
        observed = np.bincount(draws.ravel(), minlength=7)
        assert np.max(np.abs(observed - 50 * expected) / np.sqrt(50 * expected)) < 5
        if not replacement:
            assert expected.max() <= 1 + 1e-6
            assert np.all(observed[expected == 1] == 50)


def test_unigram_power():
    counts = _counts(VOCAB_SIZE)
    for power in (0.0, 0.4, 1.0):
        sampler = UnigramSampler(vocab_size=VOCAB_SIZE, counts=counts, num_sampled=9, power=power)
        weights = np.maximum(counts, 1) ** power
        np.testing.assert_allclose(
            sampler.log_expected_count(tf.range(VOCAB_SIZE)), np.log(9 * weights / weights.sum()), rtol=1e-5
        )


@pytest.mark.parametrize("name", SAMPLERS)
def test_estimates_the_sum_over_all_classes(name):
    """The corrected sum over the sampled classes is the full sum in the mean; stratified, it varies less."""
    sampler = _make(name)
    terms = np.exp(np.random.default_rng(3).normal(size=[VOCAB_SIZE]))
    weighted = terms / np.exp(sampler.log_expected_count(tf.range(VOCAB_SIZE)).numpy())
    estimates = weighted[_draw_repeatedly(sampler, 1000)].sum(axis=1)
    standard_error = estimates.std() / np.sqrt(len(estimates))
    assert abs(estimates.mean() - terms.sum()) < 4 * standard_error
    if name in STRATIFIED:
        independent = _make(name.replace("stratified", "independent"))
        weighted = terms / np.exp(independent.log_expected_count(tf.range(VOCAB_SIZE)).numpy())
        assert estimates.std() < 0.9 * weighted[_draw_repeatedly(independent, 1000)].sum(axis=1).std()


def test_in_batch():
    counts = _counts(VOCAB_SIZE)
    sampler = InBatchSampler(vocab_size=VOCAB_SIZE, counts=counts)
    assert sampler.samples_are_labels
    assert sampler.num_sampled is None
    assert not any(other.samples_are_labels for other in (UniformSampler, LogUniformSampler, UnigramSampler))
    labels = np.random.default_rng(1).integers(0, VOCAB_SIZE, [4, 9])
    candidates = sampler.candidates(seed=tf.constant(SEED), labels=tf.constant(labels))
    np.testing.assert_array_equal(candidates.sampled_ids, labels.ravel())
    assert candidates.sampled_ids.dtype == tf.int32
    smoothed = np.maximum(counts, 1)
    expected = np.log(36 * smoothed / smoothed.sum())
    np.testing.assert_allclose(candidates.sampled_log_expected_count, expected[labels.ravel()], rtol=1e-6)
    np.testing.assert_allclose(sampler.log_expected_count(labels, num_draws=36), expected[labels], rtol=1e-6)
    compiled = tf.function(
        lambda labels: sampler.candidates(seed=SEED, labels=labels).sampled_log_expected_count,
        jit_compile=True,
    )
    np.testing.assert_allclose(compiled(tf.constant(labels)), expected[labels.ravel()], rtol=1e-6)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("num_sampled", [0, -3, VOCAB_SIZE + 1, 2.5, "many"])
def test_num_sampled_errors(name, num_sampled):
    with pytest.raises(
        ValueError, match=rf"num_sampled={num_sampled!r}, vocab_size=1009. Set NUM_SAMPLED to at most"
    ):
        _make(name, num_sampled=num_sampled)


@pytest.mark.parametrize("name", SAMPLERS)
def test_num_draws_error(name):
    with pytest.raises(ValueError, match="num_draws=250, num_sampled=503"):
        _make(name).log_expected_count(tf.range(3), num_draws=250)


@pytest.mark.parametrize("sampler_class", [functools.partial(UnigramSampler, num_sampled=2), InBatchSampler])
@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (None, "counts.shape=None, vocab_size=3"),
        ([1, 2], r"counts.shape=\(2,\), vocab_size=3"),
        ([[1, 2, 3]], r"counts.shape=\(1, 3\), vocab_size=3"),
        ([1, -2, 3], r"counts\[1\]=-2.0"),
        ([1, 2, np.nan], r"counts\[2\]=nan"),
    ],
)
def test_counts_errors(sampler_class, counts, message):
    with pytest.raises(ValueError, match=message):
        sampler_class(vocab_size=3, counts=counts)


def test_in_batch_errors():
    sampler = InBatchSampler(vocab_size=3, counts=[1, 2, 3])
    with pytest.raises(ValueError, match="labels=None"):
        sampler.sample(seed=tf.constant(SEED))
    with pytest.raises(ValueError, match="num_draws=None"):
        sampler.log_expected_count(tf.range(3))
