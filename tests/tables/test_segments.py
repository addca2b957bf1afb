import numpy as np
import pytest
import tensorflow as tf

from lmscale.tables.segments import segment_sum


@pytest.mark.parametrize("shape", [[1, 3], [257, 5], [1000], [0, 4]])
@pytest.mark.parametrize("in_graph", [True, False])
def test_against_numpy(shape, in_graph):
    rng = np.random.default_rng(0)
    values = rng.normal(size=shape).astype(np.float32)
    # Some segments have many entries; of those asked for, the last is empty.
    segments = np.minimum(rng.geometric(0.02, shape[0]) - 1, max(shape[0] - 1, 0)).astype(np.int32)
    number = min(shape[0], int(segments.max(initial=-1)) + 2)
    expected = np.zeros([number, *shape[1:]])
    np.add.at(expected, segments, values)
    function = tf.function(segment_sum, autograph=False) if in_graph else segment_sum
    found = function(tf.constant(values), tf.constant(segments), tf.constant(number))
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
