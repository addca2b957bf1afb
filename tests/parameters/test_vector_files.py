"""Rows of vector files: all formats, sound, malformed and damaged; and gensim's own files against gensim."""

import gzip
import lzma
import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from vectors import binary, random_rows, text

from lmscale.parameters import vector_files
from lmscale.parameters.vector_files import VectorReader, describe

WORDS = ["the", "naïve", "日本", "12", "a_b", "-", "\u3000x", "no\u00a0break", "nan", "ß"]
ROWS = random_rows(len(WORDS), 7)
FORMS = {
    "word2vec_text": text(WORDS, ROWS),
    "word2vec_text, blank at line ends": text(
        WORDS, ROWS, trailing=" "
    ),  # As fastText and word2vec.c write it.
    "word2vec_text, carriage returns": text(WORDS, ROWS, line_end="\r\n"),
    "word2vec_text, mark": b"\xef\xbb\xbf" + text(WORDS, ROWS),
    "word2vec_text, no last line end": text(WORDS, ROWS)[:-1],
    "word2vec_binary": binary(WORDS, ROWS),
    "word2vec_binary, no line feeds": binary(WORDS, ROWS, behind=b""),
    "glove": text(WORDS, ROWS, header=False),
}


def read(path, *, format="auto", on_malformed="stop"):
    """(description, {word: vector}, reader, places), all numbers read."""
    file = describe(path, format=format)
    reader = VectorReader(file, on_malformed=on_malformed)
    vectors, places = {}, {}
    for place, word, numbers in reader:
        vector = reader.vector(numbers, word=word, place=place)
        if vector is not None:
            vectors[word], places[word] = vector, place
    return file, vectors, reader, places


def assert_same(vectors, words, rows):
    assert list(vectors) == list(words)
    actual = np.stack(list(vectors.values()))
    assert actual.dtype == np.float32
    np.testing.assert_array_equal(actual, rows)


@pytest.mark.parametrize("compress", [bytes, gzip.compress, lzma.compress])
@pytest.mark.parametrize("form", FORMS)
def test_forms_are_told_and_read(tmp_path, compress, form):
    path = tmp_path / "vectors"
    path.write_bytes(compress(FORMS[form]))
    file, vectors, reader, _ = read(path)
    assert (file.format, file.dim) == (form.partition(",")[0], 7)
    assert file.num_rows == (None if form == "glove" else len(WORDS))
    assert_same(vectors, WORDS, ROWS)
    assert (reader.num_rows, dict(reader.skipped)) == (len(WORDS), {})


@pytest.mark.parametrize("form", FORMS)
def test_rows_across_blocks(tmp_path, monkeypatch, form):
    path = tmp_path / "vectors"
    path.write_bytes(FORMS[form])
    expected = {word: FORMS[form].index(word.encode() + b" ") for word in WORDS}
    for block_bytes in (200, 201, 211, 257):
        monkeypatch.setattr(vector_files, "_BLOCK_BYTES", block_bytes)
        _, vectors, _, places = read(path)
        assert_same(vectors, WORDS, ROWS)
        if "binary" in form:
            assert places == expected
        else:
            first = 1 if form == "glove" else 2
            assert list(places.values()) == list(range(first, first + len(WORDS)))


@pytest.mark.parametrize("seed", range(8))
def test_random_vectors_in_all_forms(tmp_path, seed):
    rng = np.random.default_rng(seed)
    dim, num_words = int(rng.integers(2, 40)), int(rng.integers(1, 50))
    letters = list("abcXYZ09.,-_'éЖ日😀")
    words = list(dict.fromkeys("".join(rng.choice(letters, rng.integers(1, 12))) for _ in range(num_words)))
    rows = random_rows(len(words), dim, seed=seed)
    path = tmp_path / "vectors"
    for content in (
        text(words, rows),
        text(words, rows, header=False),
        binary(words, rows),
        binary(words, rows, behind=b""),
    ):
        path.write_bytes(content)
        assert_same(read(path)[1], words, rows)


def test_one_number_a_row(tmp_path):
    path = tmp_path / "vectors"
    rows = ROWS[:, :1]
    for content in (text(WORDS, rows), binary(WORDS, rows), text(WORDS, rows, header=False)):
        path.write_bytes(content)
        assert_same(read(path)[1], WORDS, rows)
    path.write_text("7 5\n8 4\n")  # GloVe's form with rows of one number, if one says so.
    assert_same(read(path, format="glove")[1], ["7", "8"], np.array([[5], [4]], np.float32))


@pytest.mark.parametrize("format", ["word2vec_text", "fasttext", "word2vec_binary", "glove"])
def test_named_formats(tmp_path, format):
    path = tmp_path / "vectors"
    path.write_bytes(FORMS["word2vec_text" if format == "fasttext" else format])
    assert_same(read(path, format=format)[1], WORDS, ROWS)


# {case: (content, reason, message in full but for the path and what it advises at last)}. The second of three rows of
# three numbers is malformed, or the file is behind the third.
TEXT_CASES = {
    "too few numbers": (b"of 1 2", vector_files.OTHER_WIDTH, "Received: the word 'of' and 2 numbers"),
    "too many numbers": (b"of 1 2 3 4", vector_files.OTHER_WIDTH, "Received: the word 'of' and 4 numbers"),
    "two blanks": (b"of  1 2 3", vector_files.WORD_WITH_SPACES, "Received: a word with spaces, 'of '"),
    "a word alone": (b"of", vector_files.OTHER_WIDTH, "Received: the word 'of' and 0 numbers"),
    "blank line": (b"", vector_files.OTHER_WIDTH, "Received: the word '' and 0 numbers"),
    "word with spaces": (
        b"at name@domain.com 1 2 3",
        vector_files.WORD_WITH_SPACES,
        "Received: a word with spaces, 'at name@domain.com'",
    ),
    "dots with spaces": (b". . . 1 2 3", vector_files.WORD_WITH_SPACES, "a word with spaces, '. . .'"),
    "no word": (b" 1 2 3", vector_files.NO_WORD, "must begin with a word"),
    "not UTF-8": (b"caf\xe9 1 2 3", vector_files.NOT_UTF8, r"Received: b'caf\xe9'"),
    "not a number": (b"of 1 2,5 3", vector_files.NOT_NUMBERS, "Received: '2,5' in the row of 'of'"),
    "underscore": (b"of 1 2_5 3", vector_files.NOT_NUMBERS, "Received: '2_5' in the row of 'of'"),
    "NaN": (b"of 1 nan 3", vector_files.NOT_FINITE, "Received: nan in the row of 'of'"),
    "infinity": (b"of 1 -inf 3", vector_files.NOT_FINITE, "Received: -inf in the row of 'of'"),
    "beyond float32": (b"of 1 1e39 3", vector_files.NOT_FINITE, "Received: inf in the row of 'of'"),
}


@pytest.mark.parametrize("header", [b"3 3\n", b""])
@pytest.mark.parametrize("case", TEXT_CASES)
def test_malformed_lines(tmp_path, case, header):
    line, reason, message = TEXT_CASES[case]
    path = tmp_path / "vectors.txt"
    path.write_bytes(header + b"the 1 2 3\n" + line + b"\nto 4 5 6\n")
    number = 3 if header else 2
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        read(path)
    assert str(raised.value).startswith(f"{path}, line {number}: ")
    assert "set PretrainedVectors.on_malformed = 'skip'" in str(raised.value)
    _, vectors, reader, places = read(path, on_malformed="skip")
    assert_same(vectors, ["the", "to"], np.array([[1, 2, 3], [4, 5, 6]], np.float32))
    assert (reader.num_rows, dict(reader.skipped)) == (3, {reason: 1})
    assert places["to"] == number + 1


@pytest.mark.parametrize("form", ["word2vec_text", "word2vec_binary"])
@pytest.mark.parametrize("announced", [8, 12])
def test_wrong_count(tmp_path, form, announced):
    path = tmp_path / "vectors"
    path.write_bytes(FORMS[form].replace(b"10 7", b"%d 7" % announced, 1))
    if announced == 12:
        message = f"{path}: must have the 12 rows that its first line announces. Received: 10 rows."
    else:
        place = "line 10" if form == "word2vec_text" else "byte"
        message = f"{path}, {place}"
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        read(path)
    if announced == 8:
        assert "after the 8 rows that its first line announces. Received: a row of the word 'nan'." in str(
            raised.value
        )
    _, vectors, reader, _ = read(path, on_malformed="skip")
    assert_same(vectors, WORDS, ROWS)
    assert dict(reader.skipped) == {vector_files.OTHER_COUNT: 1}


@pytest.mark.parametrize("missing", [1, 2, 28, 29, 30, 31])
def test_truncated_binary(tmp_path, missing):
    content = binary(WORDS, ROWS, behind=b"")
    path = tmp_path / "vectors.bin"
    path.write_bytes(content[:-missing])
    begin = len(content) - len("ß ".encode()) - 4 * 7
    # Without any byte of the last row, the count tells.
    message = f"{path}, byte {begin:,}: must be a word, a blank and 28 bytes"
    if missing == 31:
        message = f"{path}: must have the 10 rows that its first line announces. Received: 9 rows."
    with pytest.raises(ValueError, match=re.escape(message)):
        read(path)
    _, vectors, reader, _ = read(path, on_malformed="skip")
    if missing == 31:
        assert_same(vectors, WORDS[:-1], ROWS[:-1])
        assert dict(reader.skipped) == {vector_files.OTHER_COUNT: 1}
    else:  # The row before may be the beginning of a word with a space.
        assert_same(vectors, WORDS[:-2], ROWS[:-2])
        assert dict(reader.skipped) == dict.fromkeys(
            [vector_files.OTHER_COUNT, vector_files.CUT_OFF, vector_files.BEFORE_MALFORMED], 1
        )


def test_malformed_rows_of_a_binary(tmp_path):
    rows = ROWS[:6].copy()
    rows[1, 3] = np.inf
    content = binary(["the", "of", "in", "CAFE", "x", "to"], rows).replace(b"CAFE", b"caf\xe9")
    path = tmp_path / "vectors.bin"
    path.write_bytes(content.replace(b"\nx ", b"\n "))
    with pytest.raises(ValueError, match=rf"byte {content.index(b'of ')}: all numbers must be finite.* inf"):
        read(path)
    _, vectors, reader, _ = read(path, on_malformed="skip")
    assert_same(vectors, ["the", "to"], rows[[0, 5]])
    assert dict(reader.skipped) == {
        vector_files.BEFORE_MALFORMED: 1,
        vector_files.NOT_FINITE: 1,
        vector_files.NOT_UTF8: 1,
        vector_files.NO_WORD: 1,
    }


@pytest.mark.parametrize("dim", [7, 300])
@pytest.mark.parametrize("place", [20, 198, 199])
def test_a_space_in_a_word_of_a_binary_is_noticed(tmp_path, dim, place):
    """What follows is read out of step: no word may get the numbers of another, or what is none."""
    words = [f"word{i}" for i in range(200)]
    words[place] = "New York"
    rows = np.random.default_rng(0).normal(size=(200, dim)).astype(np.float32)
    path = tmp_path / "vectors.bin"
    path.write_bytes(binary(words, rows))
    with pytest.raises(ValueError, match="byte"):
        read(path)
    reader = VectorReader(describe(path, format="auto"), on_malformed="skip")
    num_read = 0
    try:
        for row_place, word, numbers in reader:
            np.testing.assert_array_equal(
                reader.vector(numbers, word=word, place=row_place), rows[words.index(word)]
            )
            num_read += 1
    except ValueError as error:
        assert re.search("malformed words in a row.* space|without a blank.* space", str(error))  # noqa: PT017
    assert num_read >= place
    assert reader.skipped[vector_files.BEFORE_MALFORMED] == 1


def test_width_of_most_lines_is_that_of_glove(tmp_path):
    path = tmp_path / "vectors.txt"
    path.write_bytes(b"New York 1 2\n" + text(WORDS, ROWS[:, :2], header=False))
    with pytest.raises(ValueError, match=r"line 1: .* a word with spaces, 'New York'"):
        read(path)
    assert_same(read(path, on_malformed="skip")[1], WORDS, ROWS[:, :2])


def test_malformed_first_row_of_text_is_not_binary(tmp_path):
    path = tmp_path / "vectors.txt"
    for row in ("the 1 2", "the 1 zwei 3", "日本 語 ü 1 2 3", "the 1 2 3 4"):
        path.write_text(f"2 3\n{row}\nto 1 2 3\n", encoding="utf-8")
        assert describe(path, format="auto").format == "word2vec_text"


def test_binary_of_plain_bytes_is_told(tmp_path):
    """Zeros, ones, tiny and huge numbers: no luck with the bytes of the first row."""
    path = tmp_path / "vectors.bin"
    for value in (0, 1, -1, 0.1, 1e-30, 1e30):
        path.write_bytes(binary(["the", "of"], np.full((2, 3), value, np.float32)))
        assert describe(path, format="auto").format == "word2vec_binary"


BEGINNINGS = {
    "nothing": (gzip.compress(b""), "auto", "must hold word vectors. Received: nothing"),
    "blanks": (b"\n \n", "auto", "must hold word vectors. Received: nothing"),
    "prose": (
        b"It was the best of times,\nit was the worst.\n",
        "auto",
        "Received: 'It was the best of times,'",
    ),
    "pickle": (
        b"\x80\x02cgensim.models.keyedvectors\nKeyedVectors\n",
        "auto",
        "line 1: must be two whole numbers",
    ),
    "fastText's model": (b"\xba\x16\x4f\x2f\x0c\0\0\0" + bytes(600), "auto", "Give the .vec file"),
    "no header": (FORMS["glove"], "word2vec_text", "Set PretrainedVectors.format = 'glove'"),
    "no header, binary": (FORMS["glove"], "word2vec_binary", "line 1: must be two whole numbers"),
    "no rows": (b"0 3\n", "auto", "must announce a row and a number at least. Received: '0 3'"),
    "no numbers": (b"3 0\n", "auto", "must announce a row and a number at least. Received: '3 0'"),
    "UTF-16": (FORMS["word2vec_text"].decode().encode("utf-16"), "auto", "byte order mark of UTF-16"),
}


@pytest.mark.parametrize("case", BEGINNINGS)
def test_other_beginnings(tmp_path, case):
    content, format, message = BEGINNINGS[case]
    path = tmp_path / "vectors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        read(path, format=format)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("on_malformed", ["stop", "skip"])
def test_damaged_archives(tmp_path, on_malformed):
    for name, compress in (("a.gz", gzip.compress), ("a.xz", lzma.compress)):
        path = tmp_path / name
        path.write_bytes(compress(FORMS["word2vec_text"])[:-20])
        with pytest.raises(ValueError, match=f"{re.escape(str(path))}: damaged behind byte"):
            read(path, on_malformed=on_malformed)


def test_what_is_no_text_is_not_held_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(vector_files, "_BLOCK_BYTES", 1000)
    path = tmp_path / "vectors"
    path.write_bytes(b"the 1 2 3\n" + b"x" * 5000)
    with pytest.raises(ValueError, match=r"line 2: .* more than 1,000 bytes without a line end"):
        read(path, on_malformed="skip")
    path.write_bytes(b"2 3\n" + b"x" * 5000)
    with pytest.raises(ValueError, match=r"byte 4: .* more than 1,000 bytes without a blank"):
        read(path, format="word2vec_binary", on_malformed="skip")


@pytest.mark.parametrize("form", ["text", "binary"])
def test_memory_is_bounded(tmp_path, form):
    """A file of 32 MiB passes in a few blocks of 4 MiB."""
    row = np.random.default_rng(0).normal(size=300).astype(np.float32)
    one = (
        text(["word"], row[np.newaxis], header=False) if form == "text" else binary(["word"], row[np.newaxis])
    )
    one = one if form == "text" else one.split(b"\n", 1)[1]
    num_rows = (32 << 20) // len(one)
    path = tmp_path / "vectors"
    path.write_bytes(b"%d 300\n" % num_rows + one * num_rows)
    reader = VectorReader(describe(path, format="auto"), on_malformed="stop")
    tracemalloc.start()
    for _ in reader:
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert reader.num_rows == num_rows
    assert peak < 24 << 20


GENSIM_FILES = {
    "euclidean_vectors.bin": "word2vec_binary",
    "high_precision.kv.bin": "word2vec_binary",
    "high_precision.kv.txt": "word2vec_text",
    "word2vec_pre_kv_c": "word2vec_text",
    "lee_fasttext.vec": "word2vec_text",
    "crime-and-punishment.vec": "word2vec_text",
    "toy-model.vec": "word2vec_text",
    "test_glove.txt": "glove",
}


@pytest.fixture(scope="module")
def gensim_data():
    gensim = pytest.importorskip("gensim", reason="needs gensim: pip install 'lmscale[vectors-test]'")
    return Path(gensim.__file__).parent / "test" / "test_data"


@pytest.mark.parametrize("name", GENSIM_FILES)
def test_gensims_files_as_gensim_reads_them(gensim_data, name):
    from gensim.models import KeyedVectors

    file, vectors, reader, _ = read(gensim_data / name)
    assert file.format == GENSIM_FILES[name]
    expected = KeyedVectors.load_word2vec_format(
        str(gensim_data / name), binary=file.format == "word2vec_binary", no_header=file.format == "glove"
    )
    assert_same(vectors, expected.index_to_key, expected.vectors)
    assert reader.num_rows == len(expected)


def test_gensims_file_with_too_few_rows(gensim_data):
    from gensim.models import KeyedVectors

    path = gensim_data / "pretrained.vec"
    with pytest.raises(EOFError):
        KeyedVectors.load_word2vec_format(str(path))
    with pytest.raises(
        ValueError, match=r"must have the 3 rows that its first line announces. Received: 1 rows"
    ):
        read(path)
    _, vectors, _, _ = read(path, on_malformed="skip")
    expected = np.array([[0.069324, 0.18155, 0.080453, -0.1799, 0.032043]], np.float32)
    assert_same(vectors, ["dummy"], expected)


def test_gensims_file_that_is_not_utf8(gensim_data):
    from gensim.models import KeyedVectors

    path = gensim_data / "pang_lee_polarity_fasttext.vec"
    with pytest.raises(ValueError, match=r"line [\d,]+: a word must be UTF-8"):
        read(path)
    _, vectors, reader, _ = read(path, on_malformed="skip")
    expected = KeyedVectors.load_word2vec_format(str(path), unicode_errors="surrogateescape")
    surrogates = re.compile("[\ud800-\udfff]")  # What surrogateescape makes of the malformed bytes.
    sound = [word for word in expected.index_to_key if not surrogates.search(word)]
    assert len(sound) < len(expected)
    assert_same(vectors, sound, expected[sound])
    assert dict(reader.skipped) == {vector_files.NOT_UTF8: len(expected) - len(sound)}


@pytest.mark.parametrize("binary_form", [False, True])
def test_what_gensim_writes(gensim_data, tmp_path, binary_form):
    from gensim.models import KeyedVectors

    vectors = KeyedVectors(7)
    vectors.add_vectors(WORDS, ROWS)
    path = tmp_path / "vectors"
    vectors.save_word2vec_format(str(path), binary=binary_form, write_header=True)
    assert_same(read(path)[1], vectors.index_to_key, vectors.vectors)
