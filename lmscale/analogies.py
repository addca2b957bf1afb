"""Analogies, `a is to b as c is to ?`, by 3CosAdd over all words, streamed over blocks of rows."""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

# Scores of questions and rows that are held at a time.
_QUESTIONS_AT_ONCE = 2048


@dataclasses.dataclass(frozen=True)
class Questions:
    """`sections` {name: [(a, b, c, d)]}, in the order of the file."""

    sections: dict[str, list[tuple[str, str, str, str]]]


def read_questions(path: Path) -> Questions:
    """Reads a file such as questions-words.txt: lines `: section`, and lines of four words.

    Raises:
      ValueError: for a line of another number of words, and a file without questions.
    """
    sections: dict[str, list] = {}
    name = ""
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
        words = line.split()
        if line.startswith(":"):
            name = line[1:].strip()
        elif words:
            if len(words) != 4:
                raise ValueError(
                    f"{path}, line {number}: must be four words, or a colon and the name of a section. Received: "
                    f"{line[:80]!r}. Correct the line."
                )
            sections.setdefault(name, []).append(tuple(words))
    if not sections:
        raise ValueError(f"{path}: must hold questions of four words. Received: none. Give another file.")
    return Questions(sections)


def analogy_report(
    questions: Questions,
    id_of: Callable[[str], int | None],
    vectors: dict[int, np.ndarray],
    blocks: Iterable[tuple[np.ndarray, np.ndarray]],
) -> dict:
    """How often the word nearest to b - a + c, of unit vectors, is d; none of a, b and c can be it.

    Questions with a word that has no row are left out, and counted.

    Args:
      questions: `Questions`.
      id_of: the row of a word; None for one that has none.
      vectors: {row: vector} of the words of the questions.
      blocks: (ids [n], rows [n, dim]) of all words that may be answers, read once.

    Returns:
      {"accuracy": None without questions; "questions", "missing_questions"; "sections": {name: the same}}.

    Source: Levy & Goldberg 2014, "Linguistic Regularities in Sparse and Explicit Word Representations", 3CosAdd: the
      argmax of cos(d, b) - cos(d, a) + cos(d, c).
    """
    asked = [
        (name, [id_of(word) for word in question])
        for name, of_section in questions.sections.items()
        for question in of_section
    ]
    found = [(name, ids) for name, ids in asked if None not in ids]
    correct: dict[str, list[bool]] = {name: [] for name in questions.sections}
    if found:
        ids = np.array([ids for _, ids in found])
        answers = _answers(ids, vectors, blocks)
        for (name, _), is_correct in zip(found, answers == ids[:, 3], strict=True):
            correct[name].append(bool(is_correct))
    sections = {
        name: _counted(correct[name], num_questions=len(of_section))
        for name, of_section in questions.sections.items()
    }
    everything = _counted([x for of in correct.values() for x in of], num_questions=len(asked))
    return everything | {"sections": sections}


def _counted(correct, *, num_questions):
    return {
        "accuracy": sum(correct) / len(correct) if correct else None,
        "questions": num_questions,
        "missing_questions": num_questions - len(correct),
    }


def _answers(ids, vectors, blocks):
    """[questions] the best id of each of the questions [questions, 4]; -1 where there is none."""
    a, b, c = (unit_rows(np.stack([vectors[i] for i in ids[:, k].tolist()])) for k in range(3))
    queries = b - a + c
    best = np.full([len(ids)], -np.inf, np.float32)
    answers = np.full([len(ids)], -1, np.int64)
    for block_ids, rows in blocks:
        rows = unit_rows(rows)
        place = {int(i): k for k, i in enumerate(block_ids)}
        for start in range(0, len(ids), _QUESTIONS_AT_ONCE):
            part = slice(start, start + _QUESTIONS_AT_ONCE)
            scores = queries[part] @ rows.T
            for question, excluded in enumerate(ids[part, :3].tolist()):
                for i in excluded:
                    if i in place:
                        scores[question, place[i]] = -np.inf
            nearest = scores.argmax(axis=1)
            score = scores[np.arange(len(scores)), nearest]
            is_better = score > best[part]
            best[part] = np.where(is_better, score, best[part])
            answers[part] = np.where(is_better, block_ids[nearest], answers[part])
    return answers


def unit_rows(rows):
    """[n, dim] float32, each divided by its norm; zero rows stay."""
    rows = np.asarray(rows, np.float32)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms > 0, norms, 1)
