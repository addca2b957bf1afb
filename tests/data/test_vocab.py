"""Vocabularies worked out by hand."""

import pytest

from lmscale.data.vocab import Vocabulary, build_vocabulary, check_limits


def rows(vocabulary):
    return list(zip(vocabulary.tokens, vocabulary.counts.tolist(), strict=True))


def test_sorted_by_count_then_code_point():
    vocabulary = build_vocabulary({"b": 2, "é": 2, "a": 2, "z": 5, "B": 2, "<eos>": 3})
    expected = [("z", 5), ("<eos>", 3), ("B", 2), ("a", 2), ("b", 2), ("é", 2), ("<unk>", 0)]
    assert rows(vocabulary) == expected
    assert (vocabulary.eos_id, vocabulary.unk_id) == (1, 6)
    assert str(vocabulary.counts.dtype) == "int64"


def test_vocab_size_moves_the_rest_to_unk():
    counts = {"a": 9, "b": 4, "c": 3, "d": 3, "e": 1, "<unk>": 2, "<eos>": 5}
    vocabulary = build_vocabulary(counts, vocab_size=4)
    assert rows(vocabulary) == [("<unk>", 9), ("a", 9), ("<eos>", 5), ("b", 4)]
    assert vocabulary.counts.sum() == sum(counts.values())
    assert [vocabulary.ids[token] for token in ("b", "c", "never seen", "<unk>")] == [3, 0, 0, 0]
    assert rows(build_vocabulary(counts, vocab_size=99)) == rows(build_vocabulary(counts))


def test_min_count_moves_the_rest_to_unk():
    counts = {"a": 9, "b": 2, "c": 1, "d": 1, "<unk>": 1, "<eos>": 1}
    expected = [("a", 9), ("<unk>", 3), ("b", 2), ("<eos>", 1)]
    assert rows(build_vocabulary(counts, min_count=2)) == expected
    assert rows(build_vocabulary(counts, min_count=2, vocab_size=3)) == [("a", 9), ("<unk>", 5), ("<eos>", 1)]


def test_text_form_and_back():
    vocabulary = build_vocabulary({"a": 3, "日本": 2, "x": 1, "<eos>": 4})
    text = vocabulary.to_text()
    assert text == "<eos>\t4\na\t3\n日本\t2\nx\t1\n<unk>\t0\n"
    assert rows(Vocabulary.from_text(text)) == rows(vocabulary)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\t2\n<eos>\t1\n<unk>\t0", "cut off"),
        ("a\t2\n<eos> 1\n", "line 2 must be a token, tab and count. Received: '<eos> 1'"),
        ("a\t2\n\t1\n", "line 2 must be"),
        ("a\t-2\n", "line 1 must be"),
        ("a\t2\n<eos>\t3\n", "line 2: counts must fall. Received: 2, then 3"),
        ("a\t2\na\t1\n<eos>\t1\n<unk>\t0\n", "twice"),
        ("a\t2\n<eos>\t1\n", "<unk> and <eos> must be in it"),
    ],
)
def test_malformed_text_is_refused(text, message):
    with pytest.raises(ValueError, match="(?i)" + message):
        Vocabulary.from_text(text)


def test_errors_name_what_was_received():
    with pytest.raises(ValueError, match=r"at least 3.*Received: vocab_size=2"):
        check_limits(vocab_size=2, min_count=1)
    with pytest.raises(ValueError, match="Received: min_count=0"):
        build_vocabulary({"a": 1}, min_count=0)
    with pytest.raises(ValueError, match=r"min_count=5 times. Received: 2 types, the most frequent 4 times"):
        build_vocabulary({"a": 4, "<eos>": 1}, min_count=5)
    with pytest.raises(ValueError, match=r"white space. Received: 'a b'"):
        build_vocabulary({"a b": 4, "<eos>": 1})


def test_text_without_a_token_is_told():
    with pytest.raises(
        ValueError, match=r"must hold a token. Received: nothing but 3 <eos> and 0 <unk>, as of blank"
    ):
        build_vocabulary({"<eos>": 3}, min_count=1)
