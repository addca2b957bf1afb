"""A text as examples in columns: each word, and those before it."""

import dataclasses

import numpy as np

from lmscale.data.columns import Column, PreparedColumns
from lmscale.data.token_files import PreparedData

NEXT = "next"


@dataclasses.dataclass(frozen=True)
class _Shifted:
    """The ids of a split, `distance` places before each place; `first` before its start."""

    ids: np.ndarray
    distance: int
    first: int

    def __len__(self):
        return len(self.ids)

    @property
    def dtype(self):
        return self.ids.dtype

    def __getitem__(self, places):
        before = np.asarray(places) - self.distance
        return np.where(before >= 0, self.ids[np.maximum(before, 0)], self.first)


class LastWordsColumns(PreparedColumns):
    """Columns "next" and "word_1", "word_2", ..., the words one and more places before it, of each place of a text.

    Before the start of a split there is nothing but `<eos>`. Lines are not told apart.
    """

    def __init__(self, text: PreparedData, *, num_words: int):
        """`text`: `PreparedData`; `num_words`: how many words before each."""
        self.directory, self.manifest = text.directory, text.manifest
        self._text = text
        self._distances = {NEXT: 0} | {f"word_{i}": i for i in range(1, num_words + 1)}
        self.columns = {name: Column(type="ids", vocabulary="words") for name in self._distances}

    @property
    def vocabularies(self):
        return self._text.vocabularies

    def num_examples(self, split):
        return len(self._text.split(split))

    def column(self, split, name):
        return _Shifted(self._text.split(split), self._distances[name], self._text.eos_id)
