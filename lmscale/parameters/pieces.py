"""How the tokens of one vocabulary spell the words of another."""

import array
from collections.abc import Iterable, Sequence

import numpy as np

from lmscale.data.vocab import EOS, UNK

# How subword tokenizers mark a piece that goes on a word (wordpiece), or that begins one (sentencepiece).
_GOES_ON, _BEGINS = "##", "\N{LOWER ONE EIGHTH BLOCK}"


def spell(words: Iterable[str], tokens: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Spells words by the longest token that fits, from left to right.

    A token fits where it is the next characters of the word, or those with the mark of their place: "##" within a
    word, "▁" at its start. `<unk>` and `<eos>` spell nothing.

    Args:
      words: what to spell.
      tokens: of the vocabulary that spells, in id order.

    Returns:
      (ids, counts): ids [pieces] int64 of the tokens, word after word; counts [words] int64, how many of them spell
      each word, 0 for a word that cannot be spelled.
    """
    ids = {token: token_id for token_id, token in enumerate(tokens) if token not in (UNK, EOS)}
    longest = max(map(len, ids), default=0)
    pieces, counts = array.array("q"), array.array("q")
    for word in words:
        spelled = _spelled(word, ids, longest)
        pieces.extend(spelled)
        counts.append(len(spelled))
    return np.array(pieces, np.int64), np.array(counts, np.int64)


def _spelled(word, ids, longest):
    pieces, start = [], 0
    while start < len(word):
        mark = _GOES_ON if start else _BEGINS
        for stop in range(min(len(word), start + longest), start, -1):
            text = word[start:stop]
            token_id = ids.get(mark + text, ids.get(text))
            if token_id is not None:
                pieces.append(token_id)
                start = stop
                break
        else:
            return []
    return pieces
