"""How a prepared directory comes to be: in a hidden folder, complete or not at all, one process at a time."""

import contextlib
import fcntl
import glob
import hashlib
import json
import logging
import os
import secrets
import shutil
from pathlib import Path

import numpy as np

from lmscale import paths
from lmscale.data.token_files import (
    FORMAT,
    FORMAT_VERSION,
    MANIFEST_FILE,
    SPLITS,
    TOKENIZER_FILE_PREFIX,
    VOCAB_FILE,
    token_dtype,
    token_file_name,
)

_PARTIAL = ".partial-"

_logger = logging.getLogger(__name__)


class PreparedDirectoryWriter:
    """Writes a prepared directory in a hidden folder, and puts it in its place when it is complete.

    A directory that is there already stays, with its mode: the hidden folder is inside it, and at the end the files
    come out and replace the old ones, which whoever has them open or mapped goes on reading. So it may be a mount
    point or the current directory. The manifest goes first and comes last: nobody takes a half for the whole.

    Use as a context manager. Leaving the block without `finish` (an error, an interrupt) removes what was
    written, and the parent folders made for it.
    """

    def __init__(self, directory: Path, *, replace: bool = False):
        """Makes the hidden folder.

        Args:
          directory: the final place: new, empty, or with `replace`, `is_replaceable`.
          replace: whether a prepared directory may be there already, to be replaced at the end.
        Raises:
          ValueError: if the directory holds data and `replace` is not set, or another process prepares it.
          OSError: if the folder cannot be made.
        """
        self._final = directory.resolve()
        self._in_place = self._final.is_dir()
        self._names: list[str] = []
        self._finished = False
        if self._in_place and not replace and not is_empty(self._final):
            raise ValueError(f"{directory}: must be new or empty. Received: {sorted(os.listdir(directory))}.")
        self._made_parents = [p for p in self._final.parents if not p.exists()]
        try:
            self._final.parent.mkdir(parents=True, exist_ok=True)
            self.folder = _new_partial_folder(self._final)
        except OSError as error:
            self._remove_made_parents()
            raise OSError(f"{directory}: the output cannot be written there: {error.strerror}.") from error
        self._lock = _try_to_lock(self.folder)
        try:
            remove_abandoned_folders(directory, besides=self.folder)
        except BaseException:
            self._remove()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        if self._finished:
            return
        if self._names:  # Interrupted while the files were moved, when the old data were gone already.
            self._move_in()
        else:
            self._remove()

    def write_file(self, name: str, content: bytes) -> dict:
        """Writes a whole file. Returns its manifest entry."""
        with paths.naming(self.folder / name):
            (self.folder / name).write_bytes(content)
        return {"file": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    def token_file(self, split: str, *, vocab_size: int) -> "TokenFileWriter":
        """A writer of the ids of one split."""
        return TokenFileWriter(self.folder / token_file_name(split), vocab_size=vocab_size)

    def finish(self, manifest: dict):
        """Writes the manifest last, and puts the directory in its place.

        Args:
          manifest: all but the keys "format" and "format_version".
        """
        manifest = {"format": FORMAT, "format_version": FORMAT_VERSION, **manifest}
        content = json.dumps(manifest, ensure_ascii=False, indent=2) + "\n"
        # File names need not be UTF-8.
        with paths.naming(self.folder / MANIFEST_FILE):
            (self.folder / MANIFEST_FILE).write_bytes(content.encode("utf-8", "backslashreplace"))
        if self._in_place:
            names = os.listdir(self.folder)
            self._names = [*(name for name in names if name != MANIFEST_FILE), MANIFEST_FILE]
            self._move_in()
        else:
            self.folder.rename(self._final)
            self._finish()

    def _move_in(self):
        """Moves the files out of the folder. Called again after an interruption, it does the rest."""
        if (self.folder / MANIFEST_FILE).exists():
            (self._final / MANIFEST_FILE).unlink(missing_ok=True)
            for path in _entries(self._final):
                if path.name not in self._names and _is_ours(path) and path.is_file():
                    path.unlink()
            for name in self._names:
                if (self.folder / name).exists():
                    (self.folder / name).replace(self._final / name)
        with contextlib.suppress(FileNotFoundError):
            self.folder.rmdir()
        self._finish()

    def _finish(self):
        self._finished = True
        _unlock(self._lock)

    def _remove(self):
        shutil.rmtree(self.folder, ignore_errors=True)
        _unlock(self._lock)
        self._remove_made_parents()

    def _remove_made_parents(self):
        for parent in self._made_parents:  # The innermost first.
            try:
                parent.rmdir()
            except OSError:
                return


class TokenFileWriter:
    """Appends ids to a token file, counting and hashing them. Use as a context manager."""

    def __init__(self, path: Path, *, vocab_size: int):
        self._path, self._dtype = path, token_dtype(vocab_size)
        self._digest = hashlib.sha256()
        self.num_tokens = 0

    def __enter__(self):
        self._file = self._path.open("wb")
        return self

    def __exit__(self, *exc_info):
        with paths.naming(self._path):
            self._file.close()

    def append(self, ids: np.ndarray):
        """Adds ids, [any number] integer, all below vocab_size."""
        content = ids.astype(self._dtype).tobytes()
        self._digest.update(content)
        with paths.naming(self._path):
            self._file.write(content)
        self.num_tokens += len(ids)

    def entry(self) -> dict:
        """What the manifest says of the file."""
        return {
            "file": self._path.name,
            "bytes": self.num_tokens * self._dtype.itemsize,
            "sha256": self._digest.hexdigest(),
        }


def is_empty(directory: Path) -> bool:
    """Whether nothing is in a folder, but for what file systems put there themselves."""
    return not _entries(directory)


def is_replaceable(directory: Path) -> bool:
    """Whether a folder is empty, or was made by this module and holds nothing else: safe to replace."""
    entries = _entries(directory)
    if not all(map(_is_ours, entries)):
        return False
    # Who is killed while files are moved leaves no manifest, but its hidden folder.
    return not entries or any(map(_is_partial_folder, entries)) or _has_our_manifest(directory)


def remove_abandoned_folders(directory: Path, *, besides: Path | None = None) -> None:
    """Removes what processes left behind which were killed while they wrote a prepared directory, and says so.

    Args:
      directory: the final place.
      besides: the hidden folder of this process.
    Raises:
      ValueError: if the process of such a folder is alive.
    """
    final = directory.resolve()
    in_place = final.is_dir()
    folders = _entries(final) if in_place else final.parent.glob(f"{glob.escape(_partial_prefix(final))}*")
    for folder in folders:
        if not _is_partial_folder(folder) or folder == besides:
            continue
        try:
            lock = _lock(folder)
        except BlockingIOError as error:
            raise ValueError(
                f"Only one process at a time may prepare {directory}. Received: {folder.name}, of one that "
                "runs. Wait for it, or choose another output."
            ) from error
        except OSError:  # A file system without locks: nobody knows.
            continue
        _logger.warning("Removing %s, which a preparation that was killed has left behind.", folder)
        if in_place and besides is None and is_replaceable(final) and not _has_our_manifest(final):
            # Moved out of the folder already; the manifest would have come last.
            for path in _entries(final):
                if path.is_file():
                    path.unlink()
        shutil.rmtree(folder, ignore_errors=True)
        _unlock(lock)


def _entries(directory: Path) -> list[Path]:
    """What is in a folder, without what file systems put there: at mount points, for deleted files in use."""
    return [p for p in directory.iterdir() if p.name != "lost+found" and not p.name.startswith(".nfs")]


def _is_ours(path: Path) -> bool:
    if path.is_dir():
        return _is_partial_folder(path)
    ours = {MANIFEST_FILE, VOCAB_FILE, *map(token_file_name, SPLITS)}
    return path.is_file() and (path.name in ours or path.name.startswith(TOKENIZER_FILE_PREFIX))


def _has_our_manifest(directory: Path) -> bool:
    try:
        return json.loads((directory / MANIFEST_FILE).read_bytes())["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _partial_prefix(final: Path) -> str:
    return f".{final.name}{_PARTIAL}"


def _is_partial_folder(path: Path) -> bool:
    return path.name.startswith(".") and _PARTIAL in path.name and path.is_dir()


def _new_partial_folder(final: Path) -> Path:
    """Makes it. A plain folder, unlike a temporary one, has the mode of the user and the group of the parent."""
    parent = final if final.is_dir() else final.parent
    folder = parent / f"{_partial_prefix(final)}{secrets.token_hex(4)}"
    folder.mkdir()
    return folder


def _lock(folder: Path) -> int:
    """Marks a folder as that of a living process. A lock goes with its process, however that ends.

    Returns:
      A file descriptor that holds the lock.
    Raises:
      BlockingIOError: if another process has it.
      OSError: if the file system has no locks.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _try_to_lock(folder: Path) -> int | None:
    try:
        return _lock(folder)
    except OSError:
        return None


def _unlock(descriptor: int | None) -> None:
    if descriptor is not None:
        os.close(descriptor)
