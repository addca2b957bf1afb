"""Word similarity: the rank correlation of cosines with what people said of pairs of words."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np

# The first that a line has: a field may hold blanks where tabs or commas part them.
_SEPARATORS = ("\t", ",", ";", None)


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Pairs of words, and their scores: `words` [(word, word)], `scores` [pairs] float64."""

    words: list[tuple[str, str]]
    scores: np.ndarray


def read_pairs(path: Path) -> Pairs:
    """Reads a file of word pairs, one a line: two words and, somewhere behind them, a number.

    Fields lie between tabs; in lines without, between commas, then semicolons, then blanks. The score is the first
    number behind the words, so that the files of WordSim-353, SimLex-999, MEN, SimVerb and Rare Words are read as they
    come. Lines that begin with # are comments, and a first line without a number is a header.

    Raises:
      ValueError: for another line without a score, and a file without pairs.
    """
    words: list[tuple[str, str]] = []
    scores: list[float] = []
    lines = path.read_text(encoding="utf-8-sig").splitlines()
    for number, line in enumerate(lines, start=1):
        separator = next(x for x in _SEPARATORS if x is None or x in line)
        fields = [field.strip() for field in line.split(separator)]
        if not line.strip() or line.startswith("#"):
            continue
        score = next((x for x in map(_number, fields[2:]) if x is not None), None)
        if score is None:
            if not words and number == 1:
                continue
            raise ValueError(
                f"{path}, line {number}: must be two words and a number. Received: {line[:80]!r}. Correct the line, or "
                "begin it with #."
            )
        words.append((fields[0], fields[1]))
        scores.append(score)
    if not words:
        raise ValueError(f"{path}: must hold pairs of words with scores. Received: none. Give another file.")
    return Pairs(words, np.array(scores))


def _number(field):
    try:
        value = float(field)
    except ValueError:
        return None
    return value if np.isfinite(value) else None


def similarity_report(
    pairs: Pairs, id_of: Callable[[str], int | None], vectors: dict[int, np.ndarray]
) -> dict:
    """How well cosines order pairs of words.

    Args:
      pairs: `Pairs`.
      id_of: the row of a word; None for one that has none.
      vectors: {row: vector} of the words of the pairs.

    Returns:
      {"spearman": of the pairs whose words both have rows, None of fewer than two; "pairs"; "missing_pairs"}.
    """
    cosines, scores = [], []
    for (one, other), score in zip(pairs.words, pairs.scores, strict=True):
        one_id, other_id = id_of(one), id_of(other)
        if one_id is not None and other_id is not None:
            cosines.append(cosine(vectors[one_id], vectors[other_id]))
            scores.append(score)
    return {
        "spearman": spearman(np.array(cosines), np.array(scores)),
        "pairs": len(pairs.words),
        "missing_pairs": len(pairs.words) - len(scores),
    }


def cosine(one, other):
    """Cosine of two vectors, float64; 0 with a zero vector."""
    one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
    norms = np.linalg.norm(one) * np.linalg.norm(other)
    return float(one @ other / norms) if norms else 0.0


def spearman(one, other):
    """Spearman's rank correlation; those that are equal share the mean of their ranks. None where it is not defined.

    Source: Kendall 1948, "Rank Correlation Methods", chapter 3: the correlation of the ranks.
    """
    if len(one) < 2:
        return None
    ranks = [_mean_ranks(x) for x in (one, other)]
    centred = [x - x.mean() for x in ranks]
    norms = np.linalg.norm(centred[0]) * np.linalg.norm(centred[1])
    return float(centred[0] @ centred[1] / norms) if norms else None


def _mean_ranks(x):
    _, places, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[places]
