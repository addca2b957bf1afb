"""Checkpoints: tensors saved and restored in blocks of rows, one directory per step.

    checkpoints/step_00001000/metadata.json      step, metadata, validation loss, tensors, checksums
    checkpoints/step_00001000/tensors.index      a TensorFlow V2 checkpoint, which any TensorFlow tool
    checkpoints/step_00001000/tensors.data-...   reads: `tf.train.load_checkpoint(".../tensors")`

A tensor is stored by its logical shape, whatever number of devices held it. It passes through host
memory a block of rows at a time, so it may be larger than the memory of a device, or of the host.

A directory takes its name by one rename, when all of it is on disk. A save that is killed leaves a
hidden directory behind, which the next `Checkpoints` removes. No file names the latest checkpoint:
the names of the directories do.

The files are on a local or mounted POSIX filesystem: renames must be atomic and fsync must mean it.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from lmscale.paths import check_checkpoint_path, naming
from lmscale.workdir import fsync_directory, replace_file

logger = logging.getLogger(__name__)

_FORMAT = 1
_DOCUMENT = "metadata.json"
_PREFIX = "tensors"
_STEP_DIRECTORY = re.compile(r"step_(\d{8,})")
_UNFINISHED = re.compile(r"\.step_(\d{8,})\.(saving|removing|replaced)")
_RESERVED_METADATA = ("step", "validation_loss_nats")
# TensorFlow writes slices of any type, but reads back slices of these only. Tensors of other types
# (uint32 seeds, float16) are written in one piece.
_SLICED_DTYPES = frozenset(
    {"bool", "int8", "uint8", "int16", "int32", "int64", "bfloat16", "float32", "float64", "complex64"}
)


class _DamagedError(Exception):
    """The files of one checkpoint are not what was saved."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointItem:
    """One logical tensor, and how to get and set its rows.

    `read` and `write` are called in the order of the items, and for one item by rising rows, each row
    once: collectives inside them run in the same order in every process that makes the same call.

    Attributes:
      name: the tensor's name in the checkpoint.
      shape: the logical shape, for example (vocab_size, embed_dim).
      dtype: numpy dtype, `ml_dtypes.bfloat16` included; not strings.
      read: `read(start, stop)` returns rows [start:stop) along axis 0, [stop - start, ...].
        For a scalar, `read(0, 1)` returns the 0-d array.
      write: `write(start, rows)` sets rows [start:start + len(rows)).
        For a scalar, `write(0, value)`, value 0-d.
    """

    name: str
    shape: tuple[int, ...]
    dtype: Any
    read: Callable[[int, int], np.ndarray]
    write: Callable[[int, np.ndarray], None]

    def __post_init__(self):
        object.__setattr__(self, "shape", tuple(int(size) for size in self.shape))
        object.__setattr__(self, "dtype", np.dtype(self.dtype))
        if not self.name or self.dtype.kind in "OSU":
            raise ValueError(
                "A checkpoint item needs a name and a dtype of numbers or bools. Received: "
                f"name={self.name!r}, dtype={self.dtype}."
            )


class Checkpoints:
    """The checkpoints of one run, in one directory, with one writer.

    Keeps the `keep` newest, and the one of the lowest validation loss.
    """

    def __init__(self, directory, *, keep: int = 3, block_mib: float = 64, readonly: bool = False):
        """Opens the directory, and clears what killed saves left in it.

        Args:
          directory: where the checkpoints are; made if absent.
          keep: how many of the newest to keep; the best is kept besides.
          block_mib: rows pass through memory in blocks of this size. A save holds about three blocks.
          readonly: change nothing in the directory, which another process may be writing. For an
            evaluation, and for the workers of a run that are not its writer.

        Raises:
          ValueError: if keep < 1 or block_mib <= 0, or TensorFlow would take the directory for another one.
        """
        if keep < 1 or not block_mib > 0:
            raise ValueError(
                "keep must be at least 1 and block_mib above 0. "
                f"Received: keep={keep}, block_mib={block_mib}."
            )
        check_checkpoint_path(directory, what="The directory of checkpoints")
        self._directory = Path(directory)
        self._keep = keep
        self._block_bytes = int(block_mib * 2**20)
        self._readonly = readonly
        if not readonly:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._clear_unfinished()

    def prefix(self, step: int) -> str:
        """The path for TensorFlow's own readers: `tf.train.load_checkpoint(checkpoints.prefix(step))`."""
        return str(self._step_directory(step) / _PREFIX)

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, ascending: each file is there and has its size."""
        return list(self._complete())

    def best_step(self) -> int | None:
        """The complete checkpoint of the lowest validation loss (the earliest of equals), if any has one."""
        losses = [(document["validation_loss_nats"], step) for step, document in self._complete().items()]
        return min(((loss, step) for loss, step in losses if loss is not None), default=(None, None))[1]

    def save(
        self,
        step: int,
        items: Sequence[CheckpointItem],
        *,
        metadata: dict,
        validation_loss_nats: float | None = None,
    ) -> str:
        """Saves a checkpoint of `step`, then removes the ones that need not be kept.

        A checkpoint of the same step is replaced. Checkpoints of later steps exist when the run went
        back to an earlier one, and are no part of it from here on: they are renamed to
        `set_aside_step_...`, with a warning, and neither restored nor removed.

        Args:
          step: int, at least 0.
          items: what to save.
          metadata: anything JSON holds; `restore` returns it.
          validation_loss_nats: loss at this step, if known. NaN and infinity count as unknown.

        Returns:
          The path for TensorFlow's readers, as `prefix(step)`.

        Raises:
          ValueError: if an item's `read` returns another shape or dtype than the item declares, if names
            repeat, if metadata is not JSON, or if this object is readonly. Nothing is changed then.
        """
        if self._readonly:
            raise ValueError(f"Checkpoints opened readonly cannot be saved to: {self._directory}.")
        if step < 0:
            raise ValueError(f"step must be at least 0. Received: step={step}.")
        _check_names(items)
        document = {
            "format": _FORMAT,
            "step": int(step),
            "validation_loss_nats": _finite_or_none(validation_loss_nats),
            "metadata": _json_copy(metadata),
            "tensors": {
                item.name: {
                    "shape": list(item.shape),
                    "dtype": item.dtype.name,
                    "block_rows": _block_rows(item, self._block_bytes),
                }
                for item in items
            },
        }
        temporary = self._hidden(step, "saving")
        try:
            _remove_tree(temporary)
            temporary.mkdir()
            self._write_tensors(temporary, items)
            document["files"] = _checksums(temporary)
            _write_document(temporary, document)
            self._publish(temporary, step)
        except BaseException:
            _remove_tree(temporary)
            raise
        self._set_aside_later_than(step)
        self._prune()
        return self.prefix(step)

    def mark_best(self, step: int, validation_loss_nats: float) -> None:
        """Records the validation loss of a checkpoint already saved, for `best_step` to compare.

        NaN and infinity are recorded as unknown: they are never the best.

        Raises:
          ValueError: if the step has no checkpoint, or this object is readonly.
        """
        if self._readonly:
            raise ValueError(f"Checkpoints opened readonly cannot be marked: {self._directory}.")
        self._check_available(step)
        try:
            document = self._document(step)
        except _DamagedError as damage:
            raise ValueError(f"The checkpoint of step {step} is damaged: {damage}.") from damage
        document["validation_loss_nats"] = _finite_or_none(validation_loss_nats)
        _write_document(self._step_directory(step), document)

    def restore(
        self, items: Sequence[CheckpointItem], *, step: int | None = None, subset: bool = False
    ) -> dict | None:
        """Writes a checkpoint's tensors into `items`.

        Names, shapes and dtypes are compared before any data is read, and checksums before any item is
        written to. Items are written to in the blocks that were saved: the memory needed is the save's.

        Args:
          items: what to restore.
          step: the step to restore. None: the newest; if it is damaged, with a warning, the one before.
          subset: `items` may leave out tensors of the checkpoint: an evaluation needs no optimizer's.

        Returns:
          The metadata as it was saved, with "step" and "validation_loss_nats" (None if unknown) added;
          or None if there is no checkpoint at all.

        Raises:
          ValueError: if the checkpoint does not fit `items`; if `step` has no checkpoint, or a damaged
            one; if checkpoints exist and none is readable.
        """
        _check_names(items)
        if step is not None:
            self._check_available(step)
            try:
                return self._load(step, items, subset)
            except _DamagedError as damage:
                raise ValueError(
                    f"The checkpoint of step {step} in {self._directory} is damaged: {damage}. "
                    f"Select another step. Available: {_listed(s for s in self.steps() if s != step)}."
                ) from damage
        damages: dict[int, str] = {}
        # Listed anew each time: a run that writes here may have removed a step while it was read.
        while untried := [s for s in self._published() if s not in damages]:
            newest = untried[-1]
            try:
                return self._load(newest, items, subset)
            except _DamagedError as damage:
                if newest not in self._published():
                    continue
                damages[newest] = str(damage)
                logger.warning(
                    "DAMAGED CHECKPOINT: step %d in %s: %s. Trying the one before it.",
                    newest,
                    self._directory,
                    damage,
                )
        if not damages:
            return None
        reasons = "\n".join(f"  step {s}: {reason}" for s, reason in sorted(damages.items()))
        raise ValueError(
            f"No checkpoint in {self._directory} is readable:\n{reasons}\n"
            "Restore the files from a copy, or start over in another directory."
        )

    # Directories and what they are called.

    def _step_directory(self, step: int) -> Path:
        return self._directory / f"step_{step:08d}"

    def _hidden(self, step: int, state: str) -> Path:
        return self._directory / f".step_{step:08d}.{state}"

    def _published(self) -> list[int]:
        """Steps that have a directory, ascending. It was complete when it was given its name."""
        if not self._directory.is_dir():
            return []
        matches = [
            _STEP_DIRECTORY.fullmatch(path.name) for path in self._directory.iterdir() if path.is_dir()
        ]
        return sorted(int(match[1]) for match in matches if match)

    def _check_available(self, step: int) -> None:
        if step not in self._published():
            raise ValueError(
                f"There is no checkpoint of step {step} in {self._directory}. "
                f"Available: {_listed(self.steps())}."
            )

    def _clear_unfinished(self) -> None:
        for path in sorted(self._directory.iterdir()):
            match = _UNFINISHED.fullmatch(path.name)
            if not match:
                continue
            step = int(match[1])
            if match[2] == "replaced" and not self._step_directory(step).exists():
                # Killed between the two renames that replace a checkpoint.
                path.rename(self._step_directory(step))
            else:
                logger.info("Removing %s, left by a save that did not finish.", path)
                _remove_tree(path)
        for step in self._published():
            (self._step_directory(step) / f"{_DOCUMENT}.tmp").unlink(missing_ok=True)

    def _publish(self, temporary: Path, step: int) -> None:
        """Gives a finished directory its name, in place of an earlier one of that name."""
        target, replaced = self._step_directory(step), self._hidden(step, "replaced")
        if target.exists():
            _remove_tree(replaced)
            target.rename(replaced)
        try:
            temporary.rename(target)
        except BaseException:
            if replaced.exists():
                replaced.rename(target)
            raise
        fsync_directory(self._directory)
        _remove_tree(replaced)

    def _set_aside_later_than(self, step: int) -> None:
        for later in self._published():
            if later > step:
                aside = self._directory / f"set_aside_step_{later:08d}"
                logger.warning(
                    "The run went back to step %d: its checkpoint of step %d is set aside as %s. "
                    "Nothing reads it any more: delete it when you do not need it.",
                    step,
                    later,
                    aside,
                )
                _remove_tree(aside)
                self._step_directory(later).rename(aside)

    def _prune(self) -> None:
        """Removes checkpoints older than the `keep` newest complete ones, but for the best."""
        oldest_kept = self.steps()[-self._keep :][0]
        best = self.best_step()
        for step in self._published():
            if step < oldest_kept and step != best:
                # Renamed first: a removal that is killed half way must not look like a damaged checkpoint.
                hidden = self._hidden(step, "removing")
                _remove_tree(hidden)
                self._step_directory(step).rename(hidden)
                _remove_tree(hidden)

    # Writing.

    def _write_tensors(self, directory: Path, items: Sequence[CheckpointItem]) -> None:
        """Writes each batch of blocks as a checkpoint of its own, then merges them, which moves the files."""
        try:
            self._write_parts(directory / "parts", items, destination=directory / _PREFIX)
        except tf.errors.OpError as error:
            raise OSError(f"{directory}: the checkpoint cannot be written: {error.message}.") from error

    def _write_parts(self, parts: Path, items: Sequence[CheckpointItem], *, destination: Path) -> None:
        parts.mkdir()
        prefixes: list[str] = []
        blocks = (
            (item, start, stop)
            for item in items
            for start, stop in _blocks(item, _block_rows(item, self._block_bytes))
        )
        with tf.device("CPU:0"):
            for batch in _batches(blocks, self._block_bytes):
                prefixes.append(str(parts / f"{len(prefixes):06d}"))
                tf.raw_ops.SaveV2(
                    prefix=prefixes[-1],
                    tensor_names=[item.name for item, _, _ in batch],
                    shape_and_slices=[_slice_spec(*block) for block in batch],
                    tensors=[tf.convert_to_tensor(_read(*block)) for block in batch],
                )
            tf.raw_ops.MergeV2Checkpoints(
                checkpoint_prefixes=prefixes,
                destination_prefix=str(destination),
                delete_old_dirs=False,
                allow_missing_files=False,
            )
        shutil.rmtree(parts)

    # Reading.

    def _document(self, step: int) -> dict:
        """metadata.json, checked against the digest of itself."""
        path = self._step_directory(step) / _DOCUMENT
        try:
            document = json.loads(path.read_bytes())
            digest = document.pop("sha256")
        except OSError as error:
            raise _DamagedError(f"{_DOCUMENT} cannot be read ({error.strerror})") from error
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise _DamagedError(f"{_DOCUMENT} is not the JSON that was written ({error!r})") from error
        if digest != _digest(document) or document["step"] != step:
            raise _DamagedError(f"{_DOCUMENT} does not match its own checksum or its directory's name")
        if document["format"] != _FORMAT:
            raise ValueError(
                f"The checkpoint {path.parent} must have format {_FORMAT}. Received: {document['format']}. "
                "Read it with the version of lmscale that wrote it."
            )
        return document

    def _check_sizes(self, step: int, document: dict) -> None:
        for name, file in document["files"].items():
            path = self._step_directory(step) / name
            try:
                size = path.stat().st_size
            except OSError as error:
                raise _DamagedError(f"{name} cannot be read ({error.strerror})") from error
            if size != file["bytes"]:
                raise _DamagedError(f"{name} has {size} bytes instead of {file['bytes']}")

    def _complete(self) -> dict[int, dict]:
        """Step and document of each checkpoint whose files are there and have their size, ascending."""
        complete = {}
        for step in self._published():
            with contextlib.suppress(_DamagedError):
                document = self._document(step)
                self._check_sizes(step, document)
                complete[step] = document
        return complete

    def _load(self, step: int, items: Sequence[CheckpointItem], subset: bool) -> dict:
        directory = self._step_directory(step)
        document = self._document(step)
        _check_fit(directory, document["tensors"], items, subset)
        self._check_sizes(step, document)
        try:
            found = _checksums(directory)
        except OSError as error:
            raise _DamagedError(str(error)) from error
        for name, file in document["files"].items():
            if found.get(name) != file:
                raise _DamagedError(f"the checksum of {name} is not the one saved")
        blocks = (
            (item, start, stop)
            for item in items
            for start, stop in _blocks(item, document["tensors"][item.name]["block_rows"])
        )
        for batch in _batches(blocks, self._block_bytes):
            try:
                with tf.device("CPU:0"):
                    tensors = tf.raw_ops.RestoreV2(
                        prefix=self.prefix(step),
                        tensor_names=[item.name for item, _, _ in batch],
                        shape_and_slices=[_slice_spec(*block) for block in batch],
                        dtypes=[tf.dtypes.as_dtype(item.dtype) for item, _, _ in batch],
                    )
            except (tf.errors.DataLossError, tf.errors.NotFoundError, tf.errors.OutOfRangeError) as error:
                raise _DamagedError(error.message) from error
            for (item, start, _), tensor in zip(batch, tensors, strict=True):
                item.write(start, tensor.numpy())
        return {
            **document["metadata"],
            "step": document["step"],
            "validation_loss_nats": document["validation_loss_nats"],
        }


def _check_names(items: Sequence[CheckpointItem]) -> None:
    names = [item.name for item in items]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated or not names:
        raise ValueError(
            f"A checkpoint needs items of different names. Received: repeated names {repeated} in {names}."
        )


def _check_fit(directory: Path, saved: dict, items: Sequence[CheckpointItem], subset: bool) -> None:
    """Raises ValueError naming each tensor that the checkpoint and `items` disagree about."""
    problems = []
    for item in items:
        if item.name not in saved:
            problems.append(f"{item.name}: requested with shape {item.shape}, not in the checkpoint")
            continue
        shape, dtype = tuple(saved[item.name]["shape"]), saved[item.name]["dtype"]
        if shape != item.shape:
            problems.append(f"{item.name}: shape {shape} in the checkpoint, {item.shape} requested")
        if dtype != item.dtype.name:
            problems.append(f"{item.name}: dtype {dtype} in the checkpoint, {item.dtype.name} requested")
    if not subset:
        names = {item.name for item in items}
        problems += [
            f"{name}: in the checkpoint with shape {tuple(tensor['shape'])}, not requested"
            for name, tensor in saved.items()
            if name not in names
        ]
    if problems:
        raise ValueError(
            f"The checkpoint {directory} does not fit the model:\n  " + "\n  ".join(problems) + "\n"
            "Use the configuration that it was trained with, or another working directory."
        )


# Blocks of rows.


def _block_rows(item: CheckpointItem, block_bytes: int) -> int:
    """Rows of `item` in a block; all of them if it cannot be sliced."""
    rows = item.shape[0] if item.shape else 1
    row_bytes = math.prod(item.shape[1:]) * item.dtype.itemsize
    if not item.shape or row_bytes == 0 or item.dtype.name not in _SLICED_DTYPES:
        return max(rows, 1)
    return max(min(block_bytes // row_bytes, rows), 1)


def _blocks(item: CheckpointItem, block_rows: int) -> Iterator[tuple[int, int]]:
    rows = item.shape[0] if item.shape else 1
    if rows == 0:
        yield 0, 0
    for start in range(0, rows, block_rows):
        yield start, min(start + block_rows, rows)


def _batches(blocks, block_bytes: int):
    """Consecutive blocks grouped so that a group holds about `block_bytes`, or one block."""
    batch: list[tuple[CheckpointItem, int, int]] = []
    batch_bytes = 0
    for item, start, stop in blocks:
        size = (stop - start) * math.prod(item.shape[1:]) * item.dtype.itemsize
        if batch and batch_bytes + size > block_bytes:
            yield batch
            batch, batch_bytes = [], 0
        batch.append((item, start, stop))
        batch_bytes += size
    if batch:
        yield batch


def _slice_spec(item: CheckpointItem, start: int, stop: int) -> str:
    """TensorFlow's notation, "V D start,length:-" for rows of a [V, D] tensor; empty for all of it."""
    if not item.shape or stop - start == item.shape[0]:
        return ""
    extents = [f"{start},{stop - start}"] + ["-"] * (len(item.shape) - 1)
    return " ".join(str(size) for size in item.shape) + " " + ":".join(extents)


def _read(item: CheckpointItem, start: int, stop: int) -> np.ndarray:
    rows = np.asarray(item.read(start, stop))
    expected = (stop - start, *item.shape[1:]) if item.shape else ()
    if rows.shape != expected or rows.dtype != item.dtype:
        raise ValueError(
            f"read({start}, {stop}) of checkpoint item {item.name} must return shape {expected} "
            f"of {item.dtype.name}. "
            f"Received: shape {rows.shape} of {rows.dtype.name}."
        )
    return rows


# Files.


def _checksums(directory: Path) -> dict:
    """Size and sha256 of each file of the TensorFlow checkpoint, each flushed to disk."""

    def checksum(path: Path) -> dict:
        with naming(path), open(path, "rb") as file:
            # A file that was only read is clean, and this returns at once.
            os.fsync(file.fileno())
            return {"bytes": os.fstat(file.fileno()).st_size, "sha256": _file_digest(file)}

    paths = sorted(directory.glob(f"{_PREFIX}.*"))
    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(zip((path.name for path in paths), pool.map(checksum, paths), strict=True))


def _file_digest(file) -> str:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(2**20))
    while count := file.readinto(buffer):
        digest.update(buffer[:count])
    return digest.hexdigest()


def _digest(document: dict) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _write_document(directory: Path, document: dict) -> None:
    text = json.dumps({**document, "sha256": _digest(document)}, indent=1)
    replace_file(directory / _DOCUMENT, text=text)


def _remove_tree(path: Path) -> None:
    """Removes a directory if it exists. A run does not end because disk space could not be given back."""
    try:
        shutil.rmtree(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        logger.warning("Cannot remove %s: %s", path, error)


def _json_copy(metadata: dict) -> dict:
    try:
        copy = json.loads(json.dumps(metadata, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"metadata must be a dict that JSON can hold, without NaN ({error}). Received: {metadata}."
        ) from error
    for key in _RESERVED_METADATA:
        copy.pop(key, None)
    return copy


def _finite_or_none(loss: float | None) -> float | None:
    return float(loss) if loss is not None and math.isfinite(loss) else None


def _listed(steps) -> str:
    return ", ".join(str(step) for step in steps) or "none"
