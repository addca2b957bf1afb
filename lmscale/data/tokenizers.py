"""Tokenizers by name: text to tokens.

A new tokenizer is one class here, decorated with `@register("name")`. Its dataclass fields, if any, are the
options that it takes; `make_tokenizer` passes those that the user set and refuses the others.

TensorFlow is imported only by the tokenizers that need it.
"""

import abc
import dataclasses
import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

from lmscale.data.vocab import EOS, UNK
from lmscale.data.word_breaks import WordCutter

_TOKENIZERS: dict[str, type["Tokenizer"]] = {}


class Tokenizer(abc.ABC):
    """Cuts lines into tokens, which are strings without white space.

    Tokenizers work on blocks of lines, as TensorFlow's like to. A line longer than a block arrives in several
    pieces, each later one beginning with the blank at which it was cut.
    """

    name: ClassVar[str]

    learns: ClassVar[bool] = False

    def learn(self, lines: Iterable[Sequence[str]], *, vocab_size: int | None, min_count: int = 1) -> None:
        """Learns from the training text; called before `tokenize` if `learns` is set.

        Args:
          lines: the training text, block by block.
          vocab_size: rows wanted at most, `<unk>` and `<eos>` included; None if the user set no limit.
          min_count: what is seen fewer times may be `<unk>`. All tokens that come out get a row.
        """
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """The options that the manifest records: all that the tokens depend on."""
        return {}

    @abc.abstractmethod
    def tokenize(self, lines: Sequence[str]) -> list[list[str]]:
        """The tokens of each line, without `<eos>`."""

    def join(self, tokens: Sequence[str]) -> str:
        """A line that reads as its tokens do; what `tokenize` has left out does not come back."""
        return " ".join(tokens)

    def files(self) -> dict[str, bytes]:
        """Files that belong into the prepared directory, by name."""
        return {}

    @classmethod
    def read(cls, directory: Path) -> "Tokenizer":
        """The tokenizer that has written its `files` into a prepared directory."""
        del directory
        return cls()


def register(name: str) -> Callable[[type[Tokenizer]], type[Tokenizer]]:
    """Makes a tokenizer class known by a name."""

    def add(cls):
        cls.name = name
        _TOKENIZERS[name] = cls
        return cls

    return add


def tokenizer_names() -> list[str]:
    """The registered names, sorted."""
    return sorted(_TOKENIZERS)


def make_tokenizer(name: str, *, options: Mapping[str, Any]) -> Tokenizer:
    """Builds a tokenizer.

    Args:
      name: a registered name.
      options: the options that the user set; None stands for one not set.
    Raises:
      ValueError: if the name is unknown, or the tokenizer does not take an option or needs one more.
    """
    if name not in _TOKENIZERS:
        raise ValueError(
            f"tokenizer must be one of {', '.join(tokenizer_names())}. Received: {name!r}. Choose one of them."
        )
    cls = _TOKENIZERS[name]
    fields: tuple[dataclasses.Field, ...] = dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()
    given = {key: value for key, value in options.items() if value is not None}
    refused = sorted(given.keys() - {field.name for field in fields})
    if refused:
        raise ValueError(
            f"{refused[0]} does not apply to tokenizer={name}. Received: {refused[0]}={given[refused[0]]!r}. "
            "Leave it out, or choose another tokenizer."
        )
    missing = [f.name for f in fields if f.default is dataclasses.MISSING and f.name not in given]
    if missing:
        raise ValueError(
            f"tokenizer={name} needs {missing[0]}. Received none. Set {missing[0]}, or choose another tokenizer."
        )
    return cls(**given)


def prepared_tokenizer(options: Mapping[str, Any], directory: Path) -> Tokenizer:
    """The tokenizer of a prepared directory, to cut more text as that text was cut.

    Args:
      options: those of its manifest.
      directory: where it is.
    Raises:
      ValueError: if the options name no tokenizer that is known here, or one that cut in another way.
    """
    name = options.get("tokenizer")
    if name not in _TOKENIZERS:
        raise ValueError(
            f"{directory} must tell its tokenizer, one of {', '.join(tokenizer_names())}. Received: {name!r}. Give "
            "text whose tokens stand between blanks, and say so: --tokenized."
        )
    tokenizer = _TOKENIZERS[name].read(directory)
    there, here = options.get("tokenizer_version"), tokenizer.describe().get("tokenizer_version")
    if there != here:
        raise ValueError(
            f"The text must be cut as that of {directory} was. Received: version {here} of the tokenizer {name}, where "
            f"the data have version {there}. Give text whose tokens stand between blanks, and say so: --tokenized."
        )
    return tokenizer


@register("whitespace")
class WhitespaceTokenizer(Tokenizer):
    """For text that is tokenised already: tokens stand between Unicode white space, and are kept to the letter.

    So are invisible characters in them: a soft hyphen, a byte order mark or NUL makes another token. `words` does
    away with them.
    """

    def tokenize(self, lines):
        return [line.split() for line in lines]


@register("characters")
class CharactersTokenizer(Tokenizer):
    """Every code point is a token, invisible ones too; one of white space is U+2581, so that words stay apart."""

    # U+3000 is the last code point of white space.
    _blanks: ClassVar[dict[int, str]] = {code: "\u2581" for code in range(0x3001) if chr(code).isspace()}

    def tokenize(self, lines):
        return [list(line.translate(self._blanks)) for line in lines]

    def join(self, tokens):
        return "".join(tokens).replace("\u2581", " ")


@register("words")
class WordsTokenizer(Tokenizer):
    """Words of any script, numbers, and every other visible character by itself. Case is kept.

    The cuts are those of Unicode's default word boundaries (UAX 29), with white space left out. Letters, digits, marks
    and `_` hold together. A single apostrophe, dot, colon or middle dot between two letters is inside the word
    (`don't`, `U.S.A`, `example.com`), a single dot, comma or semicolon between two digits inside the number (`3.5`,
    `1,000`), elsewhere they are tokens. Hyphens cut. Emoji stay whole, with skin tones, joiners and flags.

    Chinese characters and Hiragana come one by one, and so do Thai, Lao, Khmer and Burmese letters, with their marks:
    only a dictionary could tell words there. Runs of Katakana and of Hangul hold together, and so do keycaps in a row.

    Invisible characters (Unicode's Default_Ignorable_Code_Point and format characters: soft hyphen, byte order mark,
    direction marks, word joiner) are left out, and do not cut: the word with and without them is the same token. They
    stay where they carry a meaning: joiners behind letters of cursive scripts and of those with conjuncts (Persian,
    Hindi), Mongolian selectors, and all in emoji. The zero-width space, NUL and other control characters separate like
    a blank. Cutting the tokens again, with blanks between them, gives the same tokens.
    """

    def __init__(self):
        self._cutter = WordCutter()

    def describe(self):
        return {"tokenizer_version": 2}  # 1 had rules of its own, and is not written in manifests.

    def tokenize(self, lines):
        return [self._cutter.cut(line) for line in lines]


@register("wordpiece")
class WordpieceTokenizer(Tokenizer):
    """Pieces of words, learned from the training text: `un`, `##think`, `##able`.

    The words are those of `words`; but letters which that leaves one by one (Chinese, Thai) stay together as a phrase.
    Every letter of the training text is a piece, at a word's start and inside, wherever it occurs, so that pieces spell
    every word of it, of whatever length. Only a letter that is seen fewer than `min_count` times has none: it is one
    `<unk>` wherever it stands, and the rest of its word is spelt. There are `vocab_size` rows at most, 32,000 if none
    is set. Fewer come out: the pieces are those seen at least a threshold of times, which is searched for until at
    least 95% of the room are used, or a text is too short for that; and pieces that the training text does not use get
    no row. Those of several letters, 16 at most, are learned from the most frequent words, and longer words in parts of
    16. The pieces go to `tokenizer.wordpiece.txt`, in the form that TensorFlow Text reads.

    Memory is bounded, whatever the text: of very many different words the rarest are forgotten while it is read.

    Source: Schuster and Nakajima 2012; the steps of learning are tensorflow_text's. Words are cut from the left, always
    by the longest piece that fits.
    """

    learns = True

    def __init__(self):
        self._words = WordCutter(keep_phrases=True)
        self._vocabulary: list[str] = []
        self._pieces_of_word: dict[str, list[str]] = {}

    def learn(self, lines, *, vocab_size, min_count=1):
        part_counts: Counter[str] = Counter()
        letter_counts: Counter[str] = Counter()
        places: set[str] = set()
        for block in lines:
            words = Counter(chain.from_iterable(map(self._words.cut, block)))
            for word, count in words.items():
                for part in _parts(word):
                    part_counts[part] += count
                for letter in word:
                    letter_counts[letter] += count
                places.add(word[0])
                places.update(map(_JOINER.__add__, word[1:]))
            if len(part_counts) > _COUNTED_PARTS:
                part_counts = _most_frequent_half(part_counts)
        if not part_counts:
            raise ValueError(
                "The training text must hold a word to learn from. Received none. Give a text with words."
            )
        letters = _frequent_letters(letter_counts, min_count)
        self._vocabulary = _learn_wordpieces(
            _learned_words(part_counts, letters),
            letters={place for place in places if place.removeprefix(_JOINER) in letters},
            max_pieces=(vocab_size or 32_000) - 1,
        )
        self._take_pieces()

    def _take_pieces(self):
        self._pieces = set(self._vocabulary[1:])  # Without `[UNK]`.
        self._longest = max(map(len, self._pieces))

    def describe(self):
        return {"tokenizer_version": 2}

    @classmethod
    def read(cls, directory):
        tokenizer = cls()
        tokenizer._vocabulary = (directory / _WORDPIECE_FILE).read_bytes().decode().splitlines()
        tokenizer._take_pieces()
        return tokenizer

    def join(self, tokens):
        return " ".join(tokens).replace(f" {_JOINER}", "")

    def tokenize(self, lines):
        known = self._pieces_of_word
        pieces_of_lines: list[list[str]] = []
        for line in lines:
            pieces_of_lines.append([])
            for word in self._words.cut(line):
                pieces = known.get(word)
                if pieces is None:
                    pieces = self._spell(word)
                    if len(word) <= _LONGEST_CACHED_WORD:
                        if len(known) >= _CACHED_WORDS:
                            known.clear()
                        known[word] = pieces
                pieces_of_lines[-1] += pieces
        return pieces_of_lines

    def files(self):
        return {_WORDPIECE_FILE: "".join(f"{piece}\n" for piece in self._vocabulary).encode()}

    def _spell(self, word):
        spelt, start, mark = [], 0, ""
        for end in _ends(word, mark, self._pieces, self._longest):
            piece = mark + word[start:end]
            spelt.append(piece if piece in self._pieces else UNK)
            start, mark = end, _JOINER
        return spelt


@register("sentencepiece")
@dataclasses.dataclass(kw_only=True)
class SentencepieceTokenizer(Tokenizer):
    """Pieces by a SentencePiece model that exists already; its unknown piece is `<unk>`.

    The model is copied to `tokenizer.sentencepiece.model`. Pieces of the model that the training text does
    not use get no row. A run of characters that the model does not know is one `<unk>`, however long. What
    becomes of invisible characters is the model's affair: most drop them or make them blanks, one that was
    trained to change nothing gives `<unk>`.

    Attributes:
      sentencepiece_model: path of the model file.
    """

    sentencepiece_model: str

    def __post_init__(self):
        path = Path(self.sentencepiece_model)
        if not path.is_file():
            raise ValueError(
                f"sentencepiece_model must be a file. Received: {str(path)!r}. Give a model's path."
            )
        self._model = path.read_bytes()
        import tensorflow as tf
        import tensorflow_text

        try:
            self._tensorflow_tokenizer = tensorflow_text.SentencepieceTokenizer(model=self._model)
            size = int(self._tensorflow_tokenizer.vocab_size())
            pieces = self._tensorflow_tokenizer.id_to_string(tf.range(size)).numpy()
        except tf.errors.OpError as error:
            raise ValueError(
                f"{path}: not a SentencePiece model. Received: {len(self._model):,} bytes. "
                "Give a .model file that spm_train wrote."
            ) from error
        self._pieces = [piece.decode("utf-8") for piece in pieces]
        # No piece holds a line feed, so that this asks for the unknown piece, whatever its name.
        self._pieces[int(self._tensorflow_tokenizer.string_to_id("\n"))] = UNK

    def describe(self):
        digest = hashlib.sha256(self._model).hexdigest()
        return {
            "sentencepiece_model": Path(self.sentencepiece_model).name,
            "sentencepiece_model_sha256": digest,
        }

    def tokenize(self, lines):
        ids_of_lines = self._tensorflow_tokenizer.tokenize(list(lines)).to_list()
        return [[self._pieces[piece_id] for piece_id in ids] for ids in ids_of_lines]

    def files(self):
        return {_SENTENCEPIECE_FILE: self._model}

    @classmethod
    def read(cls, directory):
        return cls(sentencepiece_model=str(directory / _SENTENCEPIECE_FILE))

    def join(self, tokens):
        return "".join(tokens).replace("\u2581", " ").strip()


_WORDPIECE_FILE = "tokenizer.wordpiece.txt"
_SENTENCEPIECE_FILE = "tokenizer.sentencepiece.model"
_WORDPIECE_UNK = "[UNK]"
_JOINER = "##"
_LONGEST_PIECE = 16
_BEFORE_INSIDE = "\0"  # Stands for the letters before a part of a word; no word has it.
_SLACK = 0.05
# These bound the time and memory of learning, and the memory of spelling.
_LEARNED_STEPS = 50_000_000
_COUNTED_PARTS = 4_000_000
_CACHED_WORDS = 1 << 18
_LONGEST_CACHED_WORD = 64


def _parts(word: str) -> list[str]:
    """A word cut into parts as long as the longest piece; the later ones begin with the mark of a word's inside."""
    if len(word) <= _LONGEST_PIECE:
        return [word]
    starts = range(_LONGEST_PIECE, len(word), _LONGEST_PIECE)
    return [word[:_LONGEST_PIECE], *(_JOINER + word[start : start + _LONGEST_PIECE] for start in starts)]


def _most_frequent_half(counts: Counter[str]) -> Counter[str]:
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return Counter(dict(ranked[: len(ranked) // 2]))


def _frequent_letters(counts: Mapping[str, int], min_count: int) -> set[str]:
    letters = {letter for letter, count in counts.items() if count >= min_count}
    if not letters:
        raise ValueError(
            f"At least one letter must occur min_count={min_count} times. Received: the most frequent one occurs "
            f"{max(counts.values()):,} times. Use a smaller min_count, or more text."
        )
    return letters


def _learned_words(part_counts: Mapping[str, int], letters: Set[str]) -> list[tuple[str, str, int]]:
    """The most frequent parts of words without rare letters, as (`##` if inside of a word or nothing, part, count)."""
    counts: Counter[tuple[str, str]] = Counter()
    for part, count in part_counts.items():
        text = part.removeprefix(_JOINER)
        known = "".join(letter if letter in letters else " " for letter in text)
        for stretch in re.finditer("[^ ]+", known):
            at_start = stretch.start() == 0 and text == part
            counts["" if at_start else _JOINER, stretch.group()] += count
    words, room = [], _LEARNED_STEPS
    for (mark, text), count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        room -= len(text) + len(text) ** 3 // 6  # The learner takes each beginning of each stretch.
        if room < 0:
            break
        words.append((mark, text, count))
    return words


def _learn_wordpieces(
    words: Sequence[tuple[str, str, int]], *, letters: Set[str], max_pieces: int
) -> list[str]:
    """At most `max_pieces` pieces, `[UNK]` first.

    Args:
      words: as of `_learned_words`.
      letters: the pieces of one letter, each of which must be there.
      max_pieces: `[UNK]` included.
    Raises:
      ValueError: if there is no room for the letters.
    """
    room = max_pieces - 1 - len(letters)
    if room < 0:
        inside = sum(letter.startswith(_JOINER) for letter in letters)
        raise ValueError(
            f"vocab_size must be at least {len(letters) + 2} for wordpiece: {EOS}, {UNK}, {len(letters) - inside:,} "
            f"letters at the start of words and {inside:,} inside. Received: vocab_size={max_pieces + 1}. Use a larger "
            "one, or a larger min_count."
        )
    # From a threshold of 1 on, whole phrases that are seen once would be pieces, of which nothing can be learned.
    # Above the sum of all counts nothing but the letters is left, and they fit. Halving the ratio of the bounds, not
    # their difference, suits Zipf's law.
    too_low, fits = 1, sum(count for _, _, count in words) + 1
    pieces: list[str] = []
    while fits - too_low > 1 and len(letters) + len(pieces) < (1 - _SLACK) * max_pieces:
        threshold = min(max(math.isqrt(too_low * fits), too_low + 1), fits - 1)
        candidate = _pieces_at_threshold(words, letters, threshold)
        if len(candidate) <= room:
            fits, pieces = threshold, candidate
        else:
            too_low = threshold
    return [_WORDPIECE_UNK, *sorted(letters), *pieces]


def _pieces_at_threshold(
    words: Sequence[tuple[str, str, int]], letters: Set[str], threshold: int
) -> list[str]:
    """The pieces of several letters that occur at least `threshold` times, as tensorflow_text learns them.

    The limits that come with its learner (letters of a word, letters of the alphabet, words) would lose text: it is
    given none to apply. In its words, the inside of a word is what does not stand at the start.
    """
    from tensorflow_text.tools.wordpiece_vocab import wordpiece_tokenizer_learner_lib as learner

    params = learner.Params(
        upper_thresh=None,
        lower_thresh=None,
        num_iterations=4,
        max_input_tokens=None,
        max_token_length=len(_BEFORE_INSIDE) + _LONGEST_PIECE,
        max_unique_chars=None,
        vocab_size=None,
        slack_ratio=None,
        include_joiner_token=True,
        joiner=_JOINER,
        reserved_tokens=[],
    )
    counted = [(f"{_BEFORE_INSIDE if mark else ''}{text}", count) for mark, text, count in words]
    found = learner.learn_with_thresh(counted, threshold, params)
    return [piece for piece in found if _BEFORE_INSIDE not in piece and piece not in letters]


def _ends(text: str, mark: str, pieces: Set[str], longest: int) -> Sequence[int]:
    """Where the pieces of a text end, each the longest that fits; a letter that has none stands by itself."""
    ends, start = [], 0
    while start < len(text):
        end = min(start + longest, len(text))
        while end > start + 1 and mark + text[start:end] not in pieces:
            end -= 1
        ends.append(end)
        start, mark = end, _JOINER
    return ends
