"""The tensors of one TensorFlow V2 checkpoint, in blocks of rows, and the checksums of its files.

A tensor is stored by its logical shape, whatever number of devices held it. It passes through host
memory a block of rows at a time, so it may be larger than the memory of a device, or of the host.
"""

import concurrent.futures
import dataclasses
import hashlib
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from lmscale.distribution.process_group import ProcessGroup
from lmscale.parameters.tree import Parameter
from lmscale.paths import naming
from lmscale.storage import is_remote

PREFIX = "tensors"
_PARTS = "parts"
# TensorFlow writes slices of any type, but reads back slices of these only. Tensors of other types
# (uint32 seeds, float16) are written in one piece.
_SLICED_DTYPES = frozenset(
    {"bool", "int8", "uint8", "int16", "int32", "int64", "bfloat16", "float32", "float64", "complex64"}
)


class DamagedError(Exception):
    """The files of one checkpoint are not what was saved."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stored:
    """How a checkpoint holds one tensor.

    Attributes:
      name: in the TensorFlow checkpoint.
      shape: the logical shape.
      dtype: numpy dtype.
      block_rows: rows of each block but the last.
    """

    name: str
    shape: tuple[int, ...]
    dtype: Any
    block_rows: int

    def blocks(self) -> Iterator[tuple[int, int]]:
        """(start, stop) of each block of rows, by rising rows; (0, 1) for a scalar."""
        rows = self.shape[0] if self.shape else 1
        if rows == 0:
            yield 0, 0
        for start in range(0, rows, self.block_rows):
            yield start, min(start + self.block_rows, rows)

    def slice_spec(self, start: int, stop: int) -> str:
        """TensorFlow's notation, "V D start,length:-" for rows of a [V, D] tensor; empty for all of it."""
        if not self.shape or stop - start == self.shape[0]:
            return ""
        extents = [f"{start},{stop - start}"] + ["-"] * (len(self.shape) - 1)
        return " ".join(str(size) for size in self.shape) + " " + ":".join(extents)

    def num_bytes(self, start: int, stop: int) -> int:
        """Size of so many rows."""
        return (stop - start) * math.prod(self.shape[1:]) * self.dtype.itemsize

    def to_json(self) -> dict:
        return {"shape": list(self.shape), "dtype": self.dtype.name, "block_rows": self.block_rows}

    @classmethod
    def from_json(cls, name: str, entry: dict) -> "Stored":
        """What `to_json` gave."""
        return cls(
            name=name,
            shape=tuple(entry["shape"]),
            dtype=np.dtype(tf.dtypes.as_dtype(entry["dtype"]).as_numpy_dtype),
            block_rows=entry["block_rows"],
        )


def stored_as(parameter: Parameter, *, block_bytes: int) -> Stored:
    """How a checkpoint of blocks of about `block_bytes` holds a parameter: in one block if it cannot be sliced."""
    rows = parameter.shape[0] if parameter.shape else 1
    row_bytes = math.prod(parameter.shape[1:]) * parameter.dtype.itemsize
    block_rows = rows
    if parameter.shape and row_bytes and parameter.dtype.name in _SLICED_DTYPES:
        block_rows = min(block_bytes // row_bytes, rows)
    return Stored(
        name=parameter.path, shape=parameter.shape, dtype=parameter.dtype, block_rows=max(block_rows, 1)
    )


def write_tensors(
    directory: Path, tensors: Sequence[tuple[Parameter, Stored]], *, block_bytes: int, group: ProcessGroup
) -> dict[str, dict]:
    """Writes batches of blocks as checkpoints of their own, then joins them, which moves the files.

    Each process of the group writes its share of the batches, and flushes and digests what it wrote; the chief joins.

    Returns:
      {file name: {"bytes", "sha256"}} of the joined checkpoint; at the chief.

    Raises:
      ValueError: if a parameter's `read` returns another shape or dtype than it declares.
      OSError: if the files cannot be written.
      tf.errors.OpError: what a parameter's `read` raises where another process is lost.
    """
    parts = directory / _PARTS
    if group.is_chief:
        parts.mkdir()
    group.gather()
    own = _write_parts(parts, tensors, block_bytes=block_bytes, group=group)
    written = [part for of_process in group.gather(own) for part in of_process]
    if not group.is_chief:
        return {}
    try:
        tf.raw_ops.MergeV2Checkpoints(
            checkpoint_prefixes=[str(parts / name) for name, _ in written],
            destination_prefix=str(directory / PREFIX),
            delete_old_dirs=False,
            allow_missing_files=False,
        )
    except tf.errors.OpError as error:
        raise _cannot_write(directory, error) from error
    if is_remote(parts):
        parts.remove_tree()  # type: ignore[attr-defined]
    else:
        shutil.rmtree(parts)
    files = {_data_file(PREFIX, i, len(written)): file for i, (_, file) in enumerate(written)}
    return files | checksums([directory / f"{PREFIX}.index"])


def _cannot_write(directory, error):
    return OSError(f"{directory}: the checkpoint cannot be written: {error.message}.")


def _write_parts(parts, tensors, *, block_bytes, group):
    """[(name, {"bytes", "sha256"})] of the parts that this process has written."""
    written, batch, batch_bytes = [], [], 0

    def write():
        name = f"{group.rank:05d}_{len(written):06d}"
        written.append((name, _write_part(parts, name, batch)))
        batch.clear()

    for parameter, stored in tensors:
        if not (parameter.sharded or group.is_chief):
            continue
        for (start, stop), _ in _rounds(parameter, stored, group):
            size = stored.num_bytes(start, stop)
            if batch and batch_bytes + size > block_bytes:
                write()
                batch_bytes = 0
            rows = _rows(parameter, start, stop)
            if stop > start or not stored.shape or not stored.shape[0]:
                batch.append((stored, start, stop, rows))
                batch_bytes += size
    if batch:
        write()
    return written


def _rounds(parameter, stored, group):
    """(own block, largest block) of each round: of a sharded tensor every process has one, (0, 0) where none is left.

    Of other tensors all have the same. Rounds are as many in every process: rows are exchanged in each.
    """
    blocks = list(stored.blocks())
    size, number = (group.size, group.rank) if parameter.sharded else (1, 0)
    for first in range(0, len(blocks), size):
        own = blocks[first : first + size][number : number + 1]
        yield (own[0] if own else (0, 0)), blocks[first]


def _write_part(parts, name, batch):
    try:
        with tf.device("CPU:0"):
            tf.raw_ops.SaveV2(
                prefix=str(parts / name),
                tensor_names=[stored.name for stored, _, _, _ in batch],
                shape_and_slices=[stored.slice_spec(start, stop) for stored, start, stop, _ in batch],
                tensors=[tf.convert_to_tensor(rows) for _, _, _, rows in batch],
            )
    except tf.errors.OpError as error:
        raise _cannot_write(parts.parent, error) from error
    (file,) = checksums([parts / _data_file(name, 0, 1)]).values()
    return file


def _data_file(prefix, number, count):
    """What TensorFlow calls the files of a checkpoint."""
    return f"{prefix}.data-{number:05d}-of-{count:05d}"


def _rows(parameter, start, stop):
    rows = np.asarray(parameter.read(start, stop))
    expected = (stop - start, *parameter.shape[1:]) if parameter.shape else ()
    if rows.shape != expected or rows.dtype != parameter.dtype:
        raise ValueError(
            f"read({start}, {stop}) of parameter {parameter.path} must return shape {expected} "
            f"of {parameter.dtype.name}. "
            f"Received: shape {rows.shape} of {rows.dtype.name}."
        )
    return rows


def read_tensors(
    directory: Path,
    tensors: Iterable[tuple[Parameter, Stored]],
    *,
    block_bytes: int,
    group: ProcessGroup,
) -> None:
    """Writes tensors of a checkpoint into parameters, in the blocks that were saved.

    Of a sharded tensor, each process of the group reads its share of the blocks, as it would write them. Others are
    read by all: each keeps a copy on every device, so they are small.

    Raises:
      DamagedError: at every process, if TensorFlow cannot read the files at one of them.
      tf.errors.OpError: what a parameter's `write` raises where another process is lost.
    """
    for batch in _batches(tensors, block_bytes=block_bytes, group=group):
        values, damage = [], None
        try:
            values = _restored(directory, [(stored, start, stop) for _, stored, start, stop in batch])
        except DamagedError as error:
            damage = str(error)
        # Before rows are exchanged: who cannot read has none to send.
        raise_damage(damage, group=group)
        for (parameter, _, start, _), tensor in zip(batch, values, strict=True):
            parameter.write(start, tensor.numpy())


def read_rows(directory: Path, stored: Stored, start: int, stop: int) -> np.ndarray:
    """Rows [start, stop) of one tensor, [stop - start, ...]; of a scalar, `read_rows(..., 0, 1)` is the 0-d array.

    Memory: the rows, and one block beside them if they are not themselves a block.

    Raises:
      DamagedError: if TensorFlow cannot read the files.
    """
    wanted = [(first, last) for first, last in stored.blocks() if first < stop and last > start]
    if not stored.shape or wanted == [(start, stop)]:
        return _restored(directory, [(stored, start, stop)])[0].numpy()
    rows = np.empty((stop - start, *stored.shape[1:]), stored.dtype)
    for first, last in wanted:
        # Whole blocks: TensorFlow loads the block for any part of it.
        block = _restored(directory, [(stored, first, last)])[0].numpy()
        low, high = max(first, start), min(last, stop)
        rows[low - start : high - start] = block[low - first : high - first]
    return rows


def read_tensor(directory: Path, stored: Stored) -> tf.Tensor:
    """All of one tensor, as TensorFlow reads it: no copy is made but that of a block at a time.

    Raises:
      DamagedError: if TensorFlow cannot read the files.
    """
    rows = stored.shape[0] if stored.shape else 1
    return _restored(directory, [(stored, 0, rows)])[0]


def raise_damage(found: str | None, *, group: ProcessGroup) -> None:
    """Raises DamagedError, at every process, if one has found damage.

    Args:
      found: what is damaged, at this process; None for nothing.
    """
    for damage in filter(None, group.gather(found)):
        raise DamagedError(damage)


def _restored(directory, blocks):
    """The tensors of blocks (stored, start, stop), in a list; those without rows are not read."""
    wanted = [(stored, start, stop) for stored, start, stop in blocks if stop > start]
    read = []
    try:
        with tf.device("CPU:0"):
            if wanted:
                read = tf.raw_ops.RestoreV2(
                    prefix=str(directory / PREFIX),
                    tensor_names=[stored.name for stored, _, _ in wanted],
                    shape_and_slices=[stored.slice_spec(start, stop) for stored, start, stop in wanted],
                    dtypes=[tf.dtypes.as_dtype(stored.dtype) for stored, _, _ in wanted],
                )
            of_blocks = iter(read)
            return [
                next(of_blocks) if stop > start else tf.zeros([0, *stored.shape[1:]], stored.dtype)
                for stored, start, stop in blocks
            ]
    except (tf.errors.DataLossError, tf.errors.NotFoundError, tf.errors.OutOfRangeError) as error:
        raise DamagedError(error.message) from error


def _batches(tensors, *, block_bytes, group):
    """Blocks (parameter, stored, start, stop) of this process, in batches of about `block_bytes`, or one block.

    A batch has the same rounds in every process.
    """
    batch, batch_bytes = [], 0
    for parameter, stored in tensors:
        for (start, stop), largest in _rounds(parameter, stored, group):
            size = stored.num_bytes(*largest)
            if batch and batch_bytes + size > block_bytes:
                yield batch
                batch, batch_bytes = [], 0
            batch.append((parameter, stored, start, stop))
            batch_bytes += size
    if batch:
        yield batch


def checksums(paths: Iterable[Path]) -> dict[str, dict]:
    """{name: {"bytes", "sha256"}} of files, each flushed to disk, or read back from a store."""

    def checksum(path: Path) -> dict:
        if is_remote(path):
            digest = hashlib.sha256()
            with path.open("rb") as stored:
                while chunk := stored.read(2**22):
                    digest.update(chunk)
            return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}
        with naming(path), open(path, "rb") as file:
            # A file that was only read is clean, and this returns at once.
            os.fsync(file.fileno())
            return {"bytes": os.fstat(file.fileno()).st_size, "sha256": _file_digest(file)}

    paths = list(paths)
    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(zip((path.name for path in paths), pool.map(checksum, paths), strict=True))


def _file_digest(file) -> str:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(2**20))
    while count := file.readinto(buffer):
        digest.update(buffer[:count])
    return digest.hexdigest()
