"""Text for timings: ids by Zipf's law, the same number of tokens whatever the vocabulary."""

import dataclasses

import numpy as np

from lmscale.data.vocab import UnnamedVocabulary

_NUM_TOKENS = 200_000


@dataclasses.dataclass(frozen=True)
class ZipfText:
    """Stands in for a prepared directory."""

    vocab_size: int
    eos_id = 0

    @property
    def vocabularies(self):
        """Ids without words or counts."""
        return {"words": UnnamedVocabulary(size=self.vocab_size)}

    def split(self, name):
        """[200,000] int64 ids, log-uniform: rank r with probability log((r + 2) / (r + 1)) / log(vocab_size + 1)."""
        del name
        uniform = np.random.default_rng(0).random(_NUM_TOKENS)
        ids = np.exp(uniform * np.log(self.vocab_size + 1)).astype(np.int64) - 1
        return np.minimum(ids, self.vocab_size - 1)
