"""The working directory of a run: where everything is, and who may write there."""

import contextlib
import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from lmscale.paths import check_checkpoint_path, naming
from lmscale.storage import Ownership, as_path, is_remote

_LOCK = ".lock"
_SHARED_SECS = 60.0  # Network filesystems may show a new file that late.


class Workdir:
    """The directory that holds all that a run writes.

    config.gin       the configuration of the run, resolved
    vocab.txt        the vocabulary of its data: what the rows of its checkpoints stand for
    warm_start.txt   what was loaded from another run; pretrained_TABLE.txt likewise
    checkpoints/     see `lmscale.checkpoints.directory`
    train/ eval/     TensorBoard events and metrics.jsonl of the training and of the evaluations
    eval_SPLIT/      likewise of the evaluations of `lmscale.evaluate --follow`, which holds a .lock of its own there
    saved.json       there since the run's first checkpoint
    finished.json    there when the run has done all its steps
    .lock            held by the process that writes here

    The writer holds an exclusive lock until `close`, or until its process ends in whatever way: the kernel
    gives the lock back. Child processes made by fork hold it too. In a store, such as gs://bucket/run, there are no
    locks: see `storage.Ownership`. Use it as a context manager.
    """

    def __init__(self, path, *, readonly: bool = False):
        """Opens the directory.

        Args:
          path: the directory; made, with its parents, unless readonly.
          readonly: take no lock and write nothing: for an evaluation beside a run, and for the workers of a
            run that are not its writer.

        Raises:
          ValueError: if another process holds the lock; if the directory cannot be made or written to; if it
            is opened readonly and does not exist; if TensorFlow would take its path for another one.
        """
        self.path = as_path(path)
        check_checkpoint_path(self.path, what="The working directory")
        self._lock: IO[str] | Ownership | None = None
        if readonly:
            if not self.path.is_dir():
                raise ValueError(
                    f"There is no working directory {self.path}. Pass the one of a run that has started."
                )
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if is_remote(self.path):
                self._lock = Ownership(self.path / _LOCK, **self._in_use())
                return
            lock = open(self.path / _LOCK, "a+", encoding="utf-8")  # noqa: SIM115 (held until close)
        except OSError as error:
            raise ValueError(
                "The working directory must be one that can be written to. "
                f"Received: {self.path} ({error.strerror})."
            ) from error
        _take(lock, **self._in_use())
        self._lock = lock

    def _in_use(self) -> dict[str, Any]:
        return {
            "used": f"The working directory {self.path}",
            "by": "another run",
            "otherwise": "pass another directory",
        }

    @classmethod
    def of_group(cls, path, group) -> "Workdir":
        """Opens the one directory of a run in several processes, all of which call this: the chief for writing.

        Args:
          path: as above.
          group: `ProcessGroup`.

        Raises:
          ValueError: as above; if another process does not see the chief's directory at this path.
        """
        if group.is_chief:
            workdir = cls(path)
            lock = workdir._lock
            group.of_chief(lock.mark if isinstance(lock, Ownership) else (workdir.path / _LOCK).read_text())
            return workdir
        mark = group.of_chief()
        deadline = time.monotonic() + _SHARED_SECS
        while not _holds(as_path(path) / _LOCK, mark):
            if time.monotonic() > deadline:
                raise ValueError(
                    "The working directory must be on a filesystem that all processes of the run share. Received: "
                    f"{path}, in which {group.name(group.rank)} does not find what the chief wrote. Pass a path below "
                    "a shared mount."
                )
            time.sleep(0.2)
        return cls(path, readonly=True)

    @property
    def config_path(self) -> Path:
        return self.path / "config.gin"

    @property
    def checkpoints_dir(self) -> Path:
        return self.path / "checkpoints"

    @property
    def train_dir(self) -> Path:
        return self.path / "train"

    @property
    def eval_dir(self) -> Path:
        return self.path / "eval"

    def followed_dir(self, split: str) -> Path:
        """Where `lmscale.evaluate --follow` writes."""
        return self.path / f"eval_{split}"

    @property
    def finished_path(self) -> Path:
        return self.path / "finished.json"

    def write_config(self, text: str) -> None:
        """Writes config.gin, in one piece or not at all."""
        self._check_writer()
        replace_file(self.config_path, text=text)

    def write_vocabulary(self, source) -> None:
        """Copies the vocabulary at `source`, for those who read the checkpoints later; in one piece or not at all."""
        self._check_writer()
        source = as_path(source)
        target = self.path / source.name
        if is_remote(target):
            target.write_bytes(source.read_bytes())
            return
        temporary = target.with_name(f"{target.name}.tmp")
        with naming(temporary):
            if is_remote(source):
                temporary.write_bytes(source.read_bytes())
            else:
                shutil.copyfile(source, temporary)
        temporary.replace(target)

    def write_report(self, name: str, *, text: str | None) -> None:
        """Writes NAME.txt, in one piece or not at all; None removes what an earlier start has written."""
        self._check_writer()
        path = self.path / f"{name}.txt"
        if text is None:
            path.unlink(missing_ok=True)
        else:
            replace_file(path, text=text.rstrip() + "\n")

    @property
    def saved_path(self) -> Path:
        return self.path / "saved.json"

    def mark_saved(self) -> None:
        """Records that the run has a checkpoint: whoever finds none later knows that it was lost.

        Call it when a checkpoint is on disk, not before: a run that dies in its first save has nothing to lose.
        """
        self._check_writer()
        if not self.saved_path.exists():
            replace_file(self.saved_path, text=json.dumps({"saved": True}) + "\n")

    def has_saved(self) -> bool:
        """Whether the run ever had a checkpoint."""
        return self.saved_path.exists() or self.finished_path.exists()

    def mark_finished(self, *, step: int, summary: dict) -> None:
        """Records that the run has done its steps.

        Args:
          step: the last step.
          summary: anything JSON holds, for example the final losses.
        """
        self._check_writer()
        document = {"step": step, "summary": summary}
        replace_file(self.finished_path, text=json.dumps(document, indent=1) + "\n")

    def clear_finished(self) -> None:
        """Takes the mark away, for a run that goes on to more steps."""
        self._check_writer()
        self.finished_path.unlink(missing_ok=True)

    def finished(self) -> dict | None:
        """What `mark_finished` recorded, {"step": int, "summary": dict}; None if the run has not finished.

        Raises:
          ValueError: if finished.json is damaged.
        """
        try:
            document = json.loads(self.finished_path.read_text(encoding="utf-8"))
            if not isinstance(document, dict) or type(document.get("step")) is not int:
                raise ValueError("it has no step")
            return document
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise ValueError(
                f"{self.finished_path} must be the JSON that the run wrote ({error}). "
                "Delete it, and start the run again: it goes on from its last checkpoint."
            ) from error

    def close(self) -> None:
        """Gives the lock back."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> "Workdir":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _check_writer(self) -> None:
        if self._lock is None:
            raise ValueError(f"{self.path} is open readonly, or closed: nothing can be written to it.")
        if isinstance(self._lock, Ownership):
            self._lock.check()


@contextlib.contextmanager
def locked(directory: Path, *, used: str, by: str, otherwise: str) -> Iterator[None]:
    """A context in which this process alone has a directory, by a lock as `Workdir`'s.

    Args:
      directory: made if absent; its parent must be there.
      used: what messages call it: "The folder runs/mine/eval_test".
      by: who else may have it: "another evaluation".
      otherwise: what to do but wait: "pass another --split".

    Raises:
      ValueError: if another process has it, or there are no locks.
      OSError: if it cannot be made or written to.
    """
    directory.mkdir(exist_ok=True)
    if is_remote(directory):
        with contextlib.closing(Ownership(directory / _LOCK, used=used, by=by, otherwise=otherwise)):
            yield
        return
    with open(directory / _LOCK, "a+", encoding="utf-8") as lock:
        _take(lock, used=used, by=by, otherwise=otherwise)
        yield


def _take(lock: IO[str], *, used: str, by: str, otherwise: str) -> None:
    """Locks an open file and writes who has it; closes it if that fails."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.seek(0)
        holder = lock.read().strip() or "a process that has just started"
        lock.close()
        raise ValueError(
            f"{used} is in use by {by}: {holder}. Wait for it to end, or {otherwise}."
        ) from error
    except OSError as error:
        lock.close()
        raise ValueError(f"{used} must be on a filesystem with locks ({error.strerror}).") from error
    with naming(lock.name):
        lock.truncate(0)
        lock.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()


def _holds(path: Path, text: str) -> bool:
    try:
        return text in path.read_text()
    except OSError:
        return False


def replace_file(path, *, text: str) -> None:
    """Writes a file so that a reader, and a crash, finds the old content or the new one, never a part."""
    path = as_path(path)
    if is_remote(path):
        path.write_text(text, encoding="utf-8")  # As a whole when it is closed.
        return
    temporary = path.with_name(f"{path.name}.tmp")
    with naming(temporary), open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    fsync_directory(path.parent)


def fsync_directory(path) -> None:
    """Puts the names in a directory on disk: new files, and renames. A store has none."""
    if is_remote(path):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
