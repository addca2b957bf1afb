"""Tokenizers against results written by hand, or a plain implementation."""

# ruff: noqa: RUF001 (letters of other scripts that look like Latin ones)

import random
import struct
import time
from pathlib import Path

import pytest

from lmscale.data import tokenizers
from lmscale.data.tokenizers import make_tokenizer, tokenizer_names
from lmscale.data.word_breaks import WordCutter

ROOT = Path(__file__).parents[2]


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
        ("Don't stop, 3.5 km!", ["Don't", "stop", ",", "3.5", "km", "!"]),
        ("‘Tis o’clock''", ["‘", "Tis", "o’clock", "'", "'"]),
        ("naïve nai\u0308ve", ["naïve", "nai\u0308ve"]),
        ("हिन्दी में।", ["हिन्दी", "में", "।"]),
        ("می\u200cخواهم", ["می\u200cخواهم"]),
        ("日本語 x_1—y 😀", ["日", "本", "語", "x_1", "—", "y", "😀"]),
        ("co\u00adop \ufeffon\0 \u200b off", ["coop", "on", "off"]),
        (" \t\u00a0", []),
    ],
)
def test_words(line, expected):
    assert tokens("words", line) == expected


def test_whitespace_and_characters_keep_invisible_characters():
    line = "\ufeffa\u00adb \0 \u200b"
    assert tokens("whitespace", line) == ["\ufeffa\u00adb", "\0", "\u200b"]
    assert tokens("characters", line) == ["\ufeff", "a", "\u00ad", "b", "▁", "\0", "▁", "\u200b"]


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
    with pytest.raises(
        ValueError, match=r"one of characters, sentencepiece, .*, words. Received: 'bpe'. Choose"
    ):
        make_tokenizer("bpe", options={})
    with pytest.raises(ValueError, match="sentencepiece_model does not apply to tokenizer=words"):
        make_tokenizer("words", options={"sentencepiece_model": "m"})
    with pytest.raises(ValueError, match=r"sentencepiece needs sentencepiece_model. Received none. Set s"):
        make_tokenizer("sentencepiece", options={"sentencepiece_model": None})
    with pytest.raises(ValueError, match=r"must be a file. Received: '.*nothing'"):
        make_tokenizer("sentencepiece", options={"sentencepiece_model": str(tmp_path / "nothing")})


WORDPIECE_TEXT = ["unthinkable think able", "", "thinking un , able unable !"] * 20 + ["rare words walked"]


def learned(text, *, vocab_size=None, min_count=1):
    """A tokenizer that learned from some lines, and its pieces."""
    tokenizer = make_tokenizer("wordpiece", options={})
    tokenizer.learn([text[:7], text[7:]], vocab_size=vocab_size, min_count=min_count)
    return tokenizer, tokenizer.files()["tokenizer.wordpiece.txt"].decode().split("\n")[:-1]


def letter_pieces(text):
    """Every letter at each place where it occurs."""
    cutter = WordCutter(keep_phrases=True)
    words = [word for line in text for word in cutter.cut(line)]
    return {word[0] for word in words} | {f"##{letter}" for word in words for letter in word[1:]}


def joined(pieces):
    """The words that pieces spell, without blanks."""
    return "".join(piece.removeprefix("##") for piece in pieces)


def longest_match(word, vocabulary):
    """The definition: from the left, always the longest piece that fits; `<unk>` for a letter that has none."""
    pieces, start = [], 0
    while start < len(word):
        prefix = "##" if start else ""
        ends = [end for end in range(len(word), start, -1) if prefix + word[start:end] in vocabulary]
        pieces.append(prefix + word[start : ends[0]] if ends else "<unk>")
        start = ends[0] if ends else start + 1
    return pieces


@pytest.mark.parametrize("vocab_size", [60, 64, 70, 100])
def test_wordpiece_is_longest_match_over_the_learned_pieces(vocab_size):
    tokenizer, vocabulary = learned(WORDPIECE_TEXT, vocab_size=vocab_size)
    assert len(set(vocabulary)) == len(vocabulary) < vocab_size
    lines = [*WORDPIECE_TEXT, "thunk unlikable able", "zebra think éé"]
    words = make_tokenizer("words", options={}).tokenize(lines)
    expected = [[piece for word in line for piece in longest_match(word, set(vocabulary))] for line in words]
    assert tokenizer.tokenize(lines) == expected
    assert expected[-1][:2] == ["<unk>", "##e"]
    assert expected[-1][-2:] == ["<unk>", "<unk>"]  # As many as there are letters lost.
    for line_words, line_pieces in zip(words[:60], expected[:60], strict=True):
        assert "".join(line_words) == joined(line_pieces)
    if vocab_size == 100:
        assert len(expected[0]) < 8  # Words are not left in single characters where there is room for pieces.


def test_wordpiece_file_is_read_by_tensorflow_text():
    tf = pytest.importorskip("tensorflow")
    tensorflow_text = pytest.importorskip("tensorflow_text")
    tokenizer, vocabulary = learned([*WORDPIECE_TEXT, "ab" * 51], vocab_size=100)
    words = sorted({word for line in WORDPIECE_TEXT for word in line.split()} | {"ab" * 51})
    theirs = tensorflow_text.FastWordpieceTokenizer(
        vocabulary, token_out_type=tf.string, no_pretokenization=True, max_bytes_per_word=1000
    )
    expected = [[p.decode() for p in pieces] for pieces in theirs.tokenize(tf.constant(words)).to_list()]
    assert tokenizer.tokenize(words) == expected


def test_wordpiece_vocab_size_too_small():
    smallest = len(letter_pieces(WORDPIECE_TEXT)) + 2
    with pytest.raises(ValueError, match=rf"vocab_size must be at least {smallest} .*vocab_size=9\."):
        learned(WORDPIECE_TEXT, vocab_size=9)
    learned(WORDPIECE_TEXT, vocab_size=smallest)
    with pytest.raises(ValueError, match="must hold a word"):
        learned(["", " "], vocab_size=99)
    with pytest.raises(
        ValueError, match=r"must occur min_count=99 times. Received: the most frequent .* 2 times"
    ):
        learned(["aab"], min_count=99)


THAI = [
    "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ",
    "ต่างมีเหตุผลและมโนธรรมและควรปฏิบัติต่อกันด้วยเจตนารมณ์แห่งภราดรภาพ",
    "ทุกคนย่อมมีสิทธิและอิสรภาพทั้งปวงตามที่กำหนดไว้ในปฏิญญานี้โดยปราศจากความแตกต่างไม่ว่าชนิดใด",
]
CHINESE = [
    "人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心，并应以兄弟关系的精神相对待。",
    "人人有资格享有本宣言所载的一切权利和自由，不分种族、肤色、性别、语言、宗教、政治或其他见解。",
    "人人有权享有生命、自由和人身安全。任何人不得使为奴隶或奴役。",
]
LONG = ["short words", "ab" * 51, "ab" * 5000, "x" * 30 + "q" * 30, "\u0916" * 60, "日" * 101, "a.z" * 200]


@pytest.mark.parametrize("text", [THAI, CHINESE, LONG, [chr(c) for c in range(0x4E00, 0x4E00 + 1500)]])
def test_wordpiece_spells_every_word_of_the_training_text(text):
    tokenizer, vocabulary = learned(text)
    lines = tokenizer.tokenize(text)
    for line, pieces in zip(text, lines, strict=True):
        assert joined(pieces) == line.replace(" ", "")
    assert letter_pieces(text) <= set(vocabulary)


@pytest.mark.parametrize(
    ("words", "words_of_a_line"),  # Shorter and longer than the longest piece.
    [
        ("มนุษย์ ทั้งหลาย เกิด มา มี อิสระ และ เสมอภาค กัน ใน เกียรติ ศักดิ์ สิทธิ ต่าง เหตุผล มโนธรรม ควร ต่อ", 10),
        (
            "人人 生而 自由 在 尊严 和 权利 上 一律 平等 他们 赋有 理性 良心 并 应 以 兄弟 关系 的 精神 相对待",
            50,
        ),
    ],
)
def test_wordpiece_learns_the_words_of_phrases_without_blanks(words, words_of_a_line):
    rng = random.Random(0)
    text = ["".join(rng.choices(words.split(), k=words_of_a_line)) for _ in range(1600 // words_of_a_line)]
    tokenizer, _ = learned(text, vocab_size=400)
    num_pieces = sum(map(len, tokenizer.tokenize(text)))
    assert num_pieces < 1.7 * 1600


def test_wordpiece_min_count_is_of_letters():
    text = ["aaab caab", "bxa yyb", "日本語日本", "c" * 60]
    tokenizer, vocabulary = learned(text, min_count=2)
    assert letter_pieces(text) - set(vocabulary) == {"##x", "##語"}
    assert not {"x", "##x", "語", "##語"} & set(vocabulary)
    lines = tokenizer.tokenize(text)
    assert joined(lines[1]) == "b<unk>ayyb"
    assert joined(lines[2]) == "日本<unk>日本"
    assert [line.count("<unk>") for line in lines] == [0, 1, 1, 0]


def test_wordpiece_spells_the_book_that_ships():
    folder = ROOT / "data" / "tiny-austen"
    text = (folder / "valid.txt").read_text(encoding="utf-8").split("\n")
    tokenizer, vocabulary = learned(text, vocab_size=1500)
    assert 0.9 * 1500 < len(vocabulary) < 1500
    words = make_tokenizer("words", options={}).tokenize(text)
    for line, pieces in zip(words, tokenizer.tokenize(text), strict=True):
        spelt: list[str] = []
        for piece in pieces:
            if piece.startswith("##"):
                spelt[-1] += piece[2:]
            else:
                spelt.append(piece)
        assert spelt == line


def test_wordpiece_learns_from_long_words_in_parts(monkeypatch):
    assert tokenizers._parts("a" * 16 + "b" * 16 + "c") == ["a" * 16, "##" + "b" * 16, "##c"]
    counts = {"abcd": 3, "##xad": 2, "d": 1}
    words = tokenizers._learned_words(counts, set("abd"))
    assert words == [("", "ab", 3), ("##", "d", 3), ("##", "ad", 2), ("", "d", 1)]
    monkeypatch.setattr(tokenizers, "_LEARNED_STEPS", 4)
    assert tokenizers._learned_words(counts, set("abd")) == words[:2]
    words = [("", "xyz", 5), ("##", "axyz", 3), ("##", "bxyz", 4)]
    letters = {mark + letter for mark in ("", "##") for letter in "abxyz"}
    assert sorted(tokenizers._pieces_at_threshold(words, letters, 5)) == ["##xyz", "xyz"]


@pytest.mark.parametrize("text", ["".join(map(chr, range(0x4E00, 0x4E00 + 8000))), "qwertyuiop"])
def test_wordpiece_learns_from_text_without_blanks_in_time(text):
    """A learner that counts all stretches of each phrase takes minutes."""
    rng = random.Random(0)
    before = time.process_time()
    learned(["".join(rng.choices(text, k=20_000))])
    assert time.process_time() - before < 30


def test_wordpiece_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(tokenizers, "_COUNTED_PARTS", 50)
    monkeypatch.setattr(tokenizers, "_CACHED_WORDS", 10)
    text = [*[f"{chr(i)}rare" for i in range(0x400, 0x500)], *["often seen"] * 50]
    counted = []
    learn = tokenizers._learned_words
    monkeypatch.setattr(tokenizers, "_learned_words", lambda *args: counted.append(args[0]) or learn(*args))
    tokenizer = make_tokenizer("wordpiece", options={})
    tokenizer.learn([text[i : i + 20] for i in range(0, len(text), 20)], vocab_size=None)
    assert len(counted[0]) <= 50
    for word, pieces in zip(text[:256], tokenizer.tokenize(text), strict=False):
        assert joined(pieces) == word  # Letters of words that were forgotten have pieces.
    assert tokenizer.tokenize(["often"]) == [["often"]]
    tokenizer.tokenize(["x" * 1000])
    assert len(tokenizer._pieces_of_word) <= 10
    assert max(map(len, tokenizer._pieces_of_word)) < 1000


def test_wordpiece_pieces_do_not_depend_on_the_order_of_the_text():
    text = [*WORDPIECE_TEXT, *THAI]
    assert learned(text, vocab_size=300)[1] == learned(text[::-1], vocab_size=300)[1]


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
    # Of what this model does not know it loses nothing without a word.
    assert tokenizer.tokenize(["ab\0ab", "a\u00adb", "\u200b"]) == [
        ["▁ab", "<unk>", "ab"],
        ["▁a", "<unk>", "b"],
        ["▁", "<unk>"],
    ]
    assert tokenizer.files() == {"tokenizer.sentencepiece.model": model}
    assert tokenizer.describe()["sentencepiece_model"] == "m.model"
    path.write_bytes(b"not a model")
    with pytest.raises(ValueError, match=r"m\.model: not a SentencePiece model"):
        make_tokenizer("sentencepiece", options={"sentencepiece_model": str(path)})
