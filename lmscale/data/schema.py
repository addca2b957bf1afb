"""The schema of a table: what its columns hold, declared in a JSON file, and values read by it."""

import dataclasses
import difflib
import hashlib
import json
from pathlib import Path

import numpy as np

from lmscale.data.columns import Column

KINDS = ("categorical", "bag", "class", "number")
_LARGEST_NUMBER = float(np.finfo(np.float32).max)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ColumnSchema:
    """One column of a table.

    Attributes:
      kind: "categorical", one value, unknown ones allowed; "bag", any number of them; "class", one value, each of which
        the training must have; "number".
      vocabulary: name of what its values are looked up in; columns may share one. None for the column's own name.
      separator: between the values of a bag in a CSV file; one of TFRecord files has a list.
      buckets: the values are hashed into so many ids, in place of a vocabulary; None for a vocabulary.
      min_count: values seen fewer times in the training data are unknown.
      max_size: rows of the vocabulary at most, the unknown one included; None for no limit.
    """

    kind: str
    vocabulary: str | None = None
    separator: str = " "
    buckets: int | None = None
    min_count: int = 1
    max_size: int | None = None

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}. Received: {self.kind!r}.")
        if self.kind == "number":
            # All but the separator, whose default is a value.
            of_words = {"vocabulary": None, "buckets": None, "min_count": 1, "max_size": None}
            given = [name for name, default in of_words.items() if getattr(self, name) != default]
            if given:
                raise ValueError(
                    f"A number has no vocabulary. Received: {given[0]}={getattr(self, given[0])!r}. Leave it out."
                )
        # It is part of a file's name.
        if self.vocabulary is not None and not (
            isinstance(self.vocabulary, str) and self.vocabulary.isidentifier()
        ):
            raise ValueError(f"vocabulary must be letters, digits and _. Received: {self.vocabulary!r}.")
        if not isinstance(self.separator, str) or not self.separator:
            raise ValueError(f"separator must be a text, not empty. Received: {self.separator!r}.")
        for name in ("buckets", "min_count", "max_size"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{name} must be a whole number from 1 on. Received: {value!r}.")
        if self.kind == "class" and self.buckets is not None:
            raise ValueError(
                f"A class must not be hashed: two would be one. Received: buckets={self.buckets}. Leave it out."
            )

    @property
    def column(self) -> Column:
        """What the prepared column holds."""
        types = {"categorical": "ids", "class": "ids", "bag": "lists", "number": "numbers"}
        return Column(type=types[self.kind], vocabulary=self.vocabulary)


def read_schema(path: Path) -> dict[str, ColumnSchema]:
    """{column: `ColumnSchema`} of a file {"columns": {name: {"kind": ...}}}, every vocabulary named.

    Raises:
      ValueError: for anything that it must not hold, with the column.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_without_duplicates)
    except OSError as error:
        raise ValueError(f"--schema must name a file. Received: {path} ({error.strerror}).") from error
    except ValueError as error:
        raise ValueError(f"{path} must be JSON. Received: {error}.") from error
    columns = content.get("columns") if isinstance(content, dict) else None
    if not isinstance(columns, dict) or not columns:
        raise ValueError(
            f'{path} must hold {{"columns": {{NAME: {{"kind": ...}}, ...}}}}. Received: {str(content)[:80]}.'
        )
    found = {}
    known = [field.name for field in dataclasses.fields(ColumnSchema)]
    for name, entry in columns.items():
        if not isinstance(entry, dict) or "kind" not in entry or set(entry) - set(known):
            raise ValueError(
                f"{path}: the column {name!r} must have kind, and of {', '.join(known)} no others. Received: {entry!r}."
            )
        if not name.isidentifier():
            raise ValueError(f"{path}: a column's name must be letters, digits and _. Received: {name!r}.")
        try:
            column = ColumnSchema(**entry)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: the column {name!r}: {error}") from error
        if column.kind != "number" and column.vocabulary is None:
            column = dataclasses.replace(column, vocabulary=name)
        found[name] = column
    _check_shared(found, path)
    return found


def bucket(value: str, num_buckets: int) -> int:
    """The id that a value is hashed into: the same on every machine."""
    return int.from_bytes(hashlib.blake2b(value.encode(), digest_size=8).digest(), "little") % num_buckets


def parse_number(text) -> float:
    """A number that is finite in float32, as which it is kept; ValueError for anything else."""
    number = float(text)
    if not abs(number) <= _LARGEST_NUMBER:
        raise ValueError(f"must be finite in float32. Received: {text!r}.")
    return number


def did_you_mean(value: str, known) -> str:
    """A sentence with the nearest of the known values; empty if none is near."""
    near = difflib.get_close_matches(value, list(known)[:10_000], n=3)
    return f" Did you mean {' or '.join(map(repr, near))}?" if near else ""


def _without_duplicates(pairs):
    """A dict of the pairs of a JSON object; ValueError for a key that is there twice, of which JSON keeps the last."""
    keys = [key for key, _ in pairs]
    twice = [key for i, key in enumerate(keys) if key in keys[:i]]
    if twice:
        raise ValueError(f"the key {twice[0]!r} is there twice")
    return dict(pairs)


def _check_shared(columns, path):
    """Raises ValueError where columns of one vocabulary disagree about it."""
    first: dict = {}
    for name, column in columns.items():
        if column.vocabulary is None:
            continue
        settings = {
            "kind": "class" if column.kind == "class" else "categorical",
            "buckets": column.buckets,
            "min_count": column.min_count,
            "max_size": column.max_size,
        }
        other, there = first.setdefault(column.vocabulary, (name, settings))
        if settings != there:
            raise ValueError(
                f"{path}: columns of one vocabulary must agree about it. Received: {column.vocabulary!r} with {there} "
                f"of {other!r} and {settings} of {name!r}. Give one of them another vocabulary."
            )
