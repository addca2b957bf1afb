"""Words and their vectors, read in blocks: of a table in a checkpoint, without a model, or of a file of vectors."""

import abc
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lmscale.checkpoints.saved import open_checkpoint
from lmscale.data.vocab import EOS, UNK, Vocabulary
from lmscale.parameters import vector_files

_ROWS_AT_ONCE = 16_384


class WordRows(abc.ABC):
    """Words by the number of their row.

    Attributes:
      words: [str].
      dim: numbers of a row.
      source: what they were read from, for reports.
    """

    words: list[str]
    dim: int
    source: str

    def id_of(self, word: str) -> int | None:
        """The row of a word as it is written, or of its lower-case form; None without either."""
        found = self._ids.get(word)
        return self._ids.get(word.lower()) if found is None else found

    @abc.abstractmethod
    def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(ids [n] int64, rows [n, dim] float32) of all words, each once, by rising ids."""

    def vectors_of(self, words) -> dict[int, np.ndarray]:
        """{id: vector} of those of the words that have rows: one reading of all rows, in bounded memory."""
        wanted = np.array(sorted({i for i in map(self.id_of, words) if i is not None}), np.int64)
        found: dict[int, np.ndarray] = {}
        for ids, rows in self.blocks():
            places = np.flatnonzero(np.isin(ids, wanted))
            found |= {int(ids[place]): rows[place].copy() for place in places}
        return found

    def _index(self):
        self._ids = {}
        for number, word in enumerate(self.words):
            self._ids.setdefault(word, number)


class TableRows(WordRows):
    """The words of a table in a checkpoint; `<unk>` and `<eos>`, which are none, are left out.

    Attributes:
      counts: [words] int64, how often each is in the training data, falling.
    """

    def __init__(self, path, *, table: str, best: bool = False):
        """Args:
          path, best: as of `open_checkpoint`.
          table: name of the table.

        Raises:
          ValueError: as `open_checkpoint`; if there is no such table, or its vocabulary is not there or another one.
        """
        self._checkpoint = open_checkpoint(path, best=best)
        self._path = f"tables/{table}/embedding"
        tables = sorted(
            name.split("/")[1]
            for name in self._checkpoint.tensors
            if name.startswith("tables/") and name.endswith("/embedding")
        )
        if table not in tables:
            raise ValueError(
                f"The table must be one of the run's, {', '.join(tables)}. Received: {table}. Pass another --table."
            )
        if table not in self._checkpoint.metadata.get("vocabulary_files", {table}):
            raise ValueError(
                f"The rows of the table must have words. Received: {table}, whose rows are numbers. Pass another "
                "--table."
            )
        vocabulary_path = self._checkpoint.vocabulary_path(table)
        if not vocabulary_path.is_file():
            raise ValueError(
                f"The work directory of the run must hold its vocabulary. Received: no {vocabulary_path}. Put back the "
                "vocab.txt of its data."
            )
        vocabulary = Vocabulary.from_text(vocabulary_path.read_bytes().decode(), required=())
        if self._checkpoint.vocabulary_sha256(table) != vocabulary.sha256:
            raise ValueError(
                f"{vocabulary_path} must be the vocabulary of the run. Received: another one. Put back that of its "
                "data."
            )
        is_word = np.array([token not in (UNK, EOS) for token in vocabulary.tokens])
        self._row_of = np.flatnonzero(is_word)
        self.words = [vocabulary.tokens[i] for i in self._row_of]
        self.counts = vocabulary.counts[self._row_of]
        self.dim = self._checkpoint.tensors[self._path][0][1]
        self.source = str(self._checkpoint.directory)
        self._index()

    def blocks(self):
        first = 0
        for start, stop in self._checkpoint.blocks(self._path):
            rows = self._checkpoint.read(self._path, start, stop)
            last = int(np.searchsorted(self._row_of, stop))
            yield np.arange(first, last), np.asarray(rows[self._row_of[first:last] - start], np.float32)
            first = last


class FileRows(WordRows):
    """The words of a file of vectors, in any of the formats of `vector_files`."""

    def __init__(self, path):
        """Raises ValueError: as `vector_files.describe` and `VectorReader`."""
        self._file = vector_files.describe(Path(path), format="auto")
        self.words = [word for _, word, _ in self._reader()]
        self.dim = self._file.dim
        self.source = str(path)
        self._index()

    def _reader(self):
        return vector_files.VectorReader(self._file, on_malformed="stop")

    def blocks(self):
        reader, rows, first = self._reader(), [], 0
        for place, word, numbers in reader:
            rows.append(reader.vector(numbers, word=word, place=place))
            if len(rows) == _ROWS_AT_ONCE:
                yield np.arange(first, first + len(rows)), np.stack(rows)
                first, rows = first + len(rows), []
        if rows:
            yield np.arange(first, first + len(rows)), np.stack(rows)
