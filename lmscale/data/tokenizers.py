"""Tokenizers by name: text to tokens.

A new tokenizer is one class here, decorated with `@register("name")`. Its dataclass fields, if any, are the
options that it takes; `make_tokenizer` passes those that the user set and refuses the others.

TensorFlow is imported only by the tokenizers that need it.
"""

import abc
import dataclasses
import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
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

    def files(self) -> dict[str, bytes]:
        """Files that belong into the prepared directory, by name."""
        return {}


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
        raise ValueError(f"tokenizer must be one of {', '.join(tokenizer_names())}. Received: {name!r}.")
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
        raise ValueError(f"tokenizer={name} needs {missing[0]}. Received none.")
    return cls(**given)


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

    _blanks: ClassVar[dict[int, str]] = {
        code: "\u2581" for code in range(0x3001) if chr(code).isspace()
    }  # U+3000 is the last code point of white space.

    def tokenize(self, lines):
        return [list(line.translate(self._blanks)) for line in lines]


@register("words")
class WordsTokenizer(Tokenizer):
    """Words of any script, numbers, and every other visible character by itself. Case is kept.

    The cuts are those of Unicode's default word boundaries (UAX 29), with white space left out. Letters, digits, marks
    and `_` hold together. A single apostrophe, dot, colon or middle dot between two letters is inside the word
    (`don't`, `U.S.A`, `example.com`), a single dot, comma or semicolon between two digits inside the number (`3.5`,
    `1,000`), elsewhere they are tokens. Hyphens cut. Emoji stay whole, with skin tones, joiners and flags.

    Chinese characters and Hiragana come one by one, and so do Thai, Lao, Khmer and Burmese letters, with their marks:
    only a dictionary could tell words there. Runs of Katakana and of Hangul hold together.

    Invisible characters (Unicode's Default_Ignorable_Code_Point and format characters: soft hyphen, byte order mark,
    direction marks, word joiner) are left out, and do not cut: the word with and without them is the same token. They
    stay where they carry a meaning: joiners behind letters of cursive and Indic scripts (Persian, Hindi), Mongolian
    selectors, and all in emoji. The zero-width space, NUL and other control characters separate like a blank.
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
    Every letter of the training text is a piece, at a word's start and inside, so that pieces spell every word of it,
    of whatever length. Only a letter that is seen fewer than `min_count` times has none: it is one `<unk>` wherever it
    stands, and the rest of its word is spelt. There are `vocab_size` pieces at most, `<eos>` included, and 32,000 if
    none is set; somewhat fewer come out. Those of several letters, 50 at most, are learned from the most frequent
    words. The pieces go to `tokenizer.wordpiece.txt`, in the form that TensorFlow Text reads; those that the training
    text does not use get no row.

    Source: Schuster and Nakajima 2012; the steps of learning are tensorflow_text's. Words are cut from the left, always
    by the longest piece that fits.
    """

    learns = True

    def __init__(self):
        self._words = WordCutter(keep_phrases=True)
        self._vocabulary: list[str] = []
        self._pieces_of_word: dict[str, list[str]] = {}

    def learn(self, lines, *, vocab_size, min_count=1):
        word_counts: Counter[str] = Counter()
        for block in lines:
            for line in block:
                word_counts.update(self._words.cut(line))
        if not word_counts:
            raise ValueError("The training text must hold a word to learn from. Received none.")
        self._vocabulary = _learn_wordpieces(
            word_counts, max_pieces=(vocab_size or 32_000) - 1, min_count=min_count
        )
        pieces = set(self._vocabulary[1:])  # Without `[UNK]`.
        self._inside = {piece.removeprefix(_JOINER) for piece in pieces if piece.startswith(_JOINER)}
        self._at_start = {piece for piece in pieces if not piece.startswith(_JOINER)}
        self._longest = max(map(len, pieces))

    def describe(self):
        return {"tokenizer_version": 2}

    def tokenize(self, lines):
        known = self._pieces_of_word
        pieces_of_lines: list[list[str]] = []
        for line in lines:
            pieces_of_lines.append([])
            for word in self._words.cut(line):
                if word not in known:
                    known[word] = self._spell(word)
                pieces_of_lines[-1] += known[word]
        return pieces_of_lines

    def files(self):
        return {"tokenizer.wordpiece.txt": "".join(f"{piece}\n" for piece in self._vocabulary).encode()}

    def _spell(self, word):
        pieces = []
        start, joiner, fitting = 0, "", self._at_start
        while start < len(word):
            end = min(start + self._longest, len(word))
            while end > start and word[start:end] not in fitting:
                end -= 1
            pieces.append(joiner + word[start:end] if end > start else UNK)
            start, joiner, fitting = max(end, start + 1), _JOINER, self._inside
        return pieces


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
        return {"tokenizer.sentencepiece.model": self._model}


_WORDPIECE_UNK = "[UNK]"
_JOINER = "##"
_LONGEST_PIECE = 50
# Bounds the time and memory of learning. It takes each stretch of each different word: 45 of one of nine letters.
_LEARNED_STRETCHES = 12_000_000


def _learn_wordpieces(word_counts: Mapping[str, int], *, max_pieces: int, min_count: int) -> list[str]:
    """At most `max_pieces` pieces, `[UNK]` first, of the words counted.

    The learner keeps the pieces that occur at least a threshold of times. It is searched for here, because
    the search that comes with the learner may end on a vocabulary above its limit. Halving the ratio of the
    bounds, not their difference, suits Zipf's law: few steps are needed, and each is slow. The limits that come
    with it (letters of a word, letters of the alphabet, words) would lose text, so that it is given none to apply.
    """
    from tensorflow_text.tools.wordpiece_vocab import wordpiece_tokenizer_learner_lib as learner

    letters = _frequent_letters(word_counts, min_count)
    smallest = 1 + 2 * len(letters)
    if smallest > max_pieces:
        raise ValueError(
            f"vocab_size must be at least {smallest + 1} for wordpiece: {EOS}, {UNK}, and each of {len(letters):,} "
            f"letters at the start of words and inside. Received: vocab_size={max_pieces + 1}. Use a larger one, or "
            "a larger min_count."
        )
    # Each letter by itself, counted zero times: it becomes a piece, and changes nothing else.
    words = [*_learned_words(word_counts, letters), *((letter, 0) for letter in sorted(letters))]
    params = learner.Params(
        upper_thresh=None,
        lower_thresh=None,
        num_iterations=4,
        max_input_tokens=None,
        max_token_length=_LONGEST_PIECE,
        max_unique_chars=None,
        vocab_size=max_pieces,
        slack_ratio=0.05,
        include_joiner_token=True,
        joiner=_JOINER,
        reserved_tokens=[_WORDPIECE_UNK],
    )
    # From a threshold of 1 on, whole phrases that are seen once would be pieces, of which nothing can be learned.
    # Above the sum of all counts nothing but the letters is left, and they fit.
    too_low, fits = 1, sum(count for _, count in words) + 1
    vocabulary = None
    while fits - too_low > 1 and (
        vocabulary is None or len(vocabulary) < (1 - params.slack_ratio) * max_pieces
    ):
        threshold = min(max(math.isqrt(too_low * fits), too_low + 1), fits - 1)
        candidate = learner.learn_with_thresh(words, threshold, params)
        if len(candidate) <= max_pieces:
            fits, vocabulary = threshold, candidate
        else:
            too_low = threshold
    return vocabulary or learner.learn_with_thresh(words, fits, params)


def _frequent_letters(word_counts: Mapping[str, int], min_count: int) -> set[str]:
    counts: Counter[str] = Counter()
    for word, count in word_counts.items():
        for letter in word:
            counts[letter] += count
    letters = {letter for letter, count in counts.items() if count >= min_count}
    if not letters:
        raise ValueError(
            f"At least one letter must occur min_count={min_count} times. Received: the most frequent one occurs "
            f"{max(counts.values()):,} times. Use a smaller min_count, or more text."
        )
    return letters


def _learned_words(word_counts: Mapping[str, int], letters: Set[str]) -> list[tuple[str, int]]:
    """The most frequent words as (word, count), without rare letters; long ones in parts, as each stretch counts."""
    counts: Counter[str] = Counter()
    for word, count in word_counts.items():
        known = "".join(letter if letter in letters else " " for letter in word)
        for stretch in known.split():
            # Parts share a letter, so that the learner takes what follows it for the inside of a word.
            for start in range(0, max(len(stretch) - 1, 1), _LONGEST_PIECE - 1):
                counts[stretch[start : start + _LONGEST_PIECE]] += count
    words, room = [], _LEARNED_STRETCHES
    for word, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        room -= len(word) * (len(word) + 1) // 2
        if room < 0:
            break
        words.append((word, count))
    return words
