import re

import numpy as np
import pytest

from lmscale.tables.placement import Placement

SIZES = [(1, 1), (2, 3), (1, 8), (7, 7), (1003, 1), (1003, 2), (1003, 3), (1003, 8), (33_278, 4)]


@pytest.mark.parametrize(("vocab_size", "num_shards"), SIZES)
def test_every_id_has_a_place_of_its_own(vocab_size, num_shards):
    placement = Placement(vocab_size=vocab_size, num_shards=num_shards)
    ids = np.arange(vocab_size)
    shards, rows = placement.owner(ids), placement.local_row(ids)
    assert shards.min() >= 0
    assert shards.max() < num_shards
    np.testing.assert_array_equal(rows * num_shards + shards, ids)
    # The rows of a shard are 0 .. num_valid_rows - 1, and the scratch row is none of them.
    for shard_id in range(num_shards):
        own = np.sort(rows[shards == shard_id])
        np.testing.assert_array_equal(own, np.arange(placement.num_valid_rows(shard_id)))
        assert placement.num_valid_rows(shard_id) <= placement.scratch_row < placement.allocated_rows


@pytest.mark.parametrize(("vocab_size", "num_shards"), SIZES)
def test_shards_are_as_even_as_can_be(vocab_size, num_shards):
    placement = Placement(vocab_size=vocab_size, num_shards=num_shards)
    rows = [placement.num_valid_rows(shard_id) for shard_id in range(num_shards)]
    assert sum(rows) == vocab_size
    assert max(rows) - min(rows) <= 1
    assert placement.rows_per_shard == max(rows)
    assert placement.allocated_rows == max(rows) + 1


@pytest.mark.parametrize(("vocab_size", "num_shards"), [(0, 1), (5, 0), (-3, 2)])
def test_sizes_below_one_are_refused(vocab_size, num_shards):
    with pytest.raises(ValueError, match=re.escape(f"vocab_size={vocab_size}, num_shards={num_shards}")):
        Placement(vocab_size=vocab_size, num_shards=num_shards)
