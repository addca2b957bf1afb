"""Tokenizers by name: text to tokens.

A new tokenizer is one class here, decorated with `@register("name")`. Its dataclass fields, if any, are the
options that it takes; `make_tokenizer` passes those that the user set and refuses the others.

TensorFlow is imported only by the tokenizers that need it.
"""

import abc
import dataclasses
import functools
import hashlib
import itertools
import math
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from lmscale.data.vocab import EOS, UNK

_TOKENIZERS: dict[str, type["Tokenizer"]] = {}


class Tokenizer(abc.ABC):
    """Cuts lines into tokens, which are strings without white space.

    Tokenizers work on blocks of lines, as TensorFlow's like to. A line longer than a block arrives in several
    pieces, each later one beginning with the blank at which it was cut.
    """

    name: ClassVar[str]

    learns: ClassVar[bool] = False

    def learn(self, lines: Iterable[Sequence[str]], *, vocab_size: int | None) -> None:
        """Learns from the training text; called before `tokenize` if `learns` is set.

        Args:
          lines: the training text, block by block.
          vocab_size: rows wanted at most, `<unk>` and `<eos>` included; None if the user set no limit.
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
    """For text that is tokenised already: tokens stand between Unicode white space."""

    def tokenize(self, lines):
        return [line.split() for line in lines]


@register("characters")
class CharactersTokenizer(Tokenizer):
    """Every code point is a token; one of white space is U+2581, so that words stay apart."""

    _blanks: ClassVar[dict[int, str]] = {
        code: "\u2581" for code in range(0x3001) if chr(code).isspace()
    }  # U+3000 is the last code point of white space.

    def tokenize(self, lines):
        return [list(line.translate(self._blanks)) for line in lines]


@register("words")
class WordsTokenizer(Tokenizer):
    """Words of any script, and every other visible character by itself. Case is kept.

    A word is a run of letters, digits, marks and `_`, with single apostrophes inside (`don't`). Scripts
    without blanks between words (Chinese, Thai) come out as whole phrases: segment them before, or use
    `characters`.
    """

    def __init__(self):
        self._find = _words_pattern().findall

    def tokenize(self, lines):
        return [self._find(line) for line in lines]


@register("wordpiece")
class WordpieceTokenizer(Tokenizer):
    """Pieces of the words of `words`, learned from the training text: `un`, `##think`, `##able`.

    There are `vocab_size` pieces at most, `<eos>` included, and 32,000 if none is set; somewhat fewer come
    out. They are learned from the most frequent 200,000 words. Every character of these is a piece, at a
    word's start and inside, except those beyond the thousand most frequent; a word that cannot be put
    together is `<unk>`. The pieces go to `tokenizer.wordpiece.txt`, in the form that TensorFlow Text reads.

    Source: Schuster and Nakajima 2012; the steps of learning and the cutting are tensorflow_text's.
    """

    learns = True

    def __init__(self):
        self._words = WordsTokenizer()
        self._vocabulary: list[str] = []
        self._pieces_of_word: dict[str, list[str]] = {}

    def learn(self, lines, *, vocab_size):
        word_counts: Counter[str] = Counter()
        for block in lines:
            for words in self._words.tokenize(block):
                word_counts.update(words)
        if not word_counts:
            raise ValueError("The training text must hold a word to learn from. Received none.")
        self._vocabulary = _learn_wordpieces(word_counts, (vocab_size or 32_000) - 1)

    def tokenize(self, lines):
        words_of_lines = self._words.tokenize(lines)
        known = self._pieces_of_word
        new = sorted({word for words in words_of_lines for word in words if word not in known})
        if new:
            known.update(zip(new, self._cut(new), strict=True))
        return [[piece for word in words for piece in known[word]] for words in words_of_lines]

    def files(self):
        return {"tokenizer.wordpiece.txt": "".join(f"{piece}\n" for piece in self._vocabulary).encode()}

    def _cut(self, words):
        import tensorflow as tf

        pieces = self._tensorflow_tokenizer.tokenize(tf.constant(words)).to_list()
        return [[UNK if p == _WORDPIECE_UNK.encode() else p.decode() for p in of_word] for of_word in pieces]

    @functools.cached_property
    def _tensorflow_tokenizer(self):
        import tensorflow as tf
        import tensorflow_text

        try:
            return tensorflow_text.FastWordpieceTokenizer(
                self._vocabulary,
                unknown_token=_WORDPIECE_UNK,
                token_out_type=tf.string,
                no_pretokenization=True,
            )
        except RuntimeError as error:
            raise ValueError(
                f"The word pieces of this text cannot be used: {error}. Received, perhaps: NUL characters. Remove "
                "them from the text."
            ) from error


@register("sentencepiece")
@dataclasses.dataclass(kw_only=True)
class SentencepieceTokenizer(Tokenizer):
    """Pieces by a SentencePiece model that exists already; its unknown piece is `<unk>`.

    The model is copied to `tokenizer.sentencepiece.model`. Pieces of the model that the training text does
    not use get no row.

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


def _learn_wordpieces(word_counts, max_pieces):
    """At most `max_pieces` pieces, `[UNK]` first, of the words counted.

    The learner keeps the pieces that occur at least a threshold of times. It is searched for here, because
    the search that comes with the learner may end on a vocabulary above its limit. Halving the ratio of the
    bounds, not their difference, suits Zipf's law: few steps are needed, and each is slow.
    """
    from tensorflow_text.tools.wordpiece_vocab import wordpiece_tokenizer_learner_lib as learner

    params = learner.Params(
        upper_thresh=None,
        lower_thresh=None,
        num_iterations=4,
        max_input_tokens=200_000,
        max_token_length=50,
        max_unique_chars=1000,
        vocab_size=max_pieces,
        slack_ratio=0.05,
        include_joiner_token=True,
        joiner="##",
        reserved_tokens=[_WORDPIECE_UNK],
    )
    words = learner.get_input_words(word_counts.items(), params.reserved_tokens, params.max_token_length)
    words.sort(key=lambda item: (-item[1], item[0]))
    characters = learner.get_allowed_chars(words, params.max_unique_chars)
    words = learner.filter_input_words(words, characters, params.max_input_tokens)
    smallest = 1 + 2 * len(learner.extract_char_tokens(words))
    if smallest > max_pieces:
        raise ValueError(
            f"vocab_size must be at least {smallest + 1} for wordpiece: {EOS}, {UNK}, and each character at "
            f"the start of words and inside. Received: vocab_size={max_pieces + 1}. Use a larger one."
        )
    # Above the sum of all counts nothing but the characters is left, and they fit.
    too_low, fits = 0, sum(count for _, count in words) + 1
    vocabulary = None
    while fits - too_low > 1 and (
        vocabulary is None or len(vocabulary) < (1 - params.slack_ratio) * max_pieces
    ):
        threshold = min(max(math.isqrt(max(too_low, 1) * fits), too_low + 1), fits - 1)
        candidate = learner.learn_with_thresh(words, threshold, params)
        if len(candidate) <= max_pieces:
            fits, vocabulary = threshold, candidate
        else:
            too_low = threshold
    return vocabulary or learner.learn_with_thresh(words, fits, params)


@functools.cache
def _words_pattern():
    # `\w` leaves out combining marks, without which the words of Indic scripts would fall apart.
    marks = [code for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code)).startswith("M")]
    runs = itertools.groupby(
        enumerate(marks), key=lambda place_and_code: place_and_code[1] - place_and_code[0]
    )
    bounds = [(run[0][1], run[-1][1]) for run in (list(group) for _, group in runs)]
    ranges = "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in bounds)
    word = rf"[\w\u200c\u200d{ranges}]+"  # The two are the zero-width non-joiner and joiner.
    return re.compile(rf"{word}(?:['\u2019]{word})*|\S")
