"""One checkpoint of another run, to be read from: for a warm start, an export, a look at its rows."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from lmscale.checkpoints import document as documents
from lmscale.checkpoints import format_1
from lmscale.checkpoints.directory import STEP_DIRECTORY, Checkpoints
from lmscale.checkpoints.tensors import DamagedError, Stored, read_rows, read_tensor
from lmscale.distribution.process_group import ProcessGroup
from lmscale.paths import check_checkpoint_path
from lmscale.storage import as_path


@dataclasses.dataclass(frozen=True, kw_only=True)
class SavedCheckpoint:
    """A checkpoint whose files were whole when it was opened. Nothing is kept open, and nothing written.

    Attributes:
      directory: the folder of the step.
      metadata: what was saved as metadata, with "step" and "validation_loss_nats".
      stored: {path: how the file holds the tensor}; paths of format 2, see `open_checkpoint`.
    """

    directory: Path
    metadata: dict[str, Any]
    stored: dict[str, Stored]

    @property
    def step(self) -> int:
        """Updates that the run had done."""
        return self.metadata["step"]

    @property
    def tensors(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """{path: (logical shape, dtype)}."""
        return {path: (stored.shape, stored.dtype) for path, stored in self.stored.items()}

    def vocabulary_path(self, table: str) -> Path:
        """Where the working directory of the run holds a copy of the vocabulary of a table, if it holds one."""
        name = self.metadata.get("vocabulary_files", {}).get(table, "vocab.txt")
        return self.directory.absolute().parent.parent / name

    def vocabulary_sha256(self, table: str) -> str | None:
        """SHA-256 of the vocab.txt whose words are the rows of a table; None where the checkpoint does not tell."""
        return documents.vocabulary_sha256(self.metadata, table)

    def updates(self, path: str) -> int:
        """What the clock of a parameter's update rule had counted; `step` where the checkpoint does not tell."""
        return self.metadata.get("updates", {}).get(path, self.step)

    def blocks(self, path: str) -> Iterator[tuple[int, int]]:
        """(start, stop) of the blocks of rows that are read fastest, by rising rows; (0, 1) for a scalar."""
        return self._stored(path).blocks()

    def read(self, path: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows [start, stop) of a tensor, [stop - start, ...]; the 0-d array of a scalar.

        Args:
          path: one of `tensors`.
          start, stop: rows; None for the last one's end.

        Raises:
          ValueError: if there is no such tensor, there are no such rows, or TensorFlow cannot read them.

        Memory: the rows, and one block beside them if they are not themselves one of `blocks`.
        """
        stored = self._stored(path)
        rows = stored.shape[0] if stored.shape else 1
        stop = rows if stop is None else stop
        if not 0 <= start <= stop <= rows:
            raise ValueError(f"Rows of {path} must lie in 0 .. {rows}. Received: [{start}, {stop}).")
        try:
            return read_rows(self.directory, stored, start, stop)
        except DamagedError as damage:
            raise _changed(self.directory, damage) from damage

    def tensor(self, path: str) -> tf.Tensor:
        """A whole tensor as TensorFlow's own; one block of it is held beside while it is read.

        Raises:
          ValueError: as of `read`.
        """
        stored = self._stored(path)
        try:
            return read_tensor(self.directory, stored)
        except DamagedError as damage:
            raise _changed(self.directory, damage) from damage

    def _stored(self, path):
        if path not in self.stored:
            raise ValueError(
                f"The checkpoint {self.directory} holds {', '.join(sorted(self.stored))}. Received: {path!r}."
            )
        return self.stored[path]


def _changed(directory, damage):
    return ValueError(
        f"The checkpoint {directory} must stay as it was when it was opened. Received: {damage}. Start again, from a "
        "copy if the run that wrote it is still running."
    )


def open_checkpoint(path, *, best: bool = False) -> SavedCheckpoint:
    """Opens a checkpoint of a run, of format 1 or 2, and verifies the checksums of its files.

    The names of format 1 become paths where they are those of an LSTM language model, `layers/lstm_0/kernel` for
    `body/0/lstm_cell/kernel`; others stay as they are.

    Args:
      path: a working directory, for its newest checkpoint; the `checkpoints` in it; or one `step_XXXXXXXX` there.
      best: take the checkpoint of the lowest validation loss instead of the newest.

    Raises:
      ValueError: if there is none, or a damaged one; if its format is not known; if TensorFlow would take the path
        for another one; if `best` is asked of a single step.
    """
    path = as_path(path)
    check_checkpoint_path(path, what="The path of a checkpoint")
    directory = _step_directory(path, best=best)
    try:
        document = documents.read(directory)
        match = STEP_DIRECTORY.fullmatch(directory.absolute().name)
        if match and int(match[1]) != document["step"]:
            raise DamagedError(f"{documents.FILE} does not match its directory's name")
        documents.check_files(directory, document, group=ProcessGroup())
    except DamagedError as damage:
        beside = Checkpoints(directory.parent, readonly=True)
        whole = ", ".join(str(beside.step_directory(step)) for step in beside.steps()) or "none"
        raise ValueError(
            f"The checkpoint {directory} is damaged: {damage}. Restore its files from a copy, or pass another one. "
            f"Those beside it whose files have their sizes: {whole}."
        ) from damage
    names = document["tensors"]
    paths = format_1.paths(names) if document["format"] == 1 else {name: name for name in names}
    return SavedCheckpoint(
        directory=directory,
        metadata=documents.user_metadata(document),
        stored={paths[name]: Stored.from_json(name, entry) for name, entry in names.items()},
    )


def _step_directory(path, *, best):
    if (path / documents.FILE).exists() or STEP_DIRECTORY.fullmatch(path.absolute().name):
        if best:
            raise ValueError(
                f"best=True chooses among the checkpoints of a run. Received: {path}, which is one step. Pass the "
                "working directory."
            )
        if not path.is_dir():
            raise ValueError(f"There is no checkpoint {path}. Pass the path of one that is there.")
        return path
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    checkpoints = Checkpoints(folder, readonly=True)
    step = checkpoints.best_step() if best else checkpoints.newest_step()
    if step is None:
        wanted = "a checkpoint with a validation loss" if best else "a checkpoint"
        raise ValueError(
            f"{path} must be a working directory that holds {wanted}, or one step_XXXXXXXX of its checkpoints. "
            f"Received: {'none there' if path.is_dir() else 'no such directory'}. "
            f"{'Pass best=False for the newest, or another path' if best else 'Pass another path'}."
        )
    return checkpoints.step_directory(step)
