"""How a prepared directory comes to be: in a hidden folder, complete or not at all, one process at a time."""

import contextlib
import fcntl
import glob
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
from pathlib import Path
from typing import Any

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

# Hidden folders beside a new directory, which end in its place, and those inside of a directory that is there. A
# folder beside one directory is an entry of the parent, and must not be taken for a folder inside of that.
_BESIDE = ".partial-"
_INSIDE = ".lmscale-partial-"
# In a folder inside: the files of the directory that may be removed while there is no manifest, {name: inodes} of the
# old file and the new one. It is written before the old manifest goes.
_MOVING_FILE = "moving.json"
# Of files that a manifest lists, beside the fixed ones: of tokenizers, columns and their vocabularies.
_LISTED_PREFIXES = (TOKENIZER_FILE_PREFIX, "column.", "vocab.")
_FIXED_NAMES = (MANIFEST_FILE, VOCAB_FILE, *map(token_file_name, SPLITS))

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
        self._final = _resolved(directory)
        self._in_place = self._final.is_dir()
        self._names: list[str] = []
        self._old_names: list[str] = []
        self._finished = False
        self._lock: int | None = None
        if self._in_place and not replace and not is_empty(self._final):
            raise ValueError(f"{directory}: must be new or empty. Received: {sorted(os.listdir(directory))}.")
        self._made_parents = [p for p in self._final.parents if not p.exists()]
        self.folder = _partial_folder(self._final)
        try:
            self._final.parent.mkdir(parents=True, exist_ok=True)
            self._make_folder()
            remove_abandoned_folders(directory, besides=self.folder)
        except BaseException as error:
            self._remove()
            if isinstance(error, OSError):
                raise _cannot_be_written(directory, error) from error
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
            present = set(os.listdir(self._final))
            old_names = sorted(_our_names(self._final) & present)
            foreign = sorted(present.intersection(names).difference(old_names))
            if foreign:
                raise ValueError(
                    f"{self._final}: must not be filled by others while it is prepared. Received: {foreign}, which "
                    "are left alone. Choose another output."
                )
            moving = {
                name: [
                    path.stat().st_ino for path in (self.folder / name, self._final / name) if path.exists()
                ]
                for name in {*names, *old_names}
            }
            (self.folder / _MOVING_FILE).write_text(json.dumps(moving))
            self._old_names = old_names
            self._names = [*(name for name in names if name != MANIFEST_FILE), MANIFEST_FILE]
            self._move_in()
        else:
            self.folder.rename(self._final)
            self._finish()

    def _move_in(self):
        """Moves the files out of the folder. Called again after an interruption, it does the rest."""
        if (self.folder / MANIFEST_FILE).exists():
            (self._final / MANIFEST_FILE).unlink(missing_ok=True)
            for name in self._old_names:
                if name not in self._names:
                    (self._final / name).unlink(missing_ok=True)
            for name in self._names:
                if (self.folder / name).exists():
                    (self.folder / name).replace(self._final / name)
        (self.folder / _MOVING_FILE).unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError):
            self.folder.rmdir()
        self._finish()

    def _make_folder(self):
        """Makes the hidden folder and locks it.

        A plain folder, unlike a temporary one, has the mode of the user and the group of the parent. Another process
        may take it for one that was left behind, until it is locked: then the next one.
        """
        while True:
            try:
                self.folder.mkdir()
                self._lock = _lock(self.folder)
            except (FileExistsError, BlockingIOError, FileNotFoundError):
                if not self.folder.parent.is_dir():
                    raise
            except OSError:
                if not self.folder.is_dir():
                    raise
                return  # A file system without locks.
            else:
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(self._lock), self.folder.stat()):
                        return
                _unlock(self._lock)
                self._lock = None
            self.folder = _partial_folder(self._final)

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
    names = _our_names(directory)
    return all(_is_inside_folder(p) or (p.name in names and p.is_file()) for p in _entries(directory))


def remove_abandoned_folders(directory: Path, *, besides: Path | None = None) -> None:
    """Removes what processes left behind which were killed while they wrote a prepared directory, and says so.

    Args:
      directory: the final place.
      besides: the hidden folder of this process.
    Raises:
      ValueError: if the process of such a folder is alive.
    """
    final = _resolved(directory)
    if final.is_dir():
        folders = [path for path in _entries(final) if _is_inside_folder(path)]
    else:
        pattern = re.compile(_pattern(f".{final.name}{_BESIDE}"))
        beside = final.parent.glob(f".{glob.escape(final.name)}{_BESIDE}*")  # None where it cannot be listed.
        folders = [path for path in beside if pattern.fullmatch(path.name)]
    for folder in folders:
        if folder == besides or not folder.is_dir():
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
        if _is_inside_folder(folder) and not _has_our_manifest(final):
            # Moved out of the folder already, or not yet removed; the manifest would have come last.
            for name in _moving_names(folder):
                (final / name).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        _unlock(lock)


def _entries(directory: Path) -> list[Path]:
    """What is in a folder, without what file systems put there: at mount points, for deleted files in use."""
    return [p for p in directory.iterdir() if p.name != "lost+found" and not p.name.startswith(".nfs")]


def _our_names(directory: Path) -> set[str]:
    """The names of files in a folder that are of this module: of the manifest there, or of a move that was killed."""
    manifest = _json_object(directory / MANIFEST_FILE)
    if manifest.get("format") != FORMAT:
        return set().union(*map(_moving_names, filter(_is_inside_folder, _entries(directory))))
    return {*_FIXED_NAMES, *filter(_is_listed_file, _listed_files(manifest))}


def _listed_files(value) -> list[Any]:
    """Every "file" in what a manifest holds, however deep."""
    if isinstance(value, list):
        return [name for entry in value for name in _listed_files(entry)]
    if isinstance(value, dict):
        found = [name for entry in value.values() for name in _listed_files(entry)]
        return [*found, value["file"]] if "file" in value else found
    return []


def _moving_names(folder: Path) -> set[str]:
    """What a process that was killed while it moved files out of a hidden folder may have left in the directory."""
    moving = _json_object(folder / _MOVING_FILE)
    names = {name for name in moving if name in _FIXED_NAMES or _is_listed_file(name)}
    return {
        name
        for name in names & set(os.listdir(folder.parent))
        if isinstance(moving[name], list) and (folder.parent / name).lstat().st_ino in moving[name]
    }


def _is_listed_file(name) -> bool:
    """Whether it is a name that only this module gives: a manifest could list any."""
    return isinstance(name, str) and name.startswith(_LISTED_PREFIXES) and "/" not in name


def _json_object(path: Path) -> dict:
    """What a file holds; empty if it is not there or holds anything else."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _has_our_manifest(directory: Path) -> bool:
    return _json_object(directory / MANIFEST_FILE).get("format") == FORMAT


def _pattern(prefix: str) -> str:
    return re.escape(prefix) + "[0-9a-f]{8}"


def _is_inside_folder(path: Path) -> bool:
    return re.fullmatch(_pattern(_INSIDE), path.name) is not None and path.is_dir() and not path.is_symlink()


def _partial_folder(final: Path) -> Path:
    """A hidden folder that is to be made."""
    end = secrets.token_hex(4)
    return final / f"{_INSIDE}{end}" if final.is_dir() else final.parent / f".{final.name}{_BESIDE}{end}"


def _resolved(directory: Path) -> Path:
    """The final place without links. `Path.resolve` differs between versions of Python where links go in a circle."""
    final = Path(os.path.realpath(directory))
    for path in (final, *final.parents):
        if path.is_symlink():
            raise ValueError(
                f"{directory}: the output must lead to a place. Received: {path}, a link that leads back to itself. "
                "Choose another output, or remove the link."
            )
    return final


def _cannot_be_written(directory: Path, error: OSError) -> OSError:
    reason = error.strerror
    for path in directory.parents:
        if path.exists() and not path.is_dir():
            reason = f"{path} is a file. Choose another output"
    return OSError(f"{directory}: the output cannot be written there: {reason}.")


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


def _unlock(descriptor: int | None) -> None:
    if descriptor is not None:
        os.close(descriptor)
