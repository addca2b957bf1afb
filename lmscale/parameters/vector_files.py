"""Files of word vectors, as a stream of rows in bounded memory: plain, gzip or xz.

    word2vec_text     a line `num_rows dim`, then a line for each word: the word and dim numbers, between blanks.
                      fastText's `.vec` is the same
    word2vec_binary   the line `num_rows dim`, then for each word: the word, a blank, dim little-endian float32,
                      and perhaps a line feed
    glove             as word2vec_text, without the first line

Sources: word2vec.c and distance.c of word2vec; `saveVectors` of fastText; `save_params` of GloVe.
"""

import codecs
import collections
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from lmscale.data.text_files import check_start, decompressed, read_full

# Also how much of a file the format is told by, and the longest line.
_BLOCK_BYTES = 1 << 22
# Words of the binary form have no other bound. Those of word2vec are at most 100 bytes.
_MAX_BINARY_WORD_BYTES = 1000
# So many malformed words in a row, and a binary file is out of step: what is read is no longer words.
_MAX_MALFORMED_IN_A_ROW = 8
_NUM_LINES_FOR_WIDTH = 100
_BLANK_BYTES = b" \t\r"  # At the end of a line: word2vec and fastText write one, Windows a carriage return.
_HEADER = re.compile(rb"[ \t]*([0-9]{1,18})[ \t]+([0-9]{1,18})[ \t\r]*")
_CONTROLS = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_FASTTEXT_MODEL = b"\xba\x16\x4f\x2f"

# Why a row is malformed.
OTHER_COUNT = "other number of rows than announced"
OTHER_WIDTH = "other width"
WORD_WITH_SPACES = "word with spaces"
NO_WORD = "no word"
NOT_UTF8 = "not UTF-8"
NOT_NUMBERS = "not numbers"
NOT_FINITE = "not finite"
DUPLICATE = "duplicate"
CUT_OFF = "cut off"
BEFORE_MALFORMED = "before a malformed word, so perhaps with a space"

_SKIP = "set PretrainedVectors.on_malformed = 'skip' to leave out what is malformed and count it"


@dataclasses.dataclass(frozen=True, kw_only=True)
class VectorFile:
    """What the beginning of a file tells.

    Attributes:
      path: plain, gzip or xz.
      format: how its rows are written.
      dim: numbers in a row.
      num_rows: how many rows its first line announces; None for GloVe's form, which has no such line.
      start: the byte of the (decompressed) content where the first row begins.
    """

    path: Path
    format: Literal["word2vec_text", "word2vec_binary", "glove"]
    dim: int
    num_rows: int | None
    start: int


def describe(
    path: Path, *, format: Literal["auto", "word2vec_text", "word2vec_binary", "glove", "fasttext"]
) -> VectorFile:
    """Reads the beginning of a file.

    "auto" takes a first line of two whole numbers for that of word2vec, and what follows for text if its first row
    reads as such, or if there is no control character and nothing but UTF-8 in what should be numbers. GloVe's form
    with rows of one number can look like that: name it then. Without such a line a file is GloVe's, and as wide as
    most of its first 100 lines.

    Raises:
      ValueError: if the file is damaged or empty, or does not begin as its format does.
    """
    sample = next(_blocks(path), b"")
    check_start(sample, path)
    mark = codecs.BOM_UTF8 if sample.startswith(codecs.BOM_UTF8) else b""
    lines = sample.removeprefix(mark).split(b"\n")
    if not sample.strip():
        raise ValueError(f"{path}: must hold word vectors. Received: nothing. Give another file.")
    if sample.startswith(_FASTTEXT_MODEL):
        raise ValueError(
            f"{path}: must hold word vectors in text or word2vec's binary form. Received: a model of fastText. "
            "Give the .vec file that fastText writes beside it."
        )
    header = _HEADER.fullmatch(lines[0])
    if header is None and format not in ("auto", "glove"):
        raise ValueError(
            f"{path}, line 1: must be two whole numbers, of the rows and of the numbers in a row. Received: "
            f"{_shown(lines[0])}. Set PretrainedVectors.format = 'glove' if the file has no such line."
        )
    if header is None or format == "glove":
        width = _usual_width(lines)
        if width < 1:
            raise ValueError(
                f"{path}, line 1: must be two whole numbers (word2vec, fastText), or a word and its numbers (GloVe). "
                f"Received: {_shown(lines[0])}. Give a file of word vectors."
            )
        return VectorFile(path=path, format="glove", dim=width, num_rows=None, start=len(mark))
    num_rows, dim = map(int, header.groups())
    if not (num_rows and dim):
        raise ValueError(
            f"{path}, line 1: must announce a row and a number at least. Received: {_shown(lines[0])}. Give another "
            "file."
        )
    start = len(mark) + len(lines[0]) + 1
    binary = format == "word2vec_binary" or (format == "auto" and _looks_binary(sample[start:], dim=dim))
    return VectorFile(
        path=path,
        format="word2vec_binary" if binary else "word2vec_text",
        dim=dim,
        num_rows=num_rows,
        start=start,
    )


class VectorReader:
    """The rows of a file, read once from its beginning to its end by iterating.

    A row is (place, word, numbers): where it begins (the line, from 1, or in a binary file the byte, from 0), its word,
    and its numbers as the file has them, for `vector`. What is malformed is not among them. The numbers are counted in
    each row, but read by `vector` alone.

    A word with a space puts the binary form out of step: it ends at the space, and its numbers begin with the rest of
    it. What shows it is that no word follows. So there a row before a malformed word, or before an end within a row, is
    left out, too.

    Attributes:
      num_rows: how many were read, malformed ones included.
      skipped: how often each kind of malformed row was met, by the reason.
    """

    def __init__(self, file: VectorFile, *, on_malformed: Literal["stop", "skip"]):
        self._file = file
        self._stops = on_malformed == "stop"
        self._is_binary = file.format == "word2vec_binary"
        self.num_rows = 0
        self.skipped: collections.Counter[str] = collections.Counter()

    def __iter__(self) -> Iterator[tuple[int, str, bytes]]:
        """Raises:
        ValueError: at what is malformed, if that is to stop; if the file is damaged, has a line that is longer than
          4 MiB, or is binary and out of step. Names the line or byte.
        """
        if not self._is_binary:
            for place, word, numbers in self._checked(self._text_rows()):
                if word is not None:
                    yield place, word, numbers
            return
        malformed_in_a_row = 0
        held = None  # Until the next word tells that this one was no part of a word with a space.
        for place, word, numbers in self._checked(self._binary_rows()):
            if held is not None and word is not None:
                yield held
            elif held is not None:
                self.skipped[BEFORE_MALFORMED] += 1
            held = None if word is None else (place, word, numbers)
            malformed_in_a_row = malformed_in_a_row + 1 if word is None else 0
            if malformed_in_a_row == _MAX_MALFORMED_IN_A_ROW:
                raise self._out_of_step(place, f"{malformed_in_a_row} malformed words in a row")
        if held is not None and CUT_OFF in self.skipped:
            self.skipped[BEFORE_MALFORMED] += 1
        elif held is not None:
            yield held

    def vector(self, numbers: bytes, *, word: str, place: int) -> np.ndarray | None:
        """The numbers of a row, [dim] float32; None if they are malformed.

        Raises:
          ValueError: if they are, and that is to stop.
        """
        if self._is_binary:
            values = np.frombuffer(numbers, "<f4").astype(np.float32)
        else:
            try:
                if b"_" in numbers:  # To Python 1_0 is a number.
                    raise ValueError("an underscore")
                with np.errstate(over="ignore"):  # Found below.
                    values = np.array(numbers.split(b" "), np.float32)
            except ValueError:
                wrong = next(field for field in numbers.split(b" ") if not _is_number(field))
                self.report(
                    NOT_NUMBERS,
                    place,
                    must=f"must be a word and {self._file.dim} numbers",
                    received=f"{_shown(wrong)} in the row of {word!r}",
                )
                return None
        if not np.isfinite(values).all():
            wrong_value = values[~np.isfinite(values)][0]
            self.report(
                NOT_FINITE,
                place,
                must="all numbers must be finite float32",
                received=f"{wrong_value} in the row of {word!r}",
            )
            return None
        return values

    def report(
        self, reason: str, place: int | None, *, must: str, received: str, advice: str = "Get the file again"
    ) -> None:
        """Counts what is malformed.

        Raises:
          ValueError: instead, if that is to stop.
        """
        if self._stops:
            raise ValueError(f"{self._where(place)}: {must}. Received: {received}. {advice}, or {_SKIP}.")
        self.skipped[reason] += 1

    def _where(self, place: int | None) -> str:
        if place is None:
            return str(self._file.path)
        return f"{self._file.path}, {'byte' if self._is_binary else 'line'} {place:,}"

    def _out_of_step(self, place: int, received: str) -> ValueError:
        return ValueError(
            f"{self._where(place)}: must be a word, a blank and {self._file.dim} float32 numbers. Received: "
            f"{received}. An earlier word may have a space in it, or the first line announce another width: get the "
            "file again, or in text."
        )

    def _checked(self, rows: Iterator[tuple[int, bytes, bytes]]) -> Iterator[tuple[int, str | None, bytes]]:
        """The rows, counted; without a word if they are malformed."""
        for place, word, numbers in rows:
            if self.num_rows == self._file.num_rows:
                self.report(
                    OTHER_COUNT,
                    place,
                    must=f"the file must end here, after the {self.num_rows:,} rows that its first line announces",
                    received=f"a row of the word {_shown(word)}",
                    advice="Correct the first line",
                )
            self.num_rows += 1
            text = self._text_of(word, place) if self._has_width(word, numbers, place) else None
            yield place, text, numbers
        if self._file.num_rows is not None and self.num_rows < self._file.num_rows:
            self.report(
                OTHER_COUNT,
                None,
                must=f"must have the {self._file.num_rows:,} rows that its first line announces",
                received=f"{self.num_rows:,} rows",
                advice="The file may be cut off: get it again, or correct its first line",
            )

    def _has_width(self, word: bytes, numbers: bytes, place: int) -> bool:
        if self._is_binary:
            return True
        dim = self._file.dim
        width = numbers.count(b" ") + bool(numbers)
        if width == dim:
            return True
        # The words of some GloVe files have spaces. Where the first of too many fields are numbers, these are too many.
        beginning = numbers.split(b" ")[: width - dim] if width > dim else []
        has_spaces = not all(map(_is_number, beginning))
        received = f"the word {_shown(word)} and {width} numbers"
        if has_spaces:
            received = f"a word with spaces, {_shown(b' '.join([word, *beginning]))}"
        self.report(
            WORD_WITH_SPACES if has_spaces else OTHER_WIDTH,
            place,
            must=f"must be a word and {dim} numbers, with one blank between them",
            received=received,
            advice="Correct the line",
        )
        return False

    def _text_of(self, word: bytes, place: int) -> str | None:
        if not word:
            self.report(
                NO_WORD,
                place,
                must="a row must begin with a word",
                received="a blank",
                advice="Correct the row",
            )
            return None
        try:
            return word.decode("utf-8")
        except UnicodeDecodeError:
            self.report(
                NOT_UTF8,
                place,
                must="a word must be UTF-8",
                received=_shown(word),
                advice="Convert the file",
            )
            return None

    def _text_rows(self) -> Iterator[tuple[int, bytes, bytes]]:
        place = 1 if self._file.num_rows is None else 2
        begun = b""
        for block in _blocks(self._file.path, start=self._file.start):
            lines = (begun + block).split(b"\n")
            begun = lines.pop()
            for line in lines:
                word, _, numbers = line.rstrip(_BLANK_BYTES).partition(b" ")
                yield place, word, numbers
                place += 1
            if len(begun) > _BLOCK_BYTES:
                raise ValueError(
                    f"{self._where(place)}: must be a word and {self._file.dim} numbers. Received: more than "
                    f"{_BLOCK_BYTES:,} bytes without a line end, from {_shown(begun)} on. Give a text, or set "
                    "PretrainedVectors.format to what the file is."
                )
        if begun:
            word, _, numbers = begun.rstrip(_BLANK_BYTES).partition(b" ")
            yield place, word, numbers

    def _binary_rows(self) -> Iterator[tuple[int, bytes, bytes]]:
        row_bytes = 4 * self._file.dim
        place = self._file.start  # Of the first byte of `content`.
        content = b""
        for block in _blocks(self._file.path, start=self._file.start):
            content += block
            begin = 0
            while True:
                blank = content.find(b" ", begin)
                end = blank + 1 + row_bytes
                if blank >= 0 and end > len(content):
                    break
                length = (blank if blank >= 0 else len(content)) - begin
                if length > _MAX_BINARY_WORD_BYTES:
                    shown = f"more than {_MAX_BINARY_WORD_BYTES:,} bytes without a blank"
                    raise self._out_of_step(place + begin, shown)
                if blank < 0:
                    break
                word = content[begin:blank].lstrip(b"\n")  # The line feed behind the row before.
                yield place + blank - len(word), word, content[blank + 1 : end]
                begin = end
            content = content[begin:]
            place += begin
        if rest := content.strip(b"\n\r"):
            self.report(
                CUT_OFF,
                place,
                must=f"must be a word, a blank and {row_bytes:,} bytes of float32 numbers",
                received=f"{len(rest):,} bytes, {_shown(rest)}, and the end of the file",
            )


def _blocks(path: Path, *, start: int = 0) -> Iterator[bytes]:
    """The content of a plain, gzip or xz file from a byte on, about 4 MiB at a time."""
    position = 0
    with path.open("rb") as raw:
        stream = decompressed(raw, path)
        while True:
            block, damage = read_full(stream, _BLOCK_BYTES)
            if block:
                yield block[max(start - position, 0) :]
                position += len(block)
            if damage is not None:
                message = str(damage).rstrip(".")
                raise ValueError(
                    f"{path}: damaged behind byte {position:,} of its content: {message}."
                ) from damage
            if len(block) < _BLOCK_BYTES:
                return


def _usual_width(lines: list[bytes]) -> int:
    """How many numbers follow the word in most of the first lines; 0 if those of none are numbers."""
    complete = lines[:-1] or lines  # The last is empty, or goes on in the next block.
    widths: collections.Counter[int] = collections.Counter()
    for line in complete[:_NUM_LINES_FOR_WIDTH]:
        fields = line.rstrip(_BLANK_BYTES).split(b" ")
        if _is_number(fields[-1]):
            widths[len(fields) - 1] += 1
    return max(widths, key=lambda width: widths[width], default=0)


def _looks_binary(content: bytes, *, dim: int) -> bool:
    """Whether rows are word2vec's binary ones rather than lines of text; malformed text is text."""
    line, _, _ = content.partition(b"\n")
    fields = line.rstrip(_BLANK_BYTES).split(b" ")
    if len(fields) == dim + 1 and all(map(_is_number, fields[1:])):
        return False
    _, _, numbers = content.partition(b" ")
    numbers = numbers[: 4 * dim]
    try:
        codecs.getincrementaldecoder("utf-8")().decode(numbers)  # The last character may be cut.
    except UnicodeDecodeError:
        return True
    return _CONTROLS.search(numbers) is not None


def _is_number(field: bytes) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return b"_" not in field


def _shown(content: bytes) -> str:
    """The beginning of some bytes, for a message."""
    shortened = content[:60]
    try:
        text = repr(shortened.decode("utf-8"))
    except UnicodeDecodeError:
        text = repr(shortened)
    return text + ("..." if len(content) > len(shortened) else "")
