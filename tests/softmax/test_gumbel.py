"""The noise of sampling: the generator's published answers, the distribution, and a function of its arguments alone."""

import numpy as np
import pytest
import tensorflow as tf

from lmscale.softmax.gumbel import gumbel, threefry


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
        ((0x243F6A88, 0x85A308D3), (0x13198A2E, 0x03707344), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_known_answers_of_threefry(counter, key, expected):
    """Those of the authors' library, Random123 (tests/kat_vectors)."""
    words = threefry(*((tf.constant(a, tf.uint32), tf.constant(b, tf.uint32)) for a, b in (key, counter)))
    assert tuple(int(word) for word in words) == expected


def test_distribution():
    """Mean, variance and a quantile in each tail; standard errors of 400,000 draws are a third of the bounds."""
    keys = [[7, text, position] for text in range(10) for position in range(4)]
    noise = gumbel(tf.constant(keys), tf.range(10_000)).numpy().astype(np.float64)
    assert np.isfinite(noise).all()
    assert noise.mean() == pytest.approx(np.euler_gamma, abs=0.007)
    assert noise.var() == pytest.approx(np.pi**2 / 6, abs=0.022)
    for probability in (0.001, 0.5, 0.999):
        quantile = -np.log(-np.log(probability))
        error = np.sqrt(probability * (1 - probability) / noise.size)
        assert np.mean(noise < quantile) == pytest.approx(probability, abs=3.5 * error)
    # Neighbouring seeds, texts, positions and ids have nothing in common.
    assert np.abs(np.corrcoef(noise) - np.eye(len(keys))).max() < 0.05
    assert abs(np.corrcoef(noise[:, :-1].ravel(), noise[:, 1:].ravel())[0, 1]) < 0.006


def test_depends_on_seed_text_position_and_id_alone():
    keys = tf.constant([[3, 1, 4], [3, 1, 5], [3, 2, 4], [4, 1, 4]])
    noise = gumbel(keys, tf.constant([9, 0, 70_000])).numpy()
    assert len(np.unique(noise)) == noise.size
    of_each = gumbel(keys[2:3], tf.constant([[70_000, 9]])).numpy()
    np.testing.assert_array_equal(of_each, noise[2:3, [2, 0]])
