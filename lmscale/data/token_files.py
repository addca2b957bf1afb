"""Prepared directories: a vocabulary, one file of ids per split, and a manifest that vouches for them.

    vocab.txt                       one `token<TAB>count` per line in id order, sorted by falling count
    train.bin valid.bin test.bin    ids without header, little-endian: uint16 up to 65,536 rows, else int32
    tokenizer.*                     what a learned or given tokenizer needs to read more text the same way
    manifest.json                   sizes and SHA-256 of the files above, the counts, the options

`PreparedData` reads one; `lmscale.data.prepared_directory` writes it.
"""

import functools
import hashlib
import json
import os
from pathlib import Path

import numpy as np

from lmscale.data.vocab import Vocabulary, VocabularyFile
from lmscale.storage import as_path, is_remote

SPLITS = ("train", "valid", "test")
FORMAT = "lmscale prepared data"
FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
VOCAB_FILE = "vocab.txt"
TOKENIZER_FILE_PREFIX = "tokenizer."
_CHUNK_BYTES = 1 << 22


def token_dtype(vocab_size: int) -> np.dtype:
    """The type of the ids in token files."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<i4")


def token_file_name(split: str) -> str:
    """The name of a split's file of ids."""
    return f"{split}.bin"


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

    def __init__(self, directory: Path, *, manifest: dict, with_words: bool = True):
        """Use `PreparedData.open`, which checks what it reads."""
        self._with_words = with_words
        self.directory = directory
        self.manifest = manifest
        self.vocab_size: int = manifest["vocabulary"]["size"]
        self.eos_id: int = manifest["vocabulary"]["eos_id"]
        self.unk_id: int = manifest["vocabulary"]["unk_id"]
        self._splits: dict[str, np.ndarray] = {}

    @classmethod
    def open(
        cls, directory: str | os.PathLike, *, verify: bool = True, with_words: bool = True
    ) -> "PreparedData":
        """Opens a directory written by `python -m lmscale.prepare`.

        Args:
          directory: its path.
          verify: also read every file once, in bounded memory, to compare its SHA-256 with the manifest and
            to check that every id is below vocab_size. Presence and sizes are always checked.
          with_words: whether `vocabularies` is to know the words, which takes memory for each.
        Raises:
          ValueError: saying which file is missing, malformed, or not the one that the manifest describes.
        """
        directory = as_path(directory)
        manifest = _text_manifest(directory)
        data = cls(directory, manifest=manifest, with_words=with_words)
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
        if with_words and len(data.vocabulary) != data.vocab_size:
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
    def vocabularies(self) -> dict[str, Vocabulary | VocabularyFile]:
        """{name: `Vocabulary`} that tables can have rows of (`TableConfig.vocabulary`): that of the text, "words"."""
        if self._with_words:
            return {"words": self.vocabulary}
        entry = self.manifest["vocabulary"]
        path = self.directory / VOCAB_FILE
        return {"words": VocabularyFile(path=path, size=entry["size"], sha256=entry["sha256"])}

    @property
    def vocabulary_files(self) -> dict[str, Path]:
        """{name: path} of the files of `vocabularies`."""
        return {"words": self.directory / VOCAB_FILE}

    @property
    def rows_text(self) -> str:
        """Rows of its tables, as messages tell them."""
        return " and ".join(f"{len(words):,}" for words in self.vocabularies.values())

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of the vocabulary's and the token files' checksums: equal for equal ids and tokens."""
        files = _described_files(self.manifest)
        lines = [f"{name} {files[name]['sha256']}\n" for name in (VOCAB_FILE, *map(token_file_name, SPLITS))]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def split(self, name: str) -> np.ndarray:
        """The ids of a split, [tokens], as a read-only memory map; of a store, in memory.

        The file is mapped once: who replaces the directory later does not change what a run reads.

        Raises:
          ValueError: if there is no such split.
        """
        if name not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}. Received: {name!r}.")
        if name not in self._splits:
            path = self.directory / token_file_name(name)
            dtype = token_dtype(self.vocab_size)
            if is_remote(path):
                self._splits[name] = np.frombuffer(path.read_bytes(), dtype=dtype)
            else:
                self._splits[name] = np.memmap(path, dtype=dtype, mode="r")
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
                        f"{self.directory / token_file_name(name)}: ids must be in 0 .. {self.vocab_size - 1}. "
                        f"Received: {part[place]} at position {start + place:,}. Prepare the data again."
                    )


def _described_files(manifest: dict) -> dict[str, dict]:
    """Manifest entries (bytes, sha256) by file name."""
    splits = [manifest["splits"][split] for split in SPLITS]
    entries = [manifest["vocabulary"], *splits, *manifest["tokenizer_files"]]
    return {entry["file"]: entry for entry in entries}


def read_manifest(directory: Path) -> dict:
    """The manifest of a prepared directory of any kind.

    Raises:
      ValueError: if there is none, or it is not one that this version reads.
    """
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
    return manifest


def _text_manifest(directory: Path) -> dict:
    """The manifest of a text, with everything that `PreparedData` relies on checked."""
    manifest, path = read_manifest(directory), directory / MANIFEST_FILE
    if "kind" in manifest:
        raise ValueError(
            f"{path}: must be of a text. Received: {manifest['kind']}. Prepare a text, with --format=text."
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
