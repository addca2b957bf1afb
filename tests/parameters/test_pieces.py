import numpy as np
import pytest

from lmscale.data.vocab import EOS, UNK
from lmscale.parameters.pieces import spell


@pytest.mark.parametrize(
    ("tokens", "word", "pieces"),
    [
        (["un", "break", "able", "b", "breaka"], "unbreakable", None),  # Longest first, and no way back.
        (["un", "break", "able", "b"], "unbreakable", ["un", "break", "able"]),
        (["a", "aa"], "aaaaa", ["aa", "aa", "a"]),
        (
            ["ab", "##b", "b", "a", "##c"],
            "abbc",
            ["ab", "##b", "##c"],
        ),  # The marked one before the plain one.
        (["\u2581ab", "ab", "b"], "abab", ["\u2581ab", "ab"]),
        (["ő", "ű"], "űő", ["ű", "ő"]),
        ([UNK, EOS, "k"], UNK + "k", None),
        (["a"], "b", None),
    ],
)
def test_longest_piece_first(tokens, word, pieces):
    ids, counts = spell([word], tokens)
    assert [tokens[i] for i in ids] == (pieces or [])
    assert counts.tolist() == [len(pieces or [])]
    assert (ids.dtype, counts.dtype) == (np.int64, np.int64)


def test_words_one_after_the_other():
    ids, counts = spell(["ab", "x", "b"], ["a", "b"])
    assert (ids.tolist(), counts.tolist()) == ([0, 1, 1], [2, 0, 1])
    ids, counts = spell([], ["a"])
    assert (len(ids), len(counts)) == (0, 0)
