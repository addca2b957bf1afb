"""All-to-all within one process; between processes, tests/processes shows it."""

import numpy as np
import pytest
import tensorflow as tf
from replicas import run_everywhere

from lmscale.distribution import collectives
from lmscale.distribution.all_to_all import all_to_all, all_to_all_on_hosts, gather_on_hosts, num_processes


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("num_replicas", [1, 2, 3])
def test_pieces_of_any_length_go_there_and_back(mirrored, num_replicas, compiled):
    # The piece of replica i for j: i + j rows, of two columns.
    rows = [
        [np.full([i + j, 3], 10 * i + j, np.float32) for j in range(num_replicas)]
        for i in range(num_replicas)
    ]
    # The same tensors on every replica, too.
    captured = [tf.constant([j]) for j in range(num_replicas)]
    strategy = mirrored(num_replicas)

    def exchange():
        own = [tf.constant(x) for x in rows[collectives.replica_id()]]
        way = all_to_all(tf.stack([tf.shape(x)[0] for x in own]), max_size=2 * num_replicas)
        there = way.send(own, [x[:, 0] for x in own])
        same = all_to_all(tf.ones([num_replicas], tf.int32), max_size=1).send(captured)
        return there, way.send_back(*there), same

    for j, (there, back, (same,)) in enumerate(run_everywhere(strategy, exchange, compiled=compiled)):
        for i in range(num_replicas):
            np.testing.assert_array_equal(there[0][i], rows[i][j])
            np.testing.assert_array_equal(there[1][i], rows[i][j][:, 0])
            np.testing.assert_array_equal(back[0][i], rows[j][i])
            np.testing.assert_array_equal(back[1][i], rows[j][i][:, 0])
        np.testing.assert_array_equal(np.concatenate(same), [j] * num_replicas)


def test_one_process_gathers_and_sends_to_itself(mirrored):
    x = np.arange(5)
    assert num_processes(mirrored(2)) == 1
    assert gather_on_hosts(mirrored(2), x)[0] is x
    assert all_to_all_on_hosts(mirrored(2), [x])[0] is x
