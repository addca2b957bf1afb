"""Word boundaries against the rules of UAX 29 one by one, and the rules for characters that nobody sees."""

# ruff: noqa: RUF001 (letters of other scripts that look like Latin ones)

import functools
import random
import time
from pathlib import Path

import pytest
import regex

from lmscale.data import word_breaks
from lmscale.data.word_breaks import WordCutter

ROOT = Path(__file__).parents[2]
CORPORA = ROOT.parent / "shared" / "data"
CLASSES = [
    *("ALetter", "Hebrew_Letter", "Numeric", "Katakana", "ExtendNumLet", "MidLetter", "MidNum", "MidNumLet"),
    *("Single_Quote", "Double_Quote", "Extend", "Format", "ZWJ", "Regional_Indicator", "Other"),
]
EXTENDERS = ("Extend", "Format", "ZWJ")
NEVER_NEEDED = "\u00ad\ufeff\u200e\u200f\u061c\u2060\u2066\u2069\u202a\u202e\u034f\u3164\u2065\ufff9"
SEPARATORS = "\u200b\0\x01\x1b\x7f\u0085\u2800"


def characters(pattern):
    found = regex.compile(pattern, regex.V1)
    return [chr(c) for c in range(0x20000) if not 0xD800 <= c < 0xE000 and found.fullmatch(chr(c))]


@pytest.fixture(scope="module")
def letters_of_classes():
    """Characters of each class of UAX 29, white space and unassigned ones left out, and emoji."""
    classes = [rf"\p{{WB={name}}}" for name in CLASSES] + [r"\p{Extended_Pictographic}"]
    return [characters(rf"[{pattern}--[\s\p{{Cn}}]]") for pattern in classes]


def random_texts(letters_of_classes, *, num, seed=0):
    rng = random.Random(seed)
    for _ in range(num):
        yield "".join(rng.choice(rng.choice(letters_of_classes)) for _ in range(rng.randint(1, 9)))


@functools.cache
def class_of(character):
    return next((name for name in CLASSES if regex.match(rf"\p{{WB={name}}}", character)), "Other")


def is_joined(text, place):
    """Whether UAX 29 has no boundary before a place, rule by rule. The numbers are those of the rules."""
    if class_of(text[place]) in EXTENDERS:  # 4
        return True
    if text[place - 1] == "\u200d" and regex.match(r"\p{Extended_Pictographic}", text[place]):  # 3c
        return True
    # At the start there is nothing that it could extend.
    first = text[0] if class_of(text[0]) in EXTENDERS else ""
    seen = [class_of(c) for c in first + "".join(c for c in text[:place] if class_of(c) not in EXTENDERS)]
    following = [class_of(c) for c in text[place:] if class_of(c) not in EXTENDERS]
    before, last, next_, behind = (*[""] * 2, *seen)[-2], seen[-1], following[0], (*following, "")[1]
    letters, quotes = ("ALetter", "Hebrew_Letter"), ("MidNumLet", "Single_Quote")
    in_word, connector = (*letters, "Numeric", "Katakana", "ExtendNumLet"), "ExtendNumLet"
    flags_before = len(seen) - len(
        "".join("f" if c == "Regional_Indicator" else " " for c in seen).rstrip("f")
    )
    return (
        (last in letters and next_ in letters)  # 5
        or (last in letters and next_ in ("MidLetter", *quotes) and behind in letters)  # 6
        or (before in letters and last in ("MidLetter", *quotes) and next_ in letters)  # 7
        or (last == "Hebrew_Letter" and next_ == "Single_Quote")  # 7a
        or (last == "Hebrew_Letter" and next_ == "Double_Quote" and behind == "Hebrew_Letter")  # 7b
        or (before == "Hebrew_Letter" and last == "Double_Quote" and next_ == "Hebrew_Letter")  # 7c
        or (last == "Numeric" and next_ == "Numeric")  # 8
        or (last in letters and next_ == "Numeric")  # 9
        or (last == "Numeric" and next_ in letters)  # 10
        or (before == "Numeric" and last in ("MidNum", *quotes) and next_ == "Numeric")  # 11
        or (last == "Numeric" and next_ in ("MidNum", *quotes) and behind == "Numeric")  # 12
        or (last == "Katakana" and next_ == "Katakana")  # 13
        or (last in in_word and next_ == connector)  # 13a
        or (last == connector and next_ in in_word)  # 13b
        or (next_ == "Regional_Indicator" and flags_before % 2 == 1)  # 15, 16
    )


def boundaries(text):
    """The pieces of text without white space between the boundaries of UAX 29: the definition, slowly."""
    pieces = []
    for place, character in enumerate(text):
        if place and is_joined(text, place):
            pieces[-1] += character
        else:
            pieces.append(character)
    return pieces


def is_visible(character):
    return not regex.match(
        r"[\s\p{Cc}\p{Cf}\p{Default_Ignorable_Code_Point}\u2800]", character
    ) or regex.match(r"\p{Prepended_Concatenation_Mark}", character)


def visible(text):
    return "".join(filter(is_visible, text))


def test_the_expression_is_uax_29(letters_of_classes):
    find = regex.compile(word_breaks._word_pattern(False), regex.V1 | regex.DOTALL).findall
    for text in random_texts(letters_of_classes, num=20_000):
        assert find(text) == boundaries(text), ascii(text)


def test_cut_is_uax_29_where_nothing_is_invisible(letters_of_classes):
    seen = [list(filter(is_visible, letters)) for letters in letters_of_classes]
    seen = [letters for letters in seen if letters]
    cutter = WordCutter()
    for text in random_texts(seen, num=20_000, seed=1):
        assert cutter.cut(text) == boundaries(text), ascii(text)


@pytest.mark.parametrize("name", ["tiny-austen", "tiny-tang300", "wikitext-2"])
def test_real_text(name):
    folder = ROOT / "data" / name if name == "tiny-austen" else CORPORA / name
    if not folder.is_dir():
        pytest.skip(f"the corpus {name} is not at {folder}")
    cutter = WordCutter()
    for line in (folder / "valid.txt").read_text(encoding="utf-8").splitlines()[:300]:
        # White space is between all words here, so that each chunk can be tried by itself.
        assert cutter.cut(line) == [piece for chunk in line.split() for piece in boundaries(chunk)]


@pytest.mark.parametrize("keep_phrases", [False, True])
def test_the_quick_way_gives_the_same(letters_of_classes, keep_phrases):
    low = [[c for c in letters if ord(c) < word_breaks._QUICK_BELOW] for letters in letters_of_classes]
    low = [letters for letters in low if letters] + [list("abcdefg,.!’")] * 9
    cutter = WordCutter(keep_phrases=keep_phrases)
    slow = WordCutter(keep_phrases=keep_phrases)
    slow._tokens_of_chunks._match_quickly = lambda chunk: None
    for text in random_texts(low, num=20_000, seed=2):
        assert cutter.cut(text) == slow.cut(text), ascii(text)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", []),
        (" \t\u00a0\u2028\u3000", []),
        ("Don't stop, 3.5 km!", ["Don't", "stop", ",", "3.5", "km", "!"]),
        ("‘Tis o’clock''", ["‘", "Tis", "o’clock", "'", "'"]),
        ("U.S.A. e.g. a.b S:t x:", ["U.S.A", ".", "e.g", ".", "a.b", "S:t", "x", ":"]),
        ("1,000.50 7. -5 10:30 50%", ["1,000.50", "7", ".", "-", "5", "10", ":", "30", "50", "%"]),
        ("C++ m² x_1—y_ well-known", ["C", "+", "+", "m", "²", "x_1", "—", "y_", "well", "-", "known"]),
        ("1\u202f000", ["1", "000"]),  # White space, which no token may hold, though UAX 29 lets it connect.
        ("naïve nai\u0308ve col·lecció", ["naïve", "nai\u0308ve", "col·lecció"]),
        ("हिन्दी में।", ["हिन्दी", "में", "।"]),
        ('צה"ל ג\'', ['צה"ל', "ג'"]),
        ("日本語です。ラーメン", ["日", "本", "語", "で", "す", "。", "ラーメン"]),
        ("한국어 텍스트", ["한국어", "텍스트"]),
        ("ไทย ที่", ["ไ", "ท", "ย", "ที่"]),
    ],
)  # fmt: skip
def test_by_hand(line, expected):
    assert WordCutter().cut(line) == expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("日本語です。ラーメン屋 abc漢字", ["日本語です", "。", "ラーメン屋", "abc", "漢字"]),
        ("ภาษาไทย, ที่นี่", ["ภาษาไทย", ",", "ที่นี่"]),
        ("Don't 3.5 한국어", ["Don't", "3.5", "한국어"]),
    ],
)
def test_phrases_by_hand(line, expected):
    assert WordCutter(keep_phrases=True).cut(line) == expected


EMOJI = [
    "😀",
    "❤️",  # With the selector of emoji style,
    "❤︎",  # and of text style.
    "👍🏽",
    "👩‍👩‍👧‍👦",
    "🏳️‍🌈",
    "👩🏽‍🚀",
    "🇩🇪",
    "1️⃣",
    "#️⃣",
    "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
]


@pytest.mark.parametrize("emoji", EMOJI)
def test_emoji_stay_whole(emoji):
    assert WordCutter().cut(emoji) == [emoji]
    assert WordCutter().cut(f"a {emoji},") == ["a", emoji, ","]
    assert WordCutter().cut(f"({emoji})") == ["(", emoji, ")"]
    assert WordCutter().cut(f"\ufeff{emoji}\u200e") == [emoji]


def test_emoji_beside_each_other():
    assert WordCutter().cut("🇩🇪🇫🇷🇬😀😀❤️👍🏽x") == ["🇩🇪", "🇫🇷", "🇬", "😀", "😀", "❤️", "👍🏽", "x"]
    assert WordCutter().cut("1️⃣2️⃣ 3️⃣") == ["1️⃣2️⃣", "3️⃣"]  # By UAX 29 digits with marks.


@pytest.mark.parametrize(
    "word",
    ["می\u200cخواهم", "ه\u200d", "क्\u200dष", "क्\u200cष", "ന്\u200d", "ක්\u200dර", "ᠬᠠᠷ\u180eᠠ", "ᠭ\u180bᠠ"],
)
def test_joiners_and_selectors_that_shape_letters_stay(word):
    assert WordCutter().cut(f"{word} {word}.") == [word, word, "."]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("می\u200c", ["می"]),
        ("Auf\u200clage", ["Auflage"]),
        ("ก\u200cข", ["ก", "ข"]),
        ("ກ\u200dຂ", ["ກ", "ຂ"]),
        ("ཀ\u200cཁ", ["ཀཁ"]),
        ("ក\u200cខ", ["ក", "ខ"]),
        ("က\u200cခ", ["က", "ခ"]),
        ("a\u200db \u200d x\u200d", ["ab", "x"]),
        ("می\u200c\u200cخواهم", ["می\u200cخواهم"]),
        ("😀\u200d x\ufe0f 1\ufe0f", ["😀", "x", "1"]),
        ("葛\U000e0100城", ["葛", "城"]),
        ("\U000e0041b a\u180bc", ["b", "ac"]),
        ("\u200d😀 a\u200d😀", ["😀", "a", "😀"]),
    ],
)
def test_joiners_and_selectors_that_shape_nothing_go(line, expected):
    assert WordCutter().cut(line) == expected


@pytest.mark.parametrize("invisible", NEVER_NEEDED)
def test_words_with_and_without_invisible_characters_are_the_same(letters_of_classes, invisible):
    cutter = WordCutter()
    assert cutter.cut(f"{invisible}co{invisible}op{invisible} {invisible} x") == ["coop", "x"]
    rng = random.Random(3)
    for text in [*random_texts(letters_of_classes, num=300), "naïve می\u200cخواهم 👩‍👩‍👧 3.5 🇩🇪 don't ภาษา"]:
        place = rng.randint(0, len(text))
        assert cutter.cut(text[:place] + invisible + text[place:]) == cutter.cut(text), (ascii(text), place)


@pytest.mark.parametrize("separator", SEPARATORS)
def test_separators_are_blanks(letters_of_classes, separator):
    cutter = WordCutter()
    assert cutter.cut(f"a{separator}b {separator} {separator}c") == ["a", "b", "c"]
    for text in random_texts(letters_of_classes, num=300):
        with_blank = cutter.cut(text[:2] + " " + text[2:])
        assert cutter.cut(text[:2] + separator + text[2:]) == with_blank, ascii(text)


@pytest.mark.parametrize("keep_phrases", [False, True])
def test_no_token_is_empty_or_invisible_and_nothing_visible_is_lost(letters_of_classes, keep_phrases):
    unseen = characters(r"[\p{Default_Ignorable_Code_Point}\p{Cf}\p{Cc}\s]")
    cutter = WordCutter(keep_phrases=keep_phrases)
    for text in random_texts([*letters_of_classes, unseen, unseen, unseen], num=30_000, seed=4):
        tokens = cutter.cut(text)
        assert all(map(visible, tokens)), ascii(text)
        assert visible("".join(tokens)) == visible(text), ascii(text)
        assert all(token.split() == [token] for token in tokens), ascii(text)


@pytest.mark.parametrize("keep_phrases", [False, True])
def test_tokens_are_cut_into_themselves(letters_of_classes, keep_phrases):
    cut = WordCutter(keep_phrases=keep_phrases).cut
    rng = random.Random(0)
    mixed = "aبمیकष्ကខกཀ日カ한א1.,:'\"_\u200c\u200d\ufe0f\u20e3\u180b\u0300😀👍🏽🇩🇪\u00ad\u200bᠬ"
    texts = ["".join(rng.choices(mixed, k=rng.randint(1, 12))) for _ in range(5000)]
    for text in [*random_texts(letters_of_classes, num=3000), *texts]:
        assert cut(" ".join(cut(text))) == cut(text), text.encode("unicode_escape")


def test_memory_of_chunks_is_bounded(monkeypatch):
    monkeypatch.setattr(word_breaks, "_CACHED_CHUNKS", 10)
    cutter = WordCutter()
    for number in range(100):
        assert cutter.cut(f"a{number} a") == [f"a{number}", "a"]
        assert len(cutter._tokens_of_chunks) <= 10
    cutter.cut("x" * 1000)
    assert max(map(len, cutter._tokens_of_chunks)) < 1000


@pytest.mark.parametrize(
    "unit",
    [
        "a",
        "a.",
        "1,",
        "_",
        "a_",
        "\u0301",
        'ק"',
        "ק'",
        "日",
        "\u180b",
        "ᠠ\u180b",
        "😀\u200d",
        "ก",
        "🇩",
        "\u00ad",
    ],
)
def test_no_input_is_slow(unit):
    times = []
    for repeats in (20_000, 160_000):
        text = unit * repeats
        start = time.process_time()
        WordCutter().cut(text)
        times.append(time.process_time() - start)
    assert times[1] < 0.5 + 20 * times[0]  # Linear would be 8 times, quadratic 64.
