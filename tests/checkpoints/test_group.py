"""A checkpoint restored by several processes: threads here, with the agreement of real ones, and no TensorFlow's.

Their parameters are sharded as a table's: whoever reads a row, it is written where all look for it, when all are there.
"""

import itertools
import threading

import numpy as np
import pytest
import tensorflow as tf
from array_parameters import array_parameters, callback_parameter
from small_groups import DEADLINE_SECS, Members, at_once

from lmscale.checkpoints.directory import Checkpoints, UnavailableError

BLOCK_MIB = 2e-4  # 17 rows of three float32.
SIZES = (1, 2, 3)


def arrays_of(value):
    rng = np.random.default_rng(value)
    return {
        "table": rng.normal(size=(150, 3)).astype(np.float32),  # Nine blocks.
        "layer": rng.normal(size=(40, 3)).astype(np.float32),  # Three.
        "table/second": rng.normal(size=(100, 3)).astype(np.float32),  # Six, the last of them short.
        "small": rng.normal(size=(2, 3)).astype(np.float32),
        "step": np.array(value),
    }


def save(directory, step, value):
    Checkpoints(directory, block_mib=BLOCK_MIB).save(step, array_parameters(arrays_of(value)), metadata={})


class Restores:
    """What each process of a group restores, and what it reads for it.

    Attributes:
      sharded: {path: array}, of all processes together.
      copies: [{path: array}], of what is not sharded, by rank.
      read: [[(name, slice)]] of the blocks that each has read, by rank.
    """

    def __init__(self, directory, size, monkeypatch, *, before_read=None):
        """`before_read`: function of (rank, [name], [slice]), called in the process's thread."""
        self._directory = directory
        self._size = size
        self._together = threading.Barrier(size)
        empty = {path: np.full_like(array, -1) for path, array in arrays_of(0).items()}
        self.sharded = {path: array for path, array in empty.items() if path.startswith("table")}
        self.copies = [
            {path: array.copy() for path, array in empty.items() if path not in self.sharded}
            for _ in range(size)
        ]
        self.read = [[] for _ in range(size)]
        self._of_thread = threading.local()
        restore = tf.raw_ops.RestoreV2

        def noted(*, prefix, tensor_names, shape_and_slices, **kwargs):
            rank = self._of_thread.rank
            if before_read is not None:
                before_read(rank, prefix, shape_and_slices)
            self.read[rank] += zip(tensor_names, shape_and_slices, strict=True)
            return restore(
                prefix=prefix, tensor_names=tensor_names, shape_and_slices=shape_and_slices, **kwargs
            )

        monkeypatch.setattr(tf.raw_ops, "RestoreV2", noted)

    def run(self, **kwargs):
        """What `Checkpoints.restore` returns or raises, by rank."""
        members = Members(self._size)
        try:
            return at_once(
                [lambda rank=rank: self._restore(members.groups[rank], kwargs) for rank in range(self._size)]
            )
        finally:
            members.close()

    def _restore(self, group, kwargs):
        self._of_thread.rank = group.rank
        checkpoints = Checkpoints(self._directory, block_mib=BLOCK_MIB, group=group)
        tables = {path: self._sharded(path, array) for path, array in self.sharded.items()}
        copies = {p.path: p for p in array_parameters(self.copies[group.rank])}
        return checkpoints.restore([(tables | copies)[path] for path in arrays_of(0)], **kwargs)

    def _sharded(self, path, array):
        def write(start, rows):
            self._together.wait(DEADLINE_SECS / 4)  # As a collective.
            array[start : start + len(rows)] = rows

        return callback_parameter(path, array.shape, array.dtype, read=None, write=write, sharded=True)

    def check(self, value):
        for copies in self.copies:
            for path, array in arrays_of(value).items():
                np.testing.assert_array_equal((self.sharded | copies)[path], array, err_msg=path)


@pytest.mark.parametrize("size", SIZES)
def test_each_block_of_a_sharded_tensor_is_read_by_one_process(tmp_path, monkeypatch, size):
    save(tmp_path, 10, value=1)
    restores = Restores(tmp_path, size, monkeypatch)
    assert [metadata["step"] for metadata in restores.run()] == [10] * size
    restores.check(1)
    for path, num_blocks in {"table": 9, "table/second": 6}.items():
        read = [[block for name, block in blocks if name == path] for blocks in restores.read]
        together = list(itertools.chain(*read))
        assert len(set(together)) == len(together) == num_blocks
        assert {len(blocks) for blocks in read} <= {num_blocks // size, -(-num_blocks // size)}
    # Of the rest each has all, once.
    for blocks in restores.read:
        assert [name for name, _ in blocks if not name.startswith("table")] == [
            *["layer"] * 3,
            "small",
            "step",
        ]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("when", [0, 1])
def test_damage_that_one_process_reads_is_known_to_all(tmp_path, monkeypatch, caplog, size, when):
    """In its first block or a later one. The checksums were right, so it comes up between exchanges of the others."""
    save(tmp_path, 10, value=1)
    save(tmp_path, 20, value=2)
    seen = []

    def before_read(rank, prefix, slices):
        if rank == size - 1 and "step_00000020" in prefix:
            seen.append(slices)
            if len(seen) > when:
                raise tf.errors.DataLossError(None, None, "a sector is gone")

    restores = Restores(tmp_path, size, monkeypatch, before_read=before_read)
    assert [metadata["step"] for metadata in restores.run()] == [10] * size
    restores.check(1)
    assert len(seen) == when + 1
    (record,) = caplog.records
    assert "DAMAGED CHECKPOINT: step 20" in record.message
    assert "a sector is gone" in record.message
    errors = restores.run(step=20)
    assert [type(error) for error in errors] == [UnavailableError] * size
    assert all("is damaged: a sector is gone" in str(error) for error in errors)
