"""Prepared directories: a vocabulary, one file of ids per split, and a manifest that vouches for them.

    vocab.txt                       one `token<TAB>count` per line in id order, sorted by falling count
    train.bin valid.bin test.bin    ids without header, little-endian: uint16 up to 65,536 rows, else int32
    tokenizer.*                     what a learned or given tokenizer needs to read more text the same way
    manifest.json                   sizes and SHA-256 of the files above, the counts, the options

`PreparedDirectoryWriter` writes one, `PreparedData` reads it.
"""

import contextlib
import fcntl
import functools
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
from lmscale.data.vocab import Vocabulary

SPLITS = ("train", "valid", "test")
FORMAT = "lmscale prepared data"
FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
VOCAB_FILE = "vocab.txt"
TOKENIZER_FILE_PREFIX = "tokenizer."
_CHUNK_BYTES = 1 << 22
_PARTIAL = ".partial-"

_logger = logging.getLogger(__name__)


def token_dtype(vocab_size: int) -> np.dtype:
    """The type of the ids in token files."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<i4")


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


class PreparedData:
    """A prepared directory, read-only.

    Attributes:
      directory: where it is.
      manifest: the content of manifest.json.
      vocab_size: rows of the vocabulary, `<unk>` and `<eos>` included.
      eos_id, unk_id: their ids.
    """

    def __init__(self, directory: Path, *, manifest: dict):
        """Use `PreparedData.open`, which checks what it reads."""
        self.directory = directory
        self.manifest = manifest
        self.vocab_size: int = manifest["vocabulary"]["size"]
        self.eos_id: int = manifest["vocabulary"]["eos_id"]
        self.unk_id: int = manifest["vocabulary"]["unk_id"]
        self._splits: dict[str, np.ndarray] = {}

    @classmethod
    def open(cls, directory: str | os.PathLike, *, verify: bool = True) -> "PreparedData":
        """Opens a directory written by `python -m lmscale.prepare`.

        Args:
          directory: its path.
          verify: also read every file once, in bounded memory, to compare its SHA-256 with the manifest and
            to check that every id is below vocab_size. Presence and sizes are always checked.
        Raises:
          ValueError: saying which file is missing, malformed, or not the one that the manifest describes.
        """
        directory = Path(paths.expand(directory))
        manifest = _read_manifest(directory)
        data = cls(directory, manifest=manifest)
        for name, entry in _described_files(manifest).items():
            path = directory / name
            if not path.is_file():
                raise ValueError(f"{path}: missing, but listed in {MANIFEST_FILE}. Prepare the data again.")
            if path.stat().st_size != entry["bytes"]:
                raise ValueError(
                    f"{path}: must have {entry['bytes']:,} bytes by {MANIFEST_FILE}. "
                    f"Received: {path.stat().st_size:,} bytes. "
                    "The file is damaged or was replaced: prepare again."
                )
            if verify and (digest := file_sha256(path)) != entry["sha256"]:
                raise ValueError(
                    f"{path}: must have SHA-256 {entry['sha256']} by {MANIFEST_FILE}. Received: {digest}. "
                    "The file is damaged or was replaced: prepare again."
                )
        if verify:
            data._check_ids()
        if len(data.vocabulary) != data.vocab_size:
            raise ValueError(
                f"{directory / VOCAB_FILE}: must have {data.vocab_size:,} lines by {MANIFEST_FILE}. "
                f"Received: {len(data.vocabulary):,}."
            )
        return data

    @functools.cached_property
    def vocabulary(self) -> Vocabulary:
        """Tokens and counts by id."""
        path = self.directory / VOCAB_FILE
        try:
            return Vocabulary.from_text(path.read_bytes().decode("utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @property
    def counts(self) -> np.ndarray:
        """[vocab_size] int64, how often each id occurs in the training split, falling."""
        return self.vocabulary.counts

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of the vocabulary's and the token files' checksums: equal for equal ids and tokens."""
        files = _described_files(self.manifest)
        lines = [f"{name} {files[name]['sha256']}\n" for name in (VOCAB_FILE, *map(_token_file, SPLITS))]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    @property
    def vocabulary_sha256(self) -> str:
        """Hex SHA-256 of the vocabulary: equal where ids mean the same tokens."""
        return self.manifest["vocabulary"]["sha256"]

    def split(self, name: str) -> np.ndarray:
        """The ids of a split, [tokens], as a read-only memory map.

        The file is mapped once: who replaces the directory later does not change what a run reads.

        Raises:
          ValueError: if there is no such split.
        """
        if name not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}. Received: {name!r}.")
        if name not in self._splits:
            path = self.directory / _token_file(name)
            self._splits[name] = np.memmap(path, dtype=token_dtype(self.vocab_size), mode="r")
        return self._splits[name]

    def _check_ids(self):
        for name in SPLITS:
            ids = self.split(name)
            chunk = _CHUNK_BYTES // ids.dtype.itemsize
            for start in range(0, len(ids), chunk):
                part = ids[start : start + chunk]
                outside = (part < 0) | (part >= self.vocab_size)
                if outside.any():
                    place = int(outside.argmax())
                    raise ValueError(
                        f"{self.directory / _token_file(name)}: ids must be in 0 .. {self.vocab_size - 1}. "
                        f"Received: {part[place]} at position {start + place:,}. Prepare the data again."
                    )


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
        return TokenFileWriter(self.folder / _token_file(split), vocab_size=vocab_size)

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
            for path in _entries(
                final
            ):  # Moved out of the folder already; the manifest would have come last.
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
    ours = {MANIFEST_FILE, VOCAB_FILE, *map(_token_file, SPLITS)}
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


def _token_file(split: str) -> str:
    return f"{split}.bin"


def _described_files(manifest: dict) -> dict[str, dict]:
    """Manifest entries (bytes, sha256) by file name."""
    splits = [manifest["splits"][split] for split in SPLITS]
    entries = [manifest["vocabulary"], *splits, *manifest["tokenizer_files"]]
    return {entry["file"]: entry for entry in entries}


def _read_manifest(directory: Path) -> dict:
    """The manifest, with everything that `PreparedData` relies on checked."""
    path = directory / MANIFEST_FILE
    if not path.is_file():
        state = "no such file" if directory.is_dir() else "no such directory"
        raise ValueError(
            f"{path}: {state}. A prepared directory is needed: make one with python -m lmscale.prepare."
        )
    try:
        manifest = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}. Prepare the data again.") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f'{path}: must say "format": {FORMAT!r}. Prepare the data again.')
    if manifest.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path}: format_version must be {FORMAT_VERSION}. Received: {manifest.get('format_version')!r}. "
            "It was written by another version of lmscale: prepare the data again."
        )
    numbers = {"vocabulary": ("size", "unk_id", "eos_id"), **{f"splits.{s}": ("tokens",) for s in SPLITS}}
    for place, keys in numbers.items():
        entry = manifest
        for key in place.split("."):
            entry = entry.get(key) if isinstance(entry, dict) else None  # type: ignore[assignment]
        if not _is_file_entry(entry) or any(type(entry.get(key)) is not int for key in keys):
            wanted = ", ".join(("file", "bytes", "sha256", *keys))
            raise ValueError(
                f"{path}: {place!r} must hold {wanted}. Received: {entry!r}. Prepare the data again."
            )
    tokenizer_files = manifest.setdefault("tokenizer_files", [])
    if not isinstance(tokenizer_files, list) or not all(map(_is_file_entry, tokenizer_files)):
        raise ValueError(f"{path}: 'tokenizer_files' must list file, bytes, sha256. Prepare the data again.")
    vocabulary = manifest["vocabulary"]
    if not all(0 <= vocabulary[key] < vocabulary["size"] for key in ("unk_id", "eos_id")):
        raise ValueError(f"{path}: unk_id and eos_id must be below size. Received: {vocabulary!r}.")
    for split in SPLITS:
        entry = manifest["splits"][split]
        expected = entry["tokens"] * token_dtype(vocabulary["size"]).itemsize
        if entry["tokens"] < 1 or entry["bytes"] != expected:
            raise ValueError(
                f"{path}: {entry['tokens']:,} tokens of 'splits.{split}' must take {expected:,} bytes, and "
                f"there must be one at least. Received: bytes={entry['bytes']:,}. Prepare the data again."
            )
    return manifest


def _is_file_entry(entry) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("file"), str)
        and type(entry.get("bytes")) is int
        and isinstance(entry.get("sha256"), str)
    )
