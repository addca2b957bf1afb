"""Tokenizers against results written by hand, or a plain implementation."""

# ruff: noqa: RUF001 (letters of other scripts that look like Latin ones)

import struct

import pytest

from lmscale.data import tokenizers
from lmscale.data.tokenizers import make_tokenizer, tokenizer_names


def tokens(name, line, **options):
    return make_tokenizer(name, options=options).tokenize([line])[0]


def test_names():
    assert tokenizer_names() == ["characters", "sentencepiece", "whitespace", "wordpiece", "words"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", []),
        (" \t ", []),
        ("a  b\tc\u00a0d\u3000e\r", ["a", "b", "c", "d", "e"]),
        (" = Title = ", ["=", "Title", "="]),
    ],
)
def test_whitespace(line, expected):
    assert tokens("whitespace", line) == expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("Don't stop, 3.5 km!", ["Don't", "stop", ",", "3", ".", "5", "km", "!"]),
        ("‘Tis o’clock''", ["‘", "Tis", "o’clock", "'", "'"]),
        ("naïve nai\u0308ve", ["naïve", "nai\u0308ve"]),
        ("हिन्दी में।", ["हिन्दी", "में", "।"]),
        ("می\u200cخواهم", ["می\u200cخواهم"]),
        ("日本語 x_1—y 😀", ["日本語", "x_1", "—", "y", "😀"]),
        (" \t\u00a0", []),
    ],
)
def test_words(line, expected):
    assert tokens("words", line) == expected


def test_characters():
    assert tokens("characters", "ab 日 \te\u0301") == [*"ab", "▁", "日", "▁", "▁", "e", "\u0301"]


def test_a_new_tokenizer_is_one_class(monkeypatch):
    monkeypatch.setattr(tokenizers, "_TOKENIZERS", dict(tokenizers._TOKENIZERS))

    @tokenizers.register("reversed")
    class Reversed(tokenizers.Tokenizer):
        def tokenize(self, lines):
            return [line.split()[::-1] for line in lines]

    assert "reversed" in tokenizer_names()
    assert tokens("reversed", "a b c") == ["c", "b", "a"]


def test_errors_name_what_was_received(tmp_path):
    with pytest.raises(ValueError, match=r"one of characters, sentencepiece, .*, words. Received: 'bpe'"):
        make_tokenizer("bpe", options={})
    with pytest.raises(ValueError, match="sentencepiece_model does not apply to tokenizer=words"):
        make_tokenizer("words", options={"sentencepiece_model": "m"})
    with pytest.raises(ValueError, match="tokenizer=sentencepiece needs sentencepiece_model"):
        make_tokenizer("sentencepiece", options={"sentencepiece_model": None})
    with pytest.raises(ValueError, match=r"must be a file. Received: '.*nothing'"):
        make_tokenizer("sentencepiece", options={"sentencepiece_model": str(tmp_path / "nothing")})


WORDPIECE_TEXT = ["unthinkable think able", "", "thinking un , able unable !"] * 20 + ["rare words walked"]


def longest_match(word, vocabulary):
    """The definition: from the left, always the longest piece that fits."""
    pieces, start = [], 0
    while start < len(word):
        prefix = "##" if start else ""
        ends = [end for end in range(len(word), start, -1) if prefix + word[start:end] in vocabulary]
        if not ends:
            return ["<unk>"]
        pieces.append(prefix + word[start : ends[0]])
        start = ends[0]
    return pieces


@pytest.mark.parametrize("vocab_size", [60, 64, 70, 100])
def test_wordpiece_is_longest_match_over_the_learned_pieces(vocab_size):
    tokenizer = make_tokenizer("wordpiece", options={})
    tokenizer.learn([WORDPIECE_TEXT[:7], WORDPIECE_TEXT[7:]], vocab_size=vocab_size)
    vocabulary = tokenizer.files()["tokenizer.wordpiece.txt"].decode().splitlines()
    assert len(set(vocabulary)) == len(vocabulary) < vocab_size
    lines = [*WORDPIECE_TEXT, "thunk unlikable able", "zebra think é"]
    words = make_tokenizer("words", options={}).tokenize(lines)
    expected = [[piece for word in line for piece in longest_match(word, set(vocabulary))] for line in words]
    assert tokenizer.tokenize(lines) == expected
    assert expected[-1][0] == "<unk>"
    for line_words, line_pieces in zip(words[:60], expected[:60], strict=True):
        assert "".join(line_words) == "".join(piece.removeprefix("##") for piece in line_pieces)
    if vocab_size == 100:
        assert len(expected[0]) < 8  # Words are not left in single characters where there is room for pieces.


def test_wordpiece_vocab_size_too_small():
    tokenizer = make_tokenizer("wordpiece", options={})
    letters = len(set("".join(WORDPIECE_TEXT)) - {" "})
    with pytest.raises(ValueError, match=rf"vocab_size must be at least {2 * letters + 2} .*vocab_size=9\."):
        tokenizer.learn([WORDPIECE_TEXT], vocab_size=9)
    tokenizer.learn([WORDPIECE_TEXT], vocab_size=2 * letters + 2)
    with pytest.raises(ValueError, match="must hold a word"):
        tokenizer.learn([["", " "]], vocab_size=99)


def sentencepiece_model(pieces):
    """A unigram model, put together as the bytes of its protocol buffer: [(piece, score, type)]."""

    def field(number, content):
        return bytes([number << 3 | 2, len(content)]) + content

    def piece(text, score, kind):
        return field(
            1, field(1, text.encode()) + b"\x15" + struct.pack("<f", score) + b"\x18" + bytes([kind])
        )

    trainer = field(2, b"\x18\x01")  # model_type = UNIGRAM
    normalizer = field(3, field(1, b"identity"))
    return b"".join(piece(*entry) for entry in pieces) + trainer + normalizer


def test_sentencepiece(tmp_path):
    normal, unknown, control = 1, 2, 3
    model = sentencepiece_model(
        [
            ("[oov]", 0, unknown),
            ("<s>", 0, control),
            ("</s>", 0, control),
            ("▁", -5, normal),
            ("▁ab", -1, normal),
            ("a", -3, normal),
            ("b", -3, normal),
            ("ab", -4, normal),
            ("▁a", -3.5, normal),
        ]
    )
    path = tmp_path / "m.model"
    path.write_bytes(model)
    tokenizer = make_tokenizer("sentencepiece", options={"sentencepiece_model": str(path)})
    # The best sums of scores: "▁ab" -1; "▁a a" -6.5 before "▁ a a" -11; "ab" -4 before "a b" -6.
    assert tokenizer.tokenize(["ab aa", "", "abab  zb"]) == [
        ["▁ab", "▁a", "a"],
        [],
        ["▁ab", "ab", "▁", "<unk>", "b"],
    ]
    assert tokenizer.files() == {"tokenizer.sentencepiece.model": model}
    assert tokenizer.describe()["sentencepiece_model"] == "m.model"
    path.write_bytes(b"not a model")
    with pytest.raises(ValueError, match=r"m\.model: not a SentencePiece model"):
        make_tokenizer("sentencepiece", options={"sentencepiece_model": str(path)})
