"""What messages between processes take, against arithmetic by hand."""

import numpy as np
import pytest

from lmscale.planning import messages
from lmscale.tables.placement import Placement


@pytest.mark.parametrize(
    ("found", "piece_bytes"),
    [
        (messages.of_all_to_all(100, num_devices=4), 300),
        (messages.of_all_gather(100, num_devices=4), 100),
        (messages.of_all_reduce(100, num_devices=4), 25),
    ],
)
def test_bytes_on_their_way(found, piece_bytes):
    assert found.piece_bytes == piece_bytes
    # There and back, copied twice into what stays and once into what does not.
    assert found.kept_bytes == 4 * piece_bytes
    assert found.all_bytes == 6 * piece_bytes


def test_one_device_sends_nothing():
    for found in (
        messages.of_all_to_all(100, num_devices=1),
        messages.of_all_gather(100, num_devices=1),
        messages.of_all_reduce(100, num_devices=1),
    ):
        assert found.kept_bytes == found.all_bytes == 0


def test_the_longest_piece_counts_each_id_once():
    placement = Placement(vocab_size=10, num_shards=2)
    ids = np.array([[0, 0, 2, 1], [1, 3, 5, 7]])
    # Device 1 asks shard 1 for 1, 3, 5, 7 and 9.
    assert messages.longest_piece(ids, np.array([9, 0]), placement) == 5


def test_pieces_are_padded_to_one_of_64_sizes():
    assert messages.padded_rows(5, max_size=64) == 5
    assert messages.padded_rows(5, max_size=256) == 8
    assert messages.padded_rows(0, max_size=256) == 0
