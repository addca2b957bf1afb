"""Similarity, analogies and files of vectors against loops, closed forms and, if it is there, gensim."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from array_parameters import array_parameters

from lmscale.analogies import analogy_report, read_questions
from lmscale.checkpoints.directory import Checkpoints
from lmscale.data.vocab import Vocabulary
from lmscale.parameters.vector_writing import write_vectors
from lmscale.word_rows import FileRows, TableRows
from lmscale.word_similarity import Pairs, cosine, read_pairs, similarity_report, spearman

DIM = 6


# ------------------------------------------------------------------------------------------------------- Similarity


@pytest.mark.parametrize(
    ("content", "words", "scores"),
    [
        ("tiger\tcat\t7.35\nplane\tcar\t5.77\n", [("tiger", "cat"), ("plane", "car")], [7.35, 5.77]),
        # WordSim-353's combined.csv, and Windows's ends of lines.
        ("Word 1,Word 2,Human (mean)\r\nlove,sex,6.77\r\n", [("love", "sex")], [6.77]),
        # SimLex-999: the part of speech stands before the score.
        ("word1\tword2\tPOS\tSimLex999\tconc\nold\tnew\tA\t1.58\t2.72\n", [("old", "new")], [1.58]),
        ("\ufeff# a comment\n\nsun sunlight 50.000000\n", [("sun", "sunlight")], [50.0]),
        ("a;b;-1e-3\n", [("a", "b")], [-0.001]),
    ],
)
def test_pairs_in_the_usual_forms(tmp_path, content, words, scores):
    path = tmp_path / "pairs.txt"
    path.write_bytes(content.encode())
    pairs = read_pairs(path)
    assert pairs.words == words
    assert pairs.scores.tolist() == scores


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a b 1\nc d\n", r"line 2: must be two words and a number. Received: 'c d'"),
        ("a b 1\nc d nan\n", r"line 2: .*Received: 'c d nan'"),
        ("one line of text\n", "must hold pairs of words with scores. Received: none"),
    ],
)
def test_files_without_pairs_are_refused(tmp_path, content, message):
    path = tmp_path / "pairs.txt"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_pairs(path)


def slow_spearman(one, other):
    """By the definition: the correlation of ranks, each the mean place of its equals."""
    ranks = [[np.mean(np.flatnonzero(np.sort(x) == value)) for value in x] for x in (one, other)]
    return np.corrcoef(ranks)[0, 1]


@pytest.mark.parametrize("levels", [3, 10, 10**9])
def test_rank_correlation_with_ties(levels):
    one, other = np.random.default_rng(levels).integers(0, levels, [2, 101]).astype(float)
    assert spearman(one, other) == pytest.approx(slow_spearman(one, other), abs=1e-12)


def test_rank_correlation_of_known_data():
    # Without ties, 1 - 6 * sum of squared differences of ranks / (n (n^2 - 1)): here 1 - 6 * 8 / 120.
    assert spearman(np.array([1, 2, 3, 4, 5]), np.array([10, 5, 20, 100, 50])) == pytest.approx(
        0.8, abs=1e-12
    )
    assert spearman(np.array([1.0, 2.0, 3.0]), np.array([9.0, 4.0, 1.0])) == pytest.approx(-1)
    assert spearman(np.array([1.0, 1.0]), np.array([1.0, 2.0])) is None
    assert spearman(np.array([1.0]), np.array([1.0])) is None


def test_cosine():
    assert cosine([3, 4], [4, 3]) == pytest.approx(24 / 25, abs=1e-15)
    assert cosine([0, 0], [1, 2]) == 0


def test_pairs_with_unknown_words_are_counted():
    vectors = {0: np.array([1.0, 0.0]), 1: np.array([1.0, 0.1]), 2: np.array([0.0, 1.0])}
    ids = {"a": 0, "b": 1, "c": 2}
    pairs = Pairs([("a", "b"), ("a", "c"), ("b", "c"), ("a", "x")], np.array([9.0, 1.0, 2.0, 5.0]))
    report = similarity_report(pairs, ids.get, vectors)
    assert report == {"spearman": pytest.approx(1.0), "pairs": 4, "missing_pairs": 1}


# -------------------------------------------------------------------------------------------------------- Analogies


def random_words(number=137, seed=0):
    rng = np.random.default_rng(seed)
    return [f"w{i}" for i in range(number)], rng.normal(size=[number, DIM]).astype(np.float32)


def test_analogies_against_a_loop(tmp_path):
    words, rows = random_words()
    rng = np.random.default_rng(1)
    questions = [rng.choice(len(words), 3, replace=False).tolist() for _ in range(40)]
    unit = rows.astype(np.float64) / np.linalg.norm(rows, axis=1, keepdims=True)
    lines, expected = [": first"], {"first": [], "second": []}
    for number, (a, b, c) in enumerate(questions):
        if number == 25:
            lines.append(": second")
        scores = {d: unit[d] @ (unit[b] - unit[a] + unit[c]) for d in range(len(words)) if d not in (a, b, c)}
        best = max(scores, key=scores.get)
        d = best if number % 3 else (best + 1) % len(words)
        expected["first" if number < 25 else "second"].append(d == best)
        lines.append(" ".join(words[i] for i in (a, b, c, d)))
    lines.append("w0 w1 w2 unknown")
    path = tmp_path / "questions.txt"
    path.write_text("\n".join(lines) + "\n")
    ids = {word: i for i, word in enumerate(words)}
    # In blocks, of which some have none of a question's words.
    blocks = [(np.arange(s, min(s + 23, 137)), rows[s : s + 23]) for s in range(0, 137, 23)]
    report = analogy_report(read_questions(path), ids.get, dict(enumerate(rows)), blocks)
    everything = expected["first"] + expected["second"]
    assert report["accuracy"] == pytest.approx(np.mean(everything))
    assert (report["questions"], report["missing_questions"]) == (41, 1)
    for name, of_section in expected.items():
        assert report["sections"][name]["accuracy"] == pytest.approx(np.mean(of_section))
    assert 0 < np.mean(everything) < 1


def test_analogies_without_known_words(tmp_path):
    path = tmp_path / "questions.txt"
    path.write_text("a b c d\n")
    report = analogy_report(read_questions(path), {}.get, {}, [])
    assert report["accuracy"] is None
    assert (report["questions"], report["missing_questions"]) == (1, 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [(": x\na b c\n", "line 2: must be four words.*Received: 'a b c'"), (": x\n", "Received: none")],
)
def test_files_without_questions_are_refused(tmp_path, content, message):
    path = tmp_path / "questions.txt"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_questions(path)


# ------------------------------------------------------------------------------------------------- Files and tables


@pytest.mark.parametrize("form", ["word2vec_text", "word2vec_binary"])
def test_a_file_that_is_written_is_read_with_the_same_bits(tmp_path, form):
    words, rows = random_words()
    words[3] = "žluťoučký"
    rows[0, :4] = 1e-38, -3.4028235e38, 0.1, 123456789
    path = tmp_path / "vectors"
    write_vectors(path, zip(words, rows, strict=True), num_rows=len(words), dim=DIM, format=form)
    read = FileRows(path)
    assert read.words == words
    assert read.dim == DIM
    np.testing.assert_array_equal(np.concatenate([block for _, block in read.blocks()]), rows)
    assert [p.name for p in tmp_path.iterdir()] == ["vectors"]


@pytest.mark.parametrize("form", ["word2vec_text", "word2vec_binary"])
def test_gensim_loads_what_is_written(tmp_path, form):
    models = pytest.importorskip("gensim.models")
    words, rows = random_words()
    write_vectors(tmp_path / "v", zip(words, rows, strict=True), num_rows=len(words), dim=DIM, format=form)
    loaded = models.KeyedVectors.load_word2vec_format(str(tmp_path / "v"), binary=form.endswith("binary"))
    assert loaded.index_to_key == words
    np.testing.assert_array_equal(loaded.vectors, rows)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("a b", [1, 2])], "must have no white space. Received: 'a b'"),
        ([("", [1, 2])], "must have no white space. Received: ''"),
        ([("a", [1, 2, 3])], r"Rows must have 2 numbers. Received: \(3,\) of 'a'"),
        ([], "There must be the 1 rows announced. Received: 0"),
    ],
)
def test_rows_that_cannot_be_written_leave_no_file(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        write_vectors(tmp_path / "v", rows, num_rows=1, dim=2, format="word2vec_text")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def workdir(tmp_path):
    """A work directory with a checkpoint of a table in several blocks: (path, words, their rows)."""
    words, rows = random_words(1003, seed=2)
    words[5], words[700] = "<unk>", "<eos>"
    vocabulary = Vocabulary(tokens=tuple(words), counts=np.arange(1003, 0, -1))
    parameters = array_parameters({"tables/words/embedding": rows, "tables/contexts/embedding": -rows})
    metadata = {"vocabulary_sha256": vocabulary.sha256, "vocabularies": {"words": vocabulary.sha256}}
    Checkpoints(tmp_path / "run" / "checkpoints", block_mib=0.01).save(3, parameters, metadata=metadata)
    (tmp_path / "run" / "vocab.txt").write_text(vocabulary.to_text())
    is_word = ~np.isin(words, ["<unk>", "<eos>"])
    return tmp_path / "run", [w for w, known in zip(words, is_word, strict=True) if known], rows[is_word]


@pytest.mark.parametrize(("table", "sign"), [("words", 1), ("contexts", -1)])
def test_words_of_a_table_are_read_in_blocks(workdir, table, sign):
    path, words, rows = workdir
    found = TableRows(path, table=table)
    assert found.words == words
    blocks = list(found.blocks())
    assert len(blocks) > 2
    np.testing.assert_array_equal(np.concatenate([ids for ids, _ in blocks]), np.arange(len(words)))
    np.testing.assert_array_equal(np.concatenate([block for _, block in blocks]), sign * rows)
    vectors = found.vectors_of(["w9", "W10", "unknown", "<unk>", "w1002"])
    assert sorted(vectors) == [words.index(w) for w in ("w9", "w10", "w1002")]
    for i, vector in vectors.items():
        np.testing.assert_array_equal(vector, sign * rows[i])


def test_a_vocabulary_without_unknown_words(tmp_path):
    """As of the items of a catalogue."""
    words, rows = random_words(31, seed=3)
    vocabulary = Vocabulary(tokens=tuple(words), counts=np.arange(31, 0, -1))
    parameters = array_parameters({"tables/items/embedding": rows})
    metadata = {
        "vocabularies": {"items": vocabulary.sha256},
        "vocabulary_files": {"items": "vocab.items.txt"},
    }
    Checkpoints(tmp_path / "checkpoints").save(3, parameters, metadata=metadata)
    (tmp_path / "vocab.items.txt").write_text(vocabulary.to_text())
    found = TableRows(tmp_path, table="items")
    assert (found.words, found.counts.tolist()) == (words, list(range(31, 0, -1)))
    np.testing.assert_array_equal(np.concatenate([block for _, block in found.blocks()]), rows)


def test_rows_of_hashed_values_have_no_words(tmp_path):
    parameters = array_parameters({"tables/buckets/embedding": np.ones([5, 3], np.float32)})
    Checkpoints(tmp_path / "checkpoints").save(1, parameters, metadata={"vocabulary_files": {}})
    with pytest.raises(ValueError, match=r"must have words. Received: buckets, whose rows are numbers"):
        TableRows(tmp_path, table="buckets")


def test_a_table_or_vocabulary_that_is_not_there(workdir):
    path, _, _ = workdir
    with pytest.raises(ValueError, match=r"must be one of the run's, contexts, words. Received: rows"):
        TableRows(path, table="rows")
    vocabulary = (path / "vocab.txt").read_text()
    (path / "vocab.txt").write_text(vocabulary.replace("w1002\t1\n", "other\t1\n"))
    with pytest.raises(ValueError, match=r"must be the vocabulary of the run. Received: another one"):
        TableRows(path, table="words")
    (path / "vocab.txt").unlink()
    with pytest.raises(ValueError, match=r"must hold its vocabulary. Received: no "):
        TableRows(path, table="words")


def run_command(*flags):
    return subprocess.run(
        [sys.executable, "-m", "lmscale.word_vectors", *flags],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[1],
    )


def test_the_command_measures_what_it_exports(workdir, tmp_path):
    path, words, rows = workdir
    pairs = tmp_path / "pairs.txt"
    scores = np.random.default_rng(0).uniform(size=20)
    pairs.write_text("".join(f"w{i} w{i + 30} {score}\n" for i, score in enumerate(scores)))
    questions = tmp_path / "questions.txt"
    questions.write_text("w1 w2 w3 w4\n")
    outcomes = []
    for source in (f"--workdir={path}", f"--vectors={tmp_path / 'v.bin'}"):
        flags = [source, f"--similarity={pairs}", f"--analogies={questions}"]
        if "workdir" in source:
            flags.append(f"--export={tmp_path / 'v.bin'}")
        process = subprocess.run(
            [sys.executable, "-m", "lmscale.word_vectors", *flags],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parents[1],
        )
        outcomes.append([json.loads(line) for line in process.stdout.splitlines()])
    assert outcomes[0][:2] == outcomes[1]
    place = {word: i for i, word in enumerate(words)}
    known = [i for i in range(20) if f"w{i}" in place and f"w{i + 30}" in place]
    cosines = [cosine(rows[place[f"w{i}"]], rows[place[f"w{i + 30}"]]) for i in known]
    assert outcomes[0][0]["spearman"] == pytest.approx(slow_spearman(np.array(cosines), scores[known]))
    assert outcomes[0][2]["words"] == 1001
    assert outcomes[0][2]["format"] == "word2vec_binary"


@pytest.mark.parametrize(
    ("table", "sign", "asked", "there"), [("words", 1, 999, 999), ("contexts", -1, 5000, 1001)]
)
def test_the_command_writes_the_most_frequent_words_for_the_projector(
    workdir, tmp_path, table, sign, asked, there
):
    path, words, rows = workdir
    process = run_command(
        f"--workdir={path}", f"--table={table}", f"--projector={tmp_path / 'p'}", f"--words={asked}"
    )
    assert process.returncode == 0, process.stderr
    report = json.loads(process.stdout)
    assert (report["words"], report["dim"], report["table"]) == (there, DIM, table)
    vectors = np.loadtxt(tmp_path / "p" / f"{table}.vectors.tsv", dtype=np.float32)
    np.testing.assert_array_equal(vectors, sign * rows[:there])
    lines = (tmp_path / "p" / f"{table}.words.tsv").read_text().splitlines()
    # Counts are 1,003 and falling; the rows 5 and 700 are no words.
    counts = [1003 - i for i in range(1003) if i not in (5, 700)]
    assert lines == ["word\tcount", *(f"{w}\t{c}" for w, c in zip(words[:there], counts, strict=False))]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "Pass either --workdir or --vectors. Received: neither"),
        (["--workdir=a", "--vectors=b"], "Received: both"),
        (["--workdir=a"], "There must be something to do"),
        (["--vectors=a", "--table=b", "--similarity=c"], "--table goes with --workdir"),
        (["--vectors=a", "--projector=b"], "--projector goes with --workdir"),
        (["--workdir=a", "--words=5", "--export=b"], "--words goes with --projector"),
        (["--workdir=a", "--words=0", "--projector=b"], "words"),
    ],
)
def test_mistakes_in_flags(flags, message):
    process = run_command(*flags)
    assert process.returncode == 2
    assert message in process.stderr


def test_what_the_projector_cannot_have(workdir, tmp_path):
    path, _, _ = workdir
    (tmp_path / "file").write_text("")
    for flags, message in (
        ([f"--workdir={path}", f"--projector={tmp_path / 'file'}"], "needs a folder. Received"),
        (
            [f"--workdir={path}", f"--projector={tmp_path / 'p'}", "--table=rows"],
            "must be one of the run's, contexts, words. Received: rows",
        ),
    ):
        process = run_command(*flags)
        assert process.returncode == 2
        assert message in process.stderr
        assert "Traceback" not in process.stderr
