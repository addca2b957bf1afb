"""Prepared directories of examples rather than of text: columns of ids, of lists of ids and of numbers."""

import dataclasses
import functools
import hashlib
import os
from pathlib import Path

import numpy as np

from lmscale.data.token_files import MANIFEST_FILE, SPLITS, file_sha256, read_manifest, token_dtype
from lmscale.data.vocab import UnnamedVocabulary, Vocabulary
from lmscale.storage import as_path, is_remote

KIND = "columns"
TYPES = ("ids", "lists", "numbers")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Column:
    """What a column holds.

    Attributes:
      type: "ids", one of the vocabulary in each example; "lists", any number of them, in order; or `dim` "numbers".
      vocabulary: name of the vocabulary of ids; None of numbers.
      dim: numbers in each example.
    """

    type: str
    vocabulary: str | None = None
    dim: int = 1


@dataclasses.dataclass(frozen=True)
class Lists:
    """Lists of ids, one an example: example i has `values[offsets[i] : offsets[i + 1]]`."""

    values: np.ndarray
    offsets: np.ndarray

    def __len__(self):
        return len(self.offsets) - 1

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """[examples] int64."""
        return np.diff(self.offsets)

    def padded(self, examples, length: int, *, padding: int = 0) -> np.ndarray:
        """The last `length` ids of each of some examples.

        Args:
          examples: [n] int, numbers of examples.
          length: ids of each.
          padding: what follows a shorter list.

        Returns:
          [n, length] int32.
        """
        stops = self.offsets[np.asarray(examples) + 1]
        starts = np.maximum(self.offsets[np.asarray(examples)], stops - length)
        return self.between(starts, stops, length, padding=padding)

    def between(self, starts, stops, length: int, *, padding: int = 0) -> np.ndarray:
        """[n, length] int32: `values[starts[i] : stops[i]]`, at most `length` each, and `padding` behind."""
        places = np.asarray(starts)[:, None] + np.arange(length)
        inside = places < np.asarray(stops)[:, None]
        found = self.values[np.where(inside, places, 0)] if len(self.values) else np.zeros_like(places)
        # Files of few ids hold uint16, which has no negative padding.
        return np.where(inside, found.astype(np.int32), np.int32(padding))


class PreparedColumns:
    """A prepared directory of examples, read-only.

    Attributes:
      directory: where it is.
      manifest: the content of manifest.json.
      columns: {name: `Column`}.
    """

    def __init__(self, directory: Path, *, manifest: dict):
        """Use `PreparedColumns.open`, which checks what it reads."""
        self.directory = directory
        self.manifest = manifest
        self.columns = {name: Column(**entry) for name, entry in manifest["columns"].items()}
        self._read: dict[str, np.ndarray] = {}

    @classmethod
    def open(cls, directory: str | os.PathLike) -> "PreparedColumns":
        """Opens a directory that `python -m lmscale.prepare` wrote, and compares its files with the manifest.

        Raises:
          ValueError: saying which file is missing, malformed, or not the one that the manifest describes.
        """
        directory = as_path(directory)
        manifest = read_manifest(directory)
        if manifest.get("kind") != KIND:
            raise ValueError(
                f"{directory / MANIFEST_FILE}: must be of examples in columns. Received: "
                f"{manifest.get('kind', 'text')}. Prepare it with --format=histories or --format=table."
            )
        data = cls(directory, manifest=manifest)
        for entry in data.file_entries():
            path = directory / entry["file"]
            if not path.is_file():
                raise ValueError(f"{path}: missing, but listed in {MANIFEST_FILE}. Prepare the data again.")
            if path.stat().st_size != entry["bytes"] or file_sha256(path) != entry["sha256"]:
                raise ValueError(
                    f"{path}: must have {entry['bytes']:,} bytes and SHA-256 {entry['sha256']} by {MANIFEST_FILE}. "
                    "The file is damaged or was replaced: prepare again."
                )
        return data

    def file_entries(self) -> list[dict]:
        """{"file", "bytes", "sha256", ...} of each file."""
        found = [entry for entry in self.manifest["vocabularies"].values() if "file" in entry]
        for split in self.manifest["splits"].values():
            for parts in split["columns"].values():
                found += parts.values()
        return found

    @functools.cached_property
    def vocabularies(self) -> dict[str, Vocabulary | UnnamedVocabulary]:
        """{name: vocabulary} that tables can have rows of (`TableConfig.vocabulary`)."""
        found: dict[str, Vocabulary | UnnamedVocabulary] = {}
        for name, entry in self.manifest["vocabularies"].items():
            if "file" in entry:
                text = (self.directory / entry["file"]).read_bytes().decode("utf-8")
                found[name] = Vocabulary.from_text(text, required=())
            else:
                found[name] = UnnamedVocabulary(size=entry["size"])
        return found

    @property
    def vocabulary_files(self) -> dict[str, Path]:
        """{name: path} of the files of `vocabularies`, of those whose ids have words."""
        entries = self.manifest["vocabularies"].items()
        return {name: self.directory / entry["file"] for name, entry in entries if "file" in entry}

    @property
    def rows_text(self) -> str:
        """Rows of its tables, as messages tell them."""
        return " and ".join(f"{entry['size']:,}" for entry in self.manifest["vocabularies"].values())

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of the checksums of all files and of what the columns are: equal for equal examples."""
        lines = [f"{entry['file']} {entry['sha256']}\n" for entry in self.file_entries()]
        lines += [f"{name} {entry}\n" for name, entry in sorted(self.manifest["columns"].items())]
        return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()

    def num_examples(self, split: str) -> int:
        """Examples of a split."""
        return self._split(split)["examples"]

    def column(self, split: str, name: str) -> np.ndarray | Lists:
        """A column of a split: [examples] ids, [examples, dim] numbers, or `Lists`; memory maps.

        Raises:
          ValueError: if there is no such split or column.
        """
        parts = self._split(split)["columns"]
        if name not in parts:
            raise ValueError(
                f"A column must be one of those of the data, {', '.join(parts)}. Received: {name!r}."
            )
        column, entries = self.columns[name], parts[name]
        if column.type == "numbers":
            return self._array(entries["values"], np.dtype("<f4")).reshape(-1, column.dim)
        ids = self._array(
            entries["values"], token_dtype(self.manifest["vocabularies"][column.vocabulary]["size"])
        )
        if column.type == "ids":
            return ids
        return Lists(ids, self._array(entries["offsets"], np.dtype("<i8")))

    def _split(self, name):
        if name not in self.manifest["splits"]:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}. Received: {name!r}.")
        return self.manifest["splits"][name]

    def _array(self, entry, dtype):
        """A file as an array; mapped once: who replaces the directory later does not change what a run reads."""
        name = entry["file"]
        if name not in self._read:
            path = self.directory / name
            if is_remote(path) or not entry["bytes"]:
                self._read[name] = np.frombuffer(path.read_bytes(), dtype=dtype)
            else:
                self._read[name] = np.memmap(path, dtype=dtype, mode="r")
        return self._read[name]


class ColumnsWriter:
    """Writes columns through a `PreparedDirectoryWriter`, and gathers what the manifest says of them."""

    def __init__(self, writer):
        """`writer`: `PreparedDirectoryWriter`, open."""
        self._writer = writer
        self._manifest: dict = {"kind": KIND, "vocabularies": {}, "columns": {}, "splits": {}}

    def vocabulary(self, name: str, vocabulary: Vocabulary | UnnamedVocabulary) -> None:
        """Writes the words of ids, if they have any."""
        entry = {"size": len(vocabulary)}
        if isinstance(vocabulary, Vocabulary):
            entry |= self._writer.write_file(f"vocab.{name}.txt", vocabulary.to_text().encode())
        self._manifest["vocabularies"][name] = entry

    def column(self, name: str, column: Column) -> None:
        """Declares a column, before its values."""
        self._manifest["columns"][name] = {
            key: value for key, value in dataclasses.asdict(column).items() if value is not None
        }

    def split(self, name: str, columns: dict, **told) -> None:
        """Writes the columns of a split.

        Args:
          name: "train", "valid" or "test".
          columns: {name: [examples] ids, [examples, dim] numbers, or `Lists`}.
          told: what else the manifest says of the split.
        """
        entries: dict[str, dict] = {}
        sizes = set()
        for column_name, values in columns.items():
            sizes.add(len(values))
            column = Column(**self._manifest["columns"][column_name])
            parts = (
                {"values": values.values, "offsets": values.offsets}
                if isinstance(values, Lists)
                else {"values": values}
            )
            entries[column_name] = {}
            for part, array in parts.items():
                dtype = np.dtype("<i8" if part == "offsets" else "<f4")
                if part == "values" and column.type != "numbers":
                    dtype = token_dtype(self._manifest["vocabularies"][column.vocabulary]["size"])
                content = np.ascontiguousarray(array, dtype).tobytes()
                entries[column_name][part] = self._writer.write_file(
                    f"column.{name}.{column_name}.{part}.bin", content
                )
        (examples,) = sizes
        self._manifest["splits"][name] = {"examples": examples, "columns": entries, **told}

    def finish(self, *, options: dict, inputs: dict) -> None:
        """Writes the manifest and puts the directory in its place."""
        self._writer.finish({"options": options, "inputs": inputs, **self._manifest})
