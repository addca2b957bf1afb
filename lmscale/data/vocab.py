"""The vocabulary: tokens in id order, which is the order of falling frequency, and their counts."""

import dataclasses
import difflib
import functools
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

_NAMED_TOKENS = 10
UNK = "<unk>"
EOS = "<eos>"
_COMPARED_TOKENS = 50_000


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Vocabulary:
    """Tokens by id.

    Of a text, `<unk>` and `<eos>` are ordinary rows at the place that their counts give them. A token of the text
    that is spelled like one of them is that row.

    Attributes:
      tokens: the token of each id; no two are equal, none contains white space.
      counts: [vocab_size] int64, how often each occurs in the training split, falling.
    """

    tokens: tuple[str, ...]
    counts: np.ndarray

    def __len__(self):
        return len(self.tokens)

    @functools.cached_property
    def ids(self) -> dict[str, int]:
        """Id of each token; looking up any other gives the id of `<unk>`, if there is one."""
        known = {token: token_id for token_id, token in enumerate(self.tokens)}
        return _IdsOrUnk(known, unk_id=known[UNK]) if UNK in known else known

    def unknown(self, tokens) -> str | None:
        """Which of some tokens are not in it, and what may have been meant, as a message tells it; None if all are."""
        missing = [token for token in dict.fromkeys(tokens) if token not in self.ids]
        told = []
        for token in missing[:_NAMED_TOKENS]:
            closest = self.closest(token)
            told.append(repr(token) + (f" (did you mean {' or '.join(closest)}?)" if closest else ""))
        more = f" and {len(missing) - len(told):,} more" if len(missing) > len(told) else ""
        return ", ".join(told) + more if missing else None

    @property
    def unk_id(self) -> int:
        return self.ids[UNK]

    @property
    def eos_id(self) -> int:
        return self.ids[EOS]

    @functools.cached_property
    def sha256(self) -> str:
        """Hex SHA-256 of `to_text`: equal where ids mean the same tokens."""
        return hashlib.sha256(self.to_text().encode()).hexdigest()

    def closest(self, word: str, *, n: int = 3) -> list[str]:
        """Tokens that somebody may have meant by a word that is none, the likeliest first; of frequent ones alone."""
        spellings = (word.lower(), word.capitalize(), word.upper())
        found = [spelling for spelling in dict.fromkeys(spellings) if spelling in self.ids]
        # To compare a word with millions would take minutes.
        frequent = [token for token in self.tokens[:_COMPARED_TOKENS] if abs(len(token) - len(word)) <= 3]
        found += difflib.get_close_matches(word, frequent, n=n, cutoff=0.7)
        return list(dict.fromkeys(found))[:n]

    def to_text(self) -> str:
        """One `token<TAB>count` per line, in id order."""
        return "".join(map("{}\t{}\n".format, self.tokens, self.counts.tolist()))

    @classmethod
    def from_text(cls, text: str, *, required: Sequence[str] = (UNK, EOS)) -> "Vocabulary":
        """Reads what `to_text` wrote; `required` tokens must be in it.

        Raises:
          ValueError: naming the first line that is not a token and a count or is out of order, or if a
            token is repeated.
        """
        lines = text.split("\n")
        if lines[-1] != "":
            raise ValueError("its last line does not end: the file is cut off.")
        tokens, counts, previous = [], np.empty(len(lines) - 1, np.int64), None
        for number, line in enumerate(lines[:-1]):
            token, tab, count = line.partition("\t")
            if not (token and tab and count.isascii() and count.isdigit()):
                raise ValueError(f"line {number + 1} must be a token, tab and count. Received: {line!r}.")
            if previous is not None and int(count) > previous:
                raise ValueError(f"line {number + 1}: counts must fall. Received: {previous}, then {count}.")
            tokens.append(token)
            counts[number] = previous = int(count)
        vocabulary = cls(tokens=tuple(tokens), counts=counts)
        known = set(tokens)
        if len(known) < len(tokens):
            raise ValueError("a token is in it twice.")
        if not known >= set(required):
            raise ValueError(f"{' and '.join(required)} must be in it.")
        return vocabulary


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class UnnamedVocabulary:
    """Ids without words: buckets that words are hashed into, say.

    Attributes:
      size: ids.
      counts: [size] int64, how often each occurs in the training split, in any order; None if nobody counted.
    """

    size: int
    counts: np.ndarray | None = None

    def __len__(self):
        return self.size

    @functools.cached_property
    def sha256(self) -> str:
        """Hex SHA-256 of the size: equal where the ids are the same."""
        return hashlib.sha256(f"{self.size} ids".encode()).hexdigest()


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class VocabularyFile:
    """A vocabulary whose words stay in their file: for those who only need to know how many there are.

    Attributes:
      path: vocab.txt, as `Vocabulary.to_text` writes it.
      size: its lines.
      sha256: hex SHA-256 of it.
    """

    path: Path
    size: int
    sha256: str

    def __len__(self):
        return self.size

    @property
    def counts(self) -> np.ndarray:
        """[size] int64, read from the file whenever it is asked for."""
        with self.path.open("rb") as lines:
            return np.fromiter((int(line.rpartition(b"\t")[2]) for line in lines), np.int64, self.size)


class _IdsOrUnk(dict):
    """A dict whose `[]` gives the id of `<unk>` for an absent key; a hit stays a single C call."""

    def __init__(self, known, *, unk_id):
        super().__init__(known)
        self._unk_id = unk_id

    def __missing__(self, key):
        return self._unk_id


def check_limits(*, vocab_size: int | None, min_count: int) -> None:
    """Checks the limits of `build_vocabulary` before any text is read.

    Raises:
      ValueError: if a limit is too small.
    """
    if vocab_size is not None and vocab_size < 3:
        raise ValueError(
            f"vocab_size must be at least 3: {UNK}, {EOS} and one token. "
            f"Received: vocab_size={vocab_size}. Use a larger one, or none for no limit."
        )
    if min_count < 1:
        raise ValueError(f"min_count must be at least 1. Received: min_count={min_count}. Use 1 to keep all.")


def build_vocabulary(
    counts: Mapping[str, int], *, vocab_size: int | None = None, min_count: int = 1
) -> Vocabulary:
    """Keeps the most frequent tokens; the others become `<unk>`, and count as it.

    The result is sorted by falling count, equal counts by code point, so that it does not depend on the
    order of the text. `<unk>` and `<eos>` are always in it, with count 0 where the text has neither.

    Args:
      counts: how often each token occurs in the training split, `<eos>` included.
      vocab_size: rows at most, `<unk>` and `<eos>` included; None for no limit.
      min_count: tokens seen fewer times than this become `<unk>`.
    Raises:
      ValueError: if a limit is too small, nothing but `<unk>` and `<eos>` would be left, or a token holds
        white space, which vocab.txt could not keep.
    """
    check_limits(vocab_size=vocab_size, min_count=min_count)
    ranked = sorted(
        (item for item in counts.items() if item[1] >= min_count and item[0] not in (UNK, EOS)),
        key=lambda item: (-item[1], item[0]),
    )
    if vocab_size is not None:
        del ranked[vocab_size - 2 :]
    if not counts.keys() - {UNK, EOS}:
        raise ValueError(
            f"The training text must hold a token. Received: nothing but {counts.get(EOS, 0):,} {EOS} and "
            f"{counts.get(UNK, 0):,} {UNK}, as of blank lines. Give another text."
        )
    if not ranked:
        raise ValueError(
            f"At least one token must occur min_count={min_count} times. Received: {len(counts):,} types, "
            f"the most frequent {max(counts.values(), default=0):,} times, {EOS} included. "
            "Use a smaller min_count, or more text."
        )
    for token, _ in ranked:
        if token.split() != [token]:
            raise ValueError(
                f"A token must not be empty nor hold white space. Received: {token!r}. Use another tokenizer."
            )
    num_eos = counts.get(EOS, 0)
    num_unk = sum(counts.values()) - num_eos - sum(count for _, count in ranked)
    ranked += [(EOS, num_eos), (UNK, num_unk)]
    ranked.sort(key=lambda item: (-item[1], item[0]))
    tokens, sorted_counts = zip(*ranked, strict=True)
    return Vocabulary(tokens=tokens, counts=np.array(sorted_counts, np.int64))
