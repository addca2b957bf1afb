"""Text to a prepared directory: count the tokens of the training split, then write the ids of every split."""

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from lmscale.data.prepared_directory import PreparedDirectoryWriter
from lmscale.data.text_files import Block, expand_patterns, read_blocks
from lmscale.data.there_already import Report, describe_files, meter, there_already
from lmscale.data.token_files import SPLITS, VOCAB_FILE, PreparedData
from lmscale.data.tokenizers import Tokenizer
from lmscale.data.vocab import EOS, Vocabulary, build_vocabulary, check_limits
from lmscale.doing import doing


@dataclasses.dataclass(frozen=True, kw_only=True)
class LineBlockSplit:
    """How one text becomes three splits: by blocks of consecutive lines, dealt in a fixed order.

    Each block goes to the split that is then furthest behind its fraction of the blocks; equally far, to
    train before valid before test. The splits are so spread evenly over the text, and depend on nothing
    but the line numbers.

    Attributes:
      valid_fraction, test_fraction: of the blocks; train gets the rest.
      block_lines: lines in a block. Longer blocks keep more context together.
    """

    valid_fraction: float = 0.05
    test_fraction: float = 0.05
    block_lines: int = 100

    def __post_init__(self):
        fractions = (self.valid_fraction, self.test_fraction)
        if not (all(0 < fraction < 1 for fraction in fractions) and sum(fractions) < 1):
            raise ValueError(
                "valid_fraction and test_fraction must be above 0 and sum to less than 1. Received: "
                f"valid_fraction={self.valid_fraction}, test_fraction={self.test_fraction}. Use 0.05 for each, say."
            )
        if self.block_lines < 1:
            raise ValueError(
                f"block_lines must be at least 1. Received: block_lines={self.block_lines}. Use 100, say."
            )

    def split_of_blocks(self) -> Iterator[str]:
        """The split of line block 0, 1, 2 and so on."""
        valid, test = Fraction(str(self.valid_fraction)), Fraction(str(self.test_fraction))
        fractions = {"train": 1 - valid - test, "valid": valid, "test": test}
        behind = dict.fromkeys(SPLITS, Fraction(0))
        while True:
            for split in SPLITS:
                behind[split] += fractions[split]
            chosen = max(SPLITS, key=behind.__getitem__)  # The first of equals.
            behind[chosen] -= 1
            yield chosen


class Corpus:
    """The text to prepare: files of each split, or files that are split here."""

    def __init__(self, patterns: Mapping[str, Sequence[str]], *, rule: LineBlockSplit | None = None):
        """Finds the files.

        Args:
          patterns: paths and globs by "train", "valid" and "test", or by "input" alone.
          rule: how to split "input"; None if there is none.
        Raises:
          ValueError: if a file is missing, empty or in two splits, or the keys are not as above.
        """
        expected = SPLITS if rule is None else ("input",)
        if tuple(patterns) != expected:
            raise ValueError(f"patterns must be given for {expected}. Received: {tuple(patterns)}.")
        self.files = {name: expand_patterns(patterns[name], flag=name) for name in expected}
        self.rule = rule
        owners: dict[Path, str] = {}
        for name, paths in self.files.items():
            for path in paths:
                other = owners.setdefault(path.resolve(), name)
                if other != name:
                    raise ValueError(
                        f"A file may be in one split only. Received: {str(path)!r} in {other} and {name}. "
                        "Take it out of one of them."
                    )

    def blocks(
        self, splits: Sequence[str], *, on_bytes: Callable[[int], None]
    ) -> Iterator[tuple[str, Block]]:
        """Streams the text of some splits, as (split, block)."""
        if self.rule is None:
            for split in splits:
                for path in self.files[split]:
                    for block in read_blocks(path, on_bytes=on_bytes):
                        yield split, block
        else:
            for split, block in self._dealt(self.rule, on_bytes):
                if split in splits:
                    yield split, block

    def num_bytes(self, splits: Sequence[str]) -> int:
        """Bytes on disk that `blocks` of these splits reads."""
        names = splits if self.rule is None else ["input"]
        return sum(path.stat().st_size for name in names for path in self.files[name])

    def describe(self, *, on_bytes: Callable[[int], None]) -> dict[str, list[dict]]:
        """Names without folders, sizes and SHA-256 of the files, by split or "input"."""
        return describe_files(self.files, on_bytes=on_bytes)

    def _dealt(self, rule, on_bytes):
        split_of_blocks = rule.split_of_blocks()
        split, room = next(split_of_blocks), rule.block_lines
        for path in self.files["input"]:
            for block in read_blocks(path, on_bytes=on_bytes):
                start = 0
                while start < len(block.lines):
                    part = block.lines[start : start + room]
                    start += len(part)
                    ends_line = block.ends_line or start < len(block.lines)
                    yield split, Block(part, ends_line=ends_line)
                    room -= len(part) - (not ends_line)
                    if room == 0:
                        split, room = next(split_of_blocks), rule.block_lines


def prepare(
    corpus: Corpus,
    *,
    output: Path,
    tokenizer: Tokenizer,
    vocab_size: int | None = None,
    min_count: int = 1,
    overwrite: bool = False,
    report: Report = lambda phase, done, total: None,
) -> tuple[PreparedData, bool]:
    """Makes a prepared directory, in bounded memory but for the types: each text is read as a stream.

    Every line is followed by one `<eos>`, a blank line too. The same text and options give the same bytes.
    The directory appears complete or not at all; one that is there already keeps its mode.

    Args:
      corpus: the text.
      output: the directory to make. If it is there already, made of the same text with the same options,
        nothing is done.
      tokenizer: cuts lines into tokens.
      vocab_size: rows at most, `<unk>` and `<eos>` included; None for no limit.
      min_count: tokens seen fewer times in the training text become `<unk>`.
      overwrite: replace a prepared directory at `output`.
      report: called as (phase, bytes done, bytes in all) now and then.
    Returns:
      The prepared data, and whether they were made now.
    Raises:
      ValueError: for text, options or an output that cannot be used; nothing is left behind.
      OSError: if the output cannot be written; likewise.
    """
    options = {
        "tokenizer": tokenizer.name,
        **tokenizer.describe(),
        "vocab_size": vocab_size,
        "min_count": min_count,
        "split": dataclasses.asdict(corpus.rule) if corpus.rule else None,
    }
    check_limits(vocab_size=vocab_size, min_count=min_count)
    there = there_already(
        output,
        open_data=PreparedData.open,
        options=options,
        inputs=lambda: corpus.describe(on_bytes=meter("checking", corpus.num_bytes(SPLITS), report)),
        overwrite=overwrite,
    )
    if there is not None:
        return there, False

    with PreparedDirectoryWriter(output, replace=overwrite) as writer:
        inputs = corpus.describe(on_bytes=meter("checking", corpus.num_bytes(SPLITS), report))
        if tokenizer.learns:
            text = corpus.blocks(["train"], on_bytes=meter("learning", corpus.num_bytes(["train"]), report))
            with doing("learning the tokenizer from the training text"):
                tokenizer.learn(
                    (block.lines for _, block in text), vocab_size=vocab_size, min_count=min_count
                )
        with doing("counting the tokens of the training text"):
            counts = _count(corpus, tokenizer, report)
        with doing(f"sorting the vocabulary, of {len(counts):,} types"):
            # What was learned keeps to min_count in its own way: a rare piece may spell part of a frequent word.
            vocabulary = build_vocabulary(
                counts, vocab_size=vocab_size, min_count=1 if tokenizer.learns else min_count
            )
        num_types = len(counts) - (EOS in counts)
        del counts
        with doing("writing the ids of the splits"):
            splits = _write_splits(corpus, tokenizer, vocabulary, writer, report)
        with doing(f"writing the vocabulary, of {len(vocabulary):,} rows"):
            manifest = {
                "options": options,
                "inputs": inputs,
                "vocabulary": {
                    **writer.write_file(VOCAB_FILE, vocabulary.to_text().encode()),
                    "size": len(vocabulary),
                    "unk_id": vocabulary.unk_id,
                    "eos_id": vocabulary.eos_id,
                    "types_in_train_text": num_types,
                },
                "splits": splits,
                "tokenizer_files": [writer.write_file(*item) for item in sorted(tokenizer.files().items())],
            }
            writer.finish(manifest)
    with doing("reading what was written"):
        return PreparedData.open(output, verify=False), True


def _count(corpus: Corpus, tokenizer: Tokenizer, report: Report) -> Counter[str]:
    """How often each token occurs in the training text."""
    counts: Counter[str] = Counter()
    on_bytes = meter("counting", corpus.num_bytes(["train"]), report)
    for _, block in corpus.blocks(["train"], on_bytes=on_bytes):
        counts.update(_tokens(block, tokenizer))
    return counts


def _write_splits(
    corpus: Corpus,
    tokenizer: Tokenizer,
    vocabulary: Vocabulary,
    writer: PreparedDirectoryWriter,
    report: Report,
) -> dict[str, dict]:
    """Writes the ids of every split. Returns the manifest entries."""
    ids_of_tokens = vocabulary.ids
    on_bytes = meter("writing", corpus.num_bytes(SPLITS), report)
    num_lines = dict.fromkeys(SPLITS, 0)
    counts = {split: np.zeros(len(vocabulary), np.int64) for split in SPLITS}
    with contextlib.ExitStack() as stack:
        files = {
            split: stack.enter_context(writer.token_file(split, vocab_size=len(vocabulary)))
            for split in SPLITS
        }
        for split, block in corpus.blocks(SPLITS, on_bytes=on_bytes):
            tokens = _tokens(block, tokenizer)
            ids = np.fromiter(map(ids_of_tokens.__getitem__, tokens), np.int32, len(tokens))
            files[split].append(ids)
            np.add.at(counts[split], ids, 1)
            num_lines[split] += len(block.lines) - (not block.ends_line)
    for split in SPLITS:
        if files[split].num_tokens == 0:
            total = sum(num_lines.values())
            raise ValueError(
                f"Every split must get some lines. Received: none of {total:,} lines for {split}, by "
                f"{corpus.rule}. Use a smaller block_lines, a larger {split}_fraction, or more text."
            )
    if not np.array_equal(counts["train"], vocabulary.counts):
        raise ValueError(
            "The text must not change while it is read. Received: other tokens at the second reading. Prepare it again."
        )
    return {
        split: {
            **files[split].entry(),
            "tokens": files[split].num_tokens,
            "lines": num_lines[split],
            "types": int(np.count_nonzero(counts[split])),
            "unk_tokens": int(counts[split][vocabulary.unk_id]),
        }
        for split in SPLITS
    }


def _tokens(block: Block, tokenizer: Tokenizer) -> list[str]:
    """The tokens of a block, one `<eos>` behind each line that ends in it."""
    tokens: list[str] = []
    for line_tokens in tokenizer.tokenize(block.lines):
        tokens += line_tokens
        tokens.append(EOS)
    if not block.ends_line:
        tokens.pop()
    return tokens
