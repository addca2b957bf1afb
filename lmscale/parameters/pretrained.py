"""Rows of a table that start from pretrained word vectors."""

import array
import dataclasses
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Literal

import numpy as np

from lmscale.data.text_files import expand_patterns
from lmscale.data.vocab import Vocabulary
from lmscale.parameters import vector_files
from lmscale.parameters.vector_files import VectorFile, VectorReader
from lmscale.paths import expand

# How much of the table is handed over at once.
_WRITE_BYTES = 1 << 24

# How near the file's word is to that of the vocabulary; 0 is not found.
_SAME_BUT_FOR_CASE, _CASE_FOLDED, _EXACT = 1, 2, 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Coverage:
    """How much of a vocabulary has a pretrained vector.

    Attributes:
      file: what was read.
      num_rows: rows of the file, malformed ones included.
      num_types, num_types_found, num_types_folded: words of the vocabulary; those that have a vector; those of them
        that have it by case folding.
      num_tokens, num_tokens_found, num_tokens_folded: the same, each word as often as it occurs in the training split.
      skipped: {reason: rows of the file left out}.
    """

    file: VectorFile
    num_rows: int
    num_types: int
    num_types_found: int
    num_types_folded: int
    num_tokens: int
    num_tokens_found: int
    num_tokens_folded: int
    skipped: Mapping[str, int]

    def text(self) -> str:
        """The same in words, in one line."""
        types = f"{_share(self.num_types_found, self.num_types)} types"
        tokens = f"{_share(self.num_tokens_found, self.num_tokens)} tokens"
        folded = ""
        if self.num_types_folded:
            folded = f", {self.num_types_folded:,} types ({self.num_tokens_folded:,} tokens) of them by case folding"
        skipped = ", ".join(f"{count:,} ({reason})" for reason, count in sorted(self.skipped.items()))
        return (
            f"{self.file.path} ({self.file.format}, {self.num_rows:,} rows of {self.file.dim} numbers) has vectors of "
            f"{types} and {tokens}{folded}. The other rows stay as they were. Malformed and skipped: "
            f"{skipped or 'none'}."
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainedVectors:
    """Word vectors in a file, for the rows of a table.

    A row whose word the file does not have stays as its initialiser made it. `<unk>` and `<eos>` are words like the
    others.

    Attributes:
      path: a plain, gzip or xz file; fastText's models (.bin) are not read, its .vec files are.
      format: "auto" tells it by the beginning; see `vector_files.describe`. "fasttext" is "word2vec_text".
      case_folded: whether a word that the file does not have as it stands takes the vector of one that differs in
        case only, as Unicode folds it: of the folded form (`polish` for `Polish`) if the file has that, else of the
        first that folds alike (`NATO` for `nato`). The vocabulary's folded forms are held in memory meanwhile.
      normalise: "none" takes the numbers as they are. "unit" makes each row of length 1, but for rows of zeros, so that
        products of rows are cosines. "initialiser" multiplies all by one number, so that their root mean square is the
        standard deviation of the rows not found. Vectors are often ten times as long as a table starts: in one table
        with rows not found, their logits would be as much larger, and the learning rate of the one not fit the other.
        The lengths relative to each other stay. It reads the file twice.
      on_malformed: "stop" at a malformed row with an error that says where, or "skip" it and count it: a word with
        spaces or not UTF-8, another number of numbers, numbers that are not or are not finite, a word met before
        (the first stays), another number of rows than announced, an end within a row. That a word is met again, and
        what its numbers are, is known of the vocabulary's words only: of all it would take memory and time.
        In the binary form the row before a malformed word is left out, too, as it may be a part of it. A damaged
        archive stops always, and so does a binary file where no more words are found.
    """

    path: str
    format: Literal["auto", "word2vec_text", "word2vec_binary", "glove", "fasttext"] = "auto"
    case_folded: bool = False
    normalise: Literal["none", "unit", "initialiser"] = "none"
    on_malformed: Literal["stop", "skip"] = "stop"

    def __post_init__(self):
        for name, hint in typing.get_type_hints(type(self)).items():
            value = getattr(self, name)
            if typing.get_origin(hint) is Literal and value not in typing.get_args(hint):
                choices = ", ".join(map(repr, typing.get_args(hint)))
                raise ValueError(
                    f"PretrainedVectors.{name} must be one of {choices}. Received: {value!r}. Set it to one of them."
                )

    def fill(
        self,
        *,
        vocabulary: Vocabulary,
        dim: int,
        write: Callable[[np.ndarray, np.ndarray], None],
        initial_stddev: float | None = None,
    ) -> Coverage:
        """Writes the rows whose words the file has.

        The file is read in blocks of 4 MiB, and `write` gets 16 MiB at a time, always the same number of rows but the
        last time. It gets a row once, or with `case_folded` again when the file has a nearer word further on.

        Args:
          vocabulary: the words of the rows, by id.
          dim: the width of the table.
          write: `write(ids, rows)` sets rows `ids` [n] int64, distinct, to `rows` [n, dim] float32.
          initial_stddev: the root mean square of what the rows hold before; "initialiser" needs it.
        Returns:
          what was found.
        Raises:
          ValueError: before anything is written, if there is no such file, it does not begin as a file of vectors, its
            vectors have another width than the table, or `initial_stddev` is not positive though it is needed. Later,
            if something is malformed.
        """
        file = self.describe(dim=dim)
        scale = 1.0
        if self.normalise == "initialiser":
            scale = self._scale(file, vocabulary=vocabulary, initial_stddev=initial_stddev)
        matches = self._matches(file, vocabulary=vocabulary)
        for ids, rows in matches:
            if self.normalise == "unit":
                lengths = np.sqrt(_squared_lengths(rows))
                rows = rows / np.where(lengths > 0, lengths, 1)[:, np.newaxis]
            elif scale != 1:
                rows = rows * scale
            write(ids, rows.astype(np.float32, copy=False))
        return matches.coverage()

    def describe(self, *, dim: int) -> VectorFile:
        """The file, by its beginning.

        Raises:
          ValueError: if there is none, it does not begin as a file of vectors, or they are not `dim` wide.
        """
        paths = expand_patterns([expand(self.path)], flag="PretrainedVectors.path")
        if len(paths) != 1:
            raise ValueError(
                f"PretrainedVectors.path must name one file. Received: {self.path!r}, which names {len(paths)}. Name "
                "one."
            )
        file = vector_files.describe(paths[0], format=self.format)
        if file.dim != dim:
            raise ValueError(
                f"{file.path}: its vectors must be as wide as the table's rows. Received: {file.dim} in the file, "
                f"{dim} of the table. Set the table's embed_dim to {file.dim} (with NextToken.input_dim = {dim}, a "
                f"learned layer then takes it to {dim}), or take other vectors."
            )
        return file

    def _matches(self, file: VectorFile, *, vocabulary: Vocabulary) -> "_Matches":
        return _Matches(
            file, vocabulary=vocabulary, case_folded=self.case_folded, on_malformed=self.on_malformed
        )

    def _scale(self, file: VectorFile, *, vocabulary: Vocabulary, initial_stddev: float | None) -> float:
        """What makes the root mean square of all rows found `initial_stddev`."""
        if initial_stddev is None or not initial_stddev > 0:
            raise ValueError(
                "PretrainedVectors.normalise = 'initialiser' needs rows that do not start from zero. Received: their "
                f"root mean square is {initial_stddev}. Use another initialiser, or 'unit' or 'none'."
            )
        squares = np.zeros(len(vocabulary))  # Of each row: one may come twice, and then the last counts.
        matches = self._matches(file, vocabulary=vocabulary)
        for ids, rows in matches:
            squares[ids] = _squared_lengths(rows)
        total = squares.sum()
        num_numbers = matches.coverage().num_types_found * file.dim
        return initial_stddev / float(np.sqrt(total / num_numbers)) if total else 1.0


class _Matches:
    """Blocks (ids [n] int64, rows [n, dim] float32) of the rows of a file whose words a vocabulary has, read once."""

    def __init__(
        self,
        file: VectorFile,
        *,
        vocabulary: Vocabulary,
        case_folded: bool,
        on_malformed: Literal["stop", "skip"],
    ):
        self._file = file
        self._vocabulary = vocabulary
        self._reader = VectorReader(file, on_malformed=on_malformed)
        self._nearness = bytearray(len(vocabulary))
        self._folds = _Folds(vocabulary) if case_folded else None

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        max_rows = max(1, _WRITE_BYTES // (4 * self._file.dim))
        block: dict[int, np.ndarray] = {}
        for place, word, numbers in self._reader:
            found = self._ids(word, place)
            row = self._reader.vector(numbers, word=word, place=place) if found else None
            if row is None:
                continue
            for row_id, nearness in found:
                self._nearness[row_id] = nearness
                block[row_id] = row
                if len(block) == max_rows:
                    yield _stacked(block)
                    block = {}
        if block:
            yield _stacked(block)

    def coverage(self) -> Coverage:
        """What was found so far."""
        nearness = np.frombuffer(self._nearness, np.uint8)
        found = nearness > 0
        folded = found & (nearness < _EXACT)
        counts = self._vocabulary.counts
        return Coverage(
            file=self._file,
            num_rows=self._reader.num_rows,
            num_types=len(nearness),
            num_types_found=int(found.sum()),
            num_types_folded=int(folded.sum()),
            num_tokens=int(counts.sum()),
            num_tokens_found=int(counts[found].sum()),
            num_tokens_folded=int(counts[folded].sum()),
            skipped=dict(self._reader.skipped),
        )

    def _ids(self, word: str, place: int) -> list[tuple[int, int]]:
        """The rows that take the vector of a word of the file, each with how near it is."""
        same = self._vocabulary.ids.get(word, -1)
        found = []
        if same >= 0:
            if self._nearness[same] == _EXACT:
                self._reader.report(
                    vector_files.DUPLICATE,
                    place,
                    must="each word must have one vector",
                    received=f"{word!r} again",
                    advice="Remove one",
                )
                return []
            found.append((same, _EXACT))
        if self._folds is not None:
            folded = word.casefold()
            nearness = _CASE_FOLDED if word == folded else _SAME_BUT_FOR_CASE
            for row_id in self._folds.ids(folded):
                if row_id != same and self._nearness[row_id] < nearness:
                    found.append((row_id, nearness))
        return found


class _Folds:
    """The ids of the words that fold alike, in less memory than a list of them for each."""

    def __init__(self, vocabulary: Vocabulary):
        self._first: dict[str, int] = {}
        self._next = array.array("q", bytes(8 * len(vocabulary)))  # By id; -1 for none.
        for row_id, word in enumerate(vocabulary.tokens):
            folded = word.casefold()
            if folded == word:
                folded = word  # One string in memory, not two.
            self._next[row_id] = self._first.get(folded, -1)
            self._first[folded] = row_id

    def ids(self, folded: str) -> Iterator[int]:
        row_id = self._first.get(folded, -1)
        while row_id >= 0:
            yield row_id
            row_id = self._next[row_id]


def _stacked(block: dict[int, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return np.fromiter(block, np.int64, len(block)), np.stack(list(block.values()))


def _squared_lengths(rows: np.ndarray) -> np.ndarray:
    """[n] float64, which no float32 row overflows."""
    return np.einsum("nd,nd->n", rows, rows, dtype=np.float64)


def _share(part: int, whole: int) -> str:
    return f"{part:,} of {whole:,} ({part / max(whole, 1):.1%})"
