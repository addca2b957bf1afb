"""Words by Unicode's default rules, without characters that nobody sees.

Source: Unicode Standard Annex 29, section 4 (word boundaries), written as one regular expression over its classes;
UTS 51, section 1.4.9 (emoji sequences); UAX 31, section 2.3 (where joiners matter).
"""

import re
from itertools import chain

import regex

_CACHED_CHUNKS = 1 << 18
_LONGEST_CACHED_CHUNK = 64
_QUICK_BELOW = 0x2060  # Covers Latin, Greek, Cyrillic and general punctuation.

_SEPARATORS = r"[\p{Cc}\u200b\u2800]"  # Controls, the zero-width space, the blank of Braille.
_INVISIBLE = r"[[\p{Default_Ignorable_Code_Point}\p{Cf}]--[\p{Prepended_Concatenation_Mark}]]"
# Those that mean something in some places: joiners, Mongolian selectors, emoji selectors, tags of flags.
_JOINERS = r"[\u200c\u200d]"
_NON_JOINER = "\u200c"
_MONGOLIAN = r"[\u180b-\u180f]"
_SOMETIMES_NEEDED = rf"[{_JOINERS}{_MONGOLIAN}\ufe0e\ufe0f\U000e0020-\U000e007f]"
_EMOJI_ELEMENT = (
    r"\p{Extended_Pictographic}"
    r"(?:\p{Emoji_Modifier}|\ufe0f\u20e3?|\ufe0e|[\U000e0020-\U000e007e]+\U000e007f)?"
)
_EMOJI = rf"{_EMOJI_ELEMENT}(?:\u200d{_EMOJI_ELEMENT})*|[0-9#*]\ufe0f\u20e3"
# The scripts in which Unicode has a virama, that is, letters in conjuncts (UAX 31, A1 and A2).
_CONJUNCT_SCRIPTS = (
    "Balinese Bengali Bhaiksuki Brahmi Chakma Devanagari Dives_Akuru Dogra Grantha Gujarati Gunjala_Gondi Gurmukhi "
    "Javanese Kaithi Kannada Kharoshthi Khmer Khojki Malayalam Masaram_Gondi Meetei_Mayek Modi Myanmar Nandinagari "
    "Newa Oriya Saurashtra Sharada Siddham Sinhala Soyombo Sundanese Syloti_Nagri Tai_Tham Takri Tamil Telugu Tirhuta "
    "Zanabazar_Square"
)
_CONJUNCT = "".join(rf"\p{{Script={name}}}" for name in _CONJUNCT_SCRIPTS.split())
# Letters and marks that joiners shape: of cursive scripts (Arabic) and of those.
_CURSIVE = r"\p{jt=D}\p{jt=R}\p{jt=L}\p{jt=C}"
_SHAPED = rf"[[{_CURSIVE}[[\p{{L}}\p{{M}}]&&[{_CONJUNCT}]]]--\p{{Default_Ignorable_Code_Point}}]"
_MARKS = r"\p{M}{0,8}"  # Bounded, so that no input is slow.
_SHAPING = (
    rf"(?<={_SHAPED}{_MARKS})(?:\u200d|\u200c(?={_JOINERS}*{_SHAPED}))"
    rf"|(?<=[\p{{Script=Mongolian}}&&\p{{L}}]{_MARKS}){_MONGOLIAN}"
)


class WordCutter:
    """Cuts lines into words, numbers, and all other visible characters by themselves.

    White space separates, also where UAX 29 has none to separate (U+202F, the narrow no-break space).
    """

    def __init__(self, *, keep_phrases: bool = False):
        """Compiles the rules.

        Args:
          keep_phrases: letters of scripts without blanks between words, which the rules leave one by one as only a
            dictionary could tell words (Chinese, Japanese, Thai, Khmer), stay together up to the next blank or
            punctuation.
        """
        self._tokens_of_chunks = _TokensOfChunks(keep_phrases=keep_phrases)

    def cut(self, line: str) -> list[str]:
        """The tokens of a line, in order: none empty, none invisible, without white space."""
        return list(chain.from_iterable(map(self._tokens_of_chunks.__getitem__, line.split())))


class _TokensOfChunks(dict):
    """The tokens of each chunk between white space, computed when asked for; most chunks come again and again."""

    def __init__(self, *, keep_phrases: bool):
        super().__init__()
        self._find = regex.compile(_word_pattern(keep_phrases), regex.V1 | regex.DOTALL).findall
        self._search_unseen = regex.compile(rf"{_SEPARATORS}|{_INVISIBLE}", regex.V1).search
        self._separators = regex.compile(_SEPARATORS, regex.V1)
        self._never_needed = regex.compile(rf"[{_INVISIBLE}--{_SOMETIMES_NEEDED}]", regex.V1)
        self._sometimes_needed = regex.compile(rf"({_EMOJI}|{_SHAPING})|{_SOMETIMES_NEEDED}", regex.V1)
        self._match_quickly = re.compile(_quick_pattern()).fullmatch

    def __missing__(self, chunk):
        if quick := self._match_quickly(chunk):
            before, word, behind = quick.groups()
            tokens = (*before, word, *behind)
        else:
            tokens = tuple(self._cut(chunk))
        if len(chunk) <= _LONGEST_CACHED_CHUNK:
            if len(self) >= _CACHED_CHUNKS:
                self.clear()
            self[chunk] = tokens
        return tokens

    def _cut(self, chunk):
        if not self._search_unseen(chunk):
            return self._find(chunk)
        text = self._separators.sub(" ", chunk)
        text = self._never_needed.sub("", text)
        text = self._sometimes_needed.sub(r"\1", text)
        # A non-joiner between letters that are tokens by themselves (Khmer) parts nothing.
        return [token.rstrip(_NON_JOINER) for part in text.split() for token in self._find(part)]


def _word_pattern(keep_phrases: bool) -> str:
    """One token at the start of text without white space.

    The numbers are those of the rules of UAX 29. Quantifiers are possessive, so that no input is slow.
    """
    e = r"[\p{WB=Extend}\p{WB=Format}\p{WB=ZWJ}]"  # WB4: they belong to the character before.
    hebrew = r"\p{WB=Hebrew_Letter}"
    letters = rf"(?:\p{{WB=ALetter}}++{e}*+|{hebrew}{e}*+(?:\p{{WB=Double_Quote}}{e}*+(?={hebrew}))?+)++"  # 5, 7b, 7c
    numbers = rf"(?:\p{{WB=Numeric}}++{e}*+)++"  # 8
    inside_letters = rf"[\p{{WB=MidLetter}}\p{{WB=MidNumLet}}\p{{WB=Single_Quote}}]{e}*+"
    inside_numbers = rf"[\p{{WB=MidNum}}\p{{WB=MidNumLet}}\p{{WB=Single_Quote}}]{e}*+"
    run = rf"(?:{letters}(?:{inside_letters}{letters})*+|{numbers}(?:{inside_numbers}{numbers})*+)++"  # 6, 7, 9-12
    classes = r"\p{WB=ALetter}\p{WB=Hebrew_Letter}\p{WB=Numeric}\p{WB=ExtendNumLet}\p{WB=Extend}\p{WB=Format}"
    phrase = rf"[\p{{Alphabetic}}--[{classes}]]" if keep_phrases else ""
    part = rf"(?:{run}|(?:[\p{{WB=Katakana}}{phrase}]{e}*+)++)"  # 13
    connector = rf"(?:\p{{WB=ExtendNumLet}}{e}*+)"
    parts = rf"{part}(?:{connector}++{part})*+{connector}*+"  # 13a, 13b
    word = rf"(?:{parts}|{connector}++(?:{parts})?+)(?:(?<={hebrew}{e}*)\p{{WB=Single_Quote}}{e}*+)?+"  # 7a
    flag = rf"(?:\p{{RI}}{e}*+){{1,2}}+"  # 15, 16
    joined_emoji = rf"(?:(?<=\u200d)\p{{Extended_Pictographic}}{e}*+)*+"  # 3c
    return rf"(?:{word}|{flag}|.{e}*+){joined_emoji}"  # 999


def _quick_pattern() -> str:
    """One word of letters between other characters: what `_word_pattern` gives of the most frequent chunks.

    Its classes are computed, so that it agrees by construction; `re` is several times faster with them.
    """

    def characters(pattern):
        matches = regex.compile(pattern, regex.V1).match
        return "".join(re.escape(chr(code)) for code in range(_QUICK_BELOW) if matches(chr(code)))

    letters = characters(rf"[\p{{WB=ALetter}}--{_INVISIBLE}]")
    classes = "ALetter Hebrew_Letter Numeric Katakana ExtendNumLet Regional_Indicator Extend Format ZWJ"
    words = "".join(rf"\p{{WB={name}}}" for name in classes.split())
    others = characters(rf"[[^{words}\p{{Alphabetic}}\s]--{_SEPARATORS}--{_INVISIBLE}]")
    return f"([{others}]*)([{letters}]+)([{others}]*)"
