"""Rows of a table filled from files of vectors: which rows, with what, and how much of the vocabulary."""

import lzma
import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from vectors import binary, random_rows, text

from lmscale.data.vocab import Vocabulary
from lmscale.parameters import pretrained, vector_files
from lmscale.parameters.pretrained import PretrainedVectors

DIM = 5
SHARED_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
GLOVE = SHARED_DATA / "glove-6b-50d-top20k" / "glove.6B.50d.top20k.txt.xz"


def vocabulary_of(*tokens):
    """Counts 10, 9, 8, ..., and 0 from the tenth on."""
    counts = np.maximum(10 - np.arange(len(tokens)), 0)
    return Vocabulary(tokens=tokens, counts=counts.astype(np.int64))


class Table:
    """Rows that start as `initial`, and what was written to them."""

    def __init__(self, num_rows, dim=DIM, *, seed=1):
        self.initial = np.random.default_rng(seed).normal(size=(num_rows, dim)).astype(np.float32) / 20
        self.rows = self.initial.copy()
        self.writes = []

    def write(self, ids, rows):
        assert ids.dtype == np.int64
        assert rows.dtype == np.float32
        assert rows.shape == (len(ids), self.rows.shape[1])
        assert len(np.unique(ids)) == len(ids) > 0
        self.writes.append(ids)
        self.rows[ids] = rows


def fill(path, vocabulary, dim=DIM, *, initial_stddev=None, **settings):
    table = Table(len(vocabulary), dim)
    vectors = PretrainedVectors(path=str(path), **settings)
    coverage = vectors.fill(vocabulary=vocabulary, dim=dim, write=table.write, initial_stddev=initial_stddev)
    return table, coverage


VOCABULARY = vocabulary_of("the", "<eos>", "Polish", "of", "<unk>", "polish", "NATO", "日本", "straße")
WORDS = ["of", "xyzzy", "POLISH", "the", "日本", "polish", "nato", "STRASSE", "</s>"]
ROWS = random_rows(len(WORDS), DIM)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "vectors"
    path.write_bytes(text(WORDS, ROWS))
    return path


def expected_rows(table, by_token, rows=ROWS):
    """The initial rows, but {word of the vocabulary: word of the file} replaced."""
    expected = table.initial.copy()
    for token, word in by_token.items():
        expected[VOCABULARY.tokens.index(token)] = rows[WORDS.index(word)]
    return expected


@pytest.mark.parametrize("content", [text(WORDS, ROWS), text(WORDS, ROWS, header=False), binary(WORDS, ROWS)])
def test_words_as_they_stand(path, content):
    path.write_bytes(content)
    table, coverage = fill(path, VOCABULARY)
    np.testing.assert_array_equal(
        table.rows, expected_rows(table, {word: word for word in ("of", "the", "日本", "polish")})
    )
    assert sum(map(len, table.writes)) == 4  # Each once.
    assert (coverage.num_types_found, coverage.num_types, coverage.num_types_folded) == (4, 9, 0)
    assert (coverage.num_tokens_found, coverage.num_tokens) == (
        10 + 7 + 5 + 3,
        10 + 9 + 8 + 7 + 6 + 5 + 4 + 3 + 2,
    )
    assert coverage.skipped == {}
    assert coverage.text() == (
        f"{path} ({coverage.file.format}, 9 rows of 5 numbers) has vectors of 4 of 9 (44.4%) types and 25 of 54 "
        "(46.3%) tokens. The other rows stay as they were. Malformed and skipped: none."
    )


def test_case_folded(path):
    """`polish` is nearer to `Polish` than the `POLISH` before it; `ß` folds to `ss`."""
    table, coverage = fill(path, VOCABULARY, case_folded=True)
    found = {"of": "of", "the": "the", "日本": "日本", "polish": "polish"}
    folded = {"Polish": "polish", "NATO": "nato", "straße": "STRASSE"}
    np.testing.assert_array_equal(table.rows, expected_rows(table, found | folded))
    assert (coverage.num_types_found, coverage.num_types_folded) == (7, 3)
    assert (coverage.num_tokens_found, coverage.num_tokens_folded) == (25 + 8 + 4 + 2, 8 + 4 + 2)
    assert "3 types (14 tokens) of them by case folding" in coverage.text()


@pytest.mark.parametrize("max_rows", [1, 2, 3, 100])
@pytest.mark.parametrize(
    ("order", "winner"),
    [
        (["Apple", "APPLE", "apple"], {"apple": 2, "aPPle": 2, "APPLE": 1}),
        (["apple", "Apple", "aPPle"], {"apple": 0, "aPPle": 2, "APPLE": 0}),
        (["APple", "Apple"], {"apple": 0, "aPPle": 0, "APPLE": 0}),
        (["APPLE", "APple"], {"apple": 0, "aPPle": 0, "APPLE": 0}),
    ],
)
def test_the_nearest_word_wins_wherever_it_stands(path, monkeypatch, order, winner, max_rows):
    monkeypatch.setattr(pretrained, "_WRITE_BYTES", 4 * DIM * max_rows)
    vocabulary = vocabulary_of("apple", "aPPle", "<eos>", "APPLE", "<unk>")
    path.write_bytes(text(order, ROWS[: len(order)]))
    table, coverage = fill(path, vocabulary, case_folded=True)
    expected = table.initial.copy()
    for token, place in winner.items():
        expected[vocabulary.tokens.index(token)] = ROWS[place]
    np.testing.assert_array_equal(table.rows, expected)
    assert all(len(ids) <= max_rows for ids in table.writes)
    assert coverage.num_types_found == 3
    assert coverage.num_types_folded == sum(token not in order for token in winner)


@pytest.mark.parametrize("seed", range(5))
def test_case_folding_against_all_pairs(path, seed):
    """The nearest of all file words by the rule, found by comparing each with each."""
    rng = np.random.default_rng(seed)
    spellings = ["".join(rng.choice(list("aAbBß\u017fsS"), rng.integers(1, 4))) for _ in range(150)]
    file_words = list(dict.fromkeys(spellings[:90]))
    tokens = ["<eos>", "<unk>", *dict.fromkeys(spellings[60:])]
    rows = random_rows(len(file_words), DIM, seed=seed)
    path.write_bytes(text(file_words, rows))
    table, coverage = fill(path, vocabulary_of(*tokens), case_folded=True)
    expected, num_folded = table.initial.copy(), 0
    for row_id, token in enumerate(tokens):
        alike = [word for word in file_words if word.casefold() == token.casefold()]
        if alike:
            best = min(
                alike, key=lambda word: (word != token, word != word.casefold(), file_words.index(word))
            )
            expected[row_id] = rows[file_words.index(best)]
            num_folded += best != token
    np.testing.assert_array_equal(table.rows, expected)
    assert coverage.num_types_folded == num_folded > 5


def test_unit_length(path):
    rows = ROWS.copy()
    rows[0] = 0  # "of": no length can be given to it.
    rows[3] *= np.float32(1e30)  # "the": its square is beyond float32.
    path.write_bytes(text(WORDS, rows))
    table, _ = fill(path, VOCABULARY, normalise="unit")
    exact = rows.astype(np.float64)
    lengths = np.linalg.norm(exact, axis=1, keepdims=True)
    unit = exact / np.where(lengths > 0, lengths, 1)
    expected = expected_rows(table, {word: word for word in ("of", "the", "日本", "polish")}, unit)
    np.testing.assert_allclose(table.rows, expected, rtol=1e-6)


@pytest.mark.parametrize("case_folded", [False, True])
@pytest.mark.parametrize("max_rows", [2, 100])
def test_scaled_to_the_initialiser(path, monkeypatch, case_folded, max_rows):
    """One factor for all rows found: each row counts once, though by case folding `Polish` is written twice."""
    monkeypatch.setattr(pretrained, "_WRITE_BYTES", 4 * DIM * max_rows)
    by_token = {word: word for word in ("of", "the", "日本", "polish")}
    if case_folded:
        by_token |= {"Polish": "polish", "NATO": "nato", "straße": "STRASSE"}
    table, coverage = fill(
        path, VOCABULARY, normalise="initialiser", initial_stddev=0.05, case_folded=case_folded
    )
    found = np.array([VOCABULARY.tokens.index(token) for token in by_token])
    taken = ROWS[[WORDS.index(word) for word in by_token.values()]].astype(np.float64)
    np.testing.assert_allclose(table.rows[found], taken * 0.05 / np.sqrt(np.mean(taken**2)), rtol=2e-6)
    np.testing.assert_allclose(np.sqrt(np.mean(table.rows[found].astype(np.float64) ** 2)), 0.05, rtol=1e-6)
    untouched = np.setdiff1d(np.arange(len(VOCABULARY)), found)
    np.testing.assert_array_equal(table.rows[untouched], table.initial[untouched])
    assert coverage.num_types_found == len(by_token)
    assert coverage.num_rows == len(WORDS)


def test_scaling_what_is_zero_or_not_found(path):
    path.write_bytes(text(["the"], np.zeros((1, DIM), np.float32)))
    table, coverage = fill(path, VOCABULARY, normalise="initialiser", initial_stddev=0.05)
    assert not table.rows[0].any()
    assert coverage.num_types_found == 1
    path.write_bytes(text(["xyzzy"], ROWS[:1]))
    table, coverage = fill(path, VOCABULARY, normalise="initialiser", initial_stddev=0.05)
    assert table.writes == []
    assert coverage.text().count("0 of ") == 2


@pytest.mark.parametrize("initial_stddev", [None, 0.0, float("nan")])
def test_scaling_needs_a_scale(path, initial_stddev):
    with pytest.raises(ValueError, match=f"root mean square is {initial_stddev}. Use another initialiser"):
        fill(path, VOCABULARY, normalise="initialiser", initial_stddev=initial_stddev)


def test_another_width_is_refused_before_anything_is_written(path):
    for content in (text(WORDS, ROWS), text(WORDS, ROWS, header=False), binary(WORDS, ROWS)):
        path.write_bytes(content)
        table = Table(len(VOCABULARY), 200)
        with pytest.raises(
            ValueError, match=r"Received: 5 in the file, 200 of the table\. Set the table's embed_dim to 5 "
        ):
            PretrainedVectors(path=str(path)).fill(vocabulary=VOCABULARY, dim=200, write=table.write)
        assert table.writes == []


@pytest.mark.parametrize("form", [text, binary])
def test_duplicates(path, form):
    """Only where a row has its vector already: what other words there were is not kept."""
    words = ["xyzzy", "the", "of", "xyzzy", "the", "of", "The"]
    path.write_bytes(form(words, ROWS[:7]))
    where = "line 6" if form is text else r"byte \d+"
    with pytest.raises(ValueError, match=f"{where}: each word must have one vector. Received: 'the' again"):
        fill(path, VOCABULARY)
    table, coverage = fill(path, VOCABULARY, on_malformed="skip", case_folded=True)
    expected = table.initial.copy()
    expected[VOCABULARY.tokens.index("the")], expected[VOCABULARY.tokens.index("of")] = ROWS[1], ROWS[2]
    np.testing.assert_array_equal(table.rows, expected)
    assert coverage.skipped == {vector_files.DUPLICATE: 2}
    assert coverage.text().endswith("Malformed and skipped: 2 (duplicate).")


def test_skipped_rows_are_not_written(path):
    path.write_text(
        "the 1 2\nof 1 2 x\npolish 1 nan 3\nPOLISH 4 5 6\n\nNew York 1 2 3\nxyzzy a b c\n日本 7 8 9\n"
    )
    table, coverage = fill(path, VOCABULARY, 3, on_malformed="skip", case_folded=True)
    expected = table.initial.copy()
    for token, row in (("Polish", [4, 5, 6]), ("polish", [4, 5, 6]), ("日本", [7, 8, 9])):
        expected[VOCABULARY.tokens.index(token)] = row
    np.testing.assert_array_equal(table.rows, expected)
    assert coverage.skipped == {
        vector_files.OTHER_WIDTH: 2,
        vector_files.NOT_NUMBERS: 1,
        vector_files.NOT_FINITE: 1,
        vector_files.WORD_WITH_SPACES: 1,
    }
    assert coverage.num_rows == 8


@pytest.mark.parametrize(
    ("name", "value"), [("format", "text"), ("normalise", "l2"), ("on_malformed", "ignore")]
)
def test_settings_of_other_values(name, value):
    with pytest.raises(ValueError, match=f"PretrainedVectors.{name} must be one of .* Received: '{value}'"):
        PretrainedVectors(path="x", **{name: value})


def test_paths(tmp_path, path, monkeypatch):
    for name in ("a.zip", "empty", "b.vec", "c.vec"):
        (tmp_path / name).write_bytes(b"" if name == "empty" else b"x")
    for wrong, message in (
        ("none", "no such file"),
        ("a.zip", ".zip is not read"),
        ("empty", "is empty"),
        ("*.vec", "must name one file. Received: "),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            fill(tmp_path / wrong, VOCABULARY)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert fill("~/vectors", VOCABULARY)[1].num_types_found == 4


def test_memory_is_bounded(tmp_path, monkeypatch):
    """A table of 24 MB is filled 1 MiB at a time; neither it nor the file is held."""
    monkeypatch.setattr(pretrained, "_WRITE_BYTES", 1 << 20)
    monkeypatch.setattr(vector_files, "_BLOCK_BYTES", 1 << 20)
    num_rows, dim = 20_000, 300
    words = [f"w{i}" for i in range(num_rows)]
    path = tmp_path / "vectors.bin"
    path.write_bytes(binary(words, np.ones((num_rows, dim), np.float32)))
    vocabulary = vocabulary_of("<unk>", "<eos>", *words)
    assert len(vocabulary.ids) == num_rows + 2  # Made before, as it is of every vocabulary in use.
    sizes = []
    tracemalloc.start()
    PretrainedVectors(path=str(path)).fill(
        vocabulary=vocabulary, dim=dim, write=lambda ids, rows: sizes.append(rows.shape)
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(n for n, _ in sizes) == num_rows
    assert {n for n, _ in sizes[:-1]} == {(1 << 20) // (4 * dim)}
    assert peak < 10 << 20


@pytest.mark.skipif(not GLOVE.exists(), reason=f"needs {GLOVE}")
@pytest.mark.parametrize("case_folded", [False, True])
def test_glove_against_a_plain_reading(case_folded):
    file_rows = {}
    for line in lzma.decompress(GLOVE.read_bytes()).decode().splitlines():
        word, *numbers = line.split(" ")
        file_rows[word] = np.array([float(number) for number in numbers], np.float32)
    assert len(file_rows) == 20_000
    some = list(file_rows)[3::7]
    tokens = [
        "<unk>",
        "<eos>",
        "xyzzy-xyzzy",
        *some,
        *(word.title() for word in some[::5] if word.title() != word),
    ]
    vocabulary = vocabulary_of(*tokens)
    table, coverage = fill(GLOVE, vocabulary, 50, case_folded=case_folded)
    expected = table.initial.copy()
    for row_id, token in enumerate(tokens):
        row = file_rows.get(token, file_rows.get(token.lower()) if case_folded else None)
        if row is not None:
            expected[row_id] = row
    np.testing.assert_array_equal(table.rows, expected)
    assert coverage.num_types_found == (len(tokens) - 3 if case_folded else len(some))
    assert (coverage.file.format, coverage.num_rows, coverage.skipped) == ("glove", 20_000, {})
