"""Turns text into a prepared directory: a vocabulary, compact token files and a manifest.

Either three texts or one which is split here:

  python -m lmscale.prepare --train=train.txt --valid=valid.txt --test=test.txt --output=DIR
  python -m lmscale.prepare --input='books/*.txt.xz' --output=DIR

Each is a file, a glob or a comma-separated list of them: UTF-8, plain or compressed with gzip or xz. A name
with a comma in it can be given alone, or in double quotes in a list. What is not there is looked for among the texts
that come with lmscale, a novel: tiny-austen/train.txt, tiny-austen/valid.txt and tiny-austen/test.txt.
One `<eos>` stands at the end of each line. The vocabulary comes from the training text alone: all its
tokens, unless --vocab_size or --min_count limits it; the others become `<unk>`. --input is dealt to the
splits in blocks of --block_lines lines, each block to the split that is furthest behind its fraction.

The same text and options give the same bytes. A directory which exists already is left alone if it was
made of the same text with the same options, and refused otherwise, unless --overwrite is given. It keeps its
mode, and may be a mount point or the current directory. What a killed preparation left behind is removed.

Histories of users, for the recommendation of what comes next, are "user item" lines in the order of time:

  python -m lmscale.prepare --format=histories --input=purchases.txt --output=DIR

The last item of each user is the target of the test, the one before it that of the validation.

Examples in columns are CSV files with a header, or TFRecord files of tf.train.Example, and a schema of the columns:

  python -m lmscale.prepare --format=table --schema=schema.json --train=train.csv --valid=valid.csv --test=test.csv \
      --output=DIR
"""

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from lmscale import command_line, paths
from lmscale.data import (
    histories,
    preparation,
    schema,
    table_preparation,
    text_files,
    token_files,
    tokenizers,
)

_TRAIN = command_line.DEFINE_paths("train", None, "Training text.")
_VALID = command_line.DEFINE_paths("valid", None, "Validation text.")
_TEST = command_line.DEFINE_paths("test", None, "Test text.")
_INPUT = command_line.DEFINE_paths(
    "input", None, "One text to be split, in place of --train, --valid and --test."
)
_VALID_FRACTION = flags.DEFINE_float(
    "valid_fraction", None, "With --input: fraction for validation; unset: 0.05."
)
_TEST_FRACTION = flags.DEFINE_float("test_fraction", None, "With --input: fraction for test; unset: 0.05.")
_BLOCK_LINES = flags.DEFINE_integer("block_lines", None, "With --input: lines dealt together; unset: 100.")
_OUTPUT = command_line.DEFINE_path("output", None, "The directory to make.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace a prepared directory at --output.")
_TOKENIZER = flags.DEFINE_string(
    "tokenizer", "whitespace", f"How lines become tokens: {', '.join(tokenizers.tokenizer_names())}."
)
_SENTENCEPIECE_MODEL = command_line.DEFINE_path(
    "sentencepiece_model", None, "Model of --tokenizer=sentencepiece."
)
_VOCAB_SIZE = flags.DEFINE_integer(
    "vocab_size", None, "Rows of the vocabulary at most, <unk> and <eos> included; unset: no limit."
)
_FORMAT = flags.DEFINE_enum("format", "text", ["text", "histories", "table"], "What the files hold.")
_SCHEMA = command_line.DEFINE_path(
    "schema", None, "With --format=table: JSON file that declares the columns."
)
_VALID_USERS = flags.DEFINE_integer(
    "valid_users",
    None,
    "With --format=histories: how many users lose the item before their last one to validation; unset: all.",
)
_MIN_COUNT = flags.DEFINE_integer(
    "min_count", 1, "Tokens (wordpiece: letters) seen fewer times in the training text become <unk>."
)


def main(argv: list[str]) -> int:
    """Prepares what the flags say, and prints what came out."""
    del argv
    if not _OUTPUT.value:
        raise ValueError("--output must name the directory to make. Received none.")
    if _FORMAT.value == "histories":
        return _prepare_histories()
    if _FORMAT.value == "table":
        return _prepare_table()
    _check_unused([_VALID_USERS, _SCHEMA], of_format="text")
    tokenizer = tokenizers.make_tokenizer(
        _TOKENIZER.value, options={"sentencepiece_model": _SENTENCEPIECE_MODEL.value}
    )
    with _progress() as report:
        data, made = preparation.prepare(
            _corpus(),
            output=Path(_OUTPUT.value),
            tokenizer=tokenizer,
            vocab_size=_VOCAB_SIZE.value,
            min_count=_MIN_COUNT.value,
            overwrite=_OVERWRITE.value,
            report=report,
        )
    print(_summary(data))
    _print_made(made)
    return 0


def _prepare_histories() -> int:
    of_texts = [_TRAIN, _VALID, _TEST, _VALID_FRACTION, _TEST_FRACTION, _BLOCK_LINES]
    _check_unused(
        [*of_texts, _TOKENIZER, _SENTENCEPIECE_MODEL, _VOCAB_SIZE, _MIN_COUNT, _SCHEMA], of_format="histories"
    )
    if _INPUT.value is None:
        raise ValueError("--input must name the histories. Received none.")
    with _progress() as report:
        data, made = histories.prepare_histories(
            text_files.expand_patterns(paths.or_shipped(_INPUT.value), flag="input"),
            output=Path(_OUTPUT.value),
            rule=histories.LeaveLastOut(valid_users=_VALID_USERS.value),
            overwrite=_OVERWRITE.value,
            report=report,
        )
    items = data.vocabularies[histories.ITEMS]
    num_trained = 0 if items.counts is None else np.count_nonzero(items.counts)
    print(f"items {len(items):,}, of which {num_trained:,} in the training histories")
    for name in token_files.SPLITS:
        split = data.manifest["splits"][name]
        never = split.get("targets_never_trained_on")
        bound = (
            ""
            if never is None
            else f", {never:,} targets ({never / max(1, split['examples']):.2%}) never trained on"
        )
        print(f"{name:5} {split['examples']:,} users, {split['events']:,} items in their histories{bound}")
    _print_made(made)
    return 0


def _prepare_table() -> int:
    of_others = [_INPUT, _VALID_FRACTION, _TEST_FRACTION, _BLOCK_LINES, _VALID_USERS]
    of_texts = [_TOKENIZER, _SENTENCEPIECE_MODEL, _VOCAB_SIZE, _MIN_COUNT]
    _check_unused([*of_others, *of_texts], of_format="table")
    given = {"train": _TRAIN.value, "valid": _VALID.value, "test": _TEST.value}
    missing = [f"--{name}" for name, patterns in given.items() if patterns is None]
    if _SCHEMA.value is None:
        missing.append("--schema")
    if missing:
        raise ValueError(f"--train, --valid, --test and --schema are needed. Missing: {', '.join(missing)}.")
    files = {
        name: text_files.expand_patterns(paths.or_shipped(patterns), flag=name)
        for name, patterns in given.items()
    }
    with _progress() as report:
        data, made = table_preparation.prepare_table(
            files,
            schema=schema.read_schema(Path(_SCHEMA.value)),
            output=Path(_OUTPUT.value),
            overwrite=_OVERWRITE.value,
            report=report,
        )
    for name, vocabulary in data.vocabularies.items():
        print(f"vocabulary {name}: {len(vocabulary):,} rows")
    for name in token_files.SPLITS:
        split = data.manifest["splits"][name]
        told = ", ".join(f"{column} {count:,}" for column, count in split["unknown"].items())
        print(f"{name:5} {split['examples']:,} examples; unknown values: {told or 'none can be'}")
    _print_made(made)
    return 0


def _check_unused(unused, *, of_format) -> None:
    for flag in unused:
        if flags.FLAGS[flag.name].present:
            raise ValueError(
                f"--{flag.name} must be left out with --format={of_format}. Received: --{flag.name}={flag.value}."
            )


def _print_made(made) -> None:
    print(f"Wrote {_OUTPUT.value!r}." if made else f"{_OUTPUT.value!r} holds this already: nothing to do.")


def run() -> None:
    """The console script."""
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # A tokenizer that imports TensorFlow must not occupy a GPU.
    command_line.run_main(main)


def _corpus() -> preparation.Corpus:
    texts = {"train": _TRAIN.value, "valid": _VALID.value, "test": _TEST.value}
    given = {name: patterns for name, patterns in texts.items() if patterns is not None}
    rule_flags = (_VALID_FRACTION, _TEST_FRACTION, _BLOCK_LINES)
    rule: dict[str, Any] = {flag.name: flag.value for flag in rule_flags if flag.value is not None}
    shown = ", ".join(f"--{name}" for name in given) or "none of them"
    if _INPUT.value is not None:
        if given:
            raise ValueError(
                f"--input stands in place of --train, --valid and --test. Received also: {shown}."
            )
        return preparation.Corpus(
            {"input": paths.or_shipped(_INPUT.value)}, rule=preparation.LineBlockSplit(**rule)
        )
    if len(given) < len(texts):
        raise ValueError(f"--train, --valid and --test are needed, or --input alone. Received: {shown}.")
    if rule:
        raise ValueError(f"--{next(iter(rule))} applies to --input only. Received: {shown}.")
    return preparation.Corpus({name: paths.or_shipped(patterns) for name, patterns in given.items()})


def _summary(data: token_files.PreparedData) -> str:
    types = data.manifest["vocabulary"]["types_in_train_text"]
    lines = [f"vocabulary {data.vocab_size:,} rows, of {types:,} types in the training text"]
    for name in token_files.SPLITS:
        split = data.manifest["splits"][name]
        lines.append(
            f"{name:5} {split['tokens']:,} tokens, {split['lines']:,} lines, {split['types']:,} types, "
            f"{split['unk_tokens']:,} <unk> ({split['unk_tokens'] / split['tokens']:.2%})"
        )
    return "\n".join(lines)


@contextlib.contextmanager
def _progress():
    """A `preparation.Report`: a bar for each phase if stderr is a terminal, else nothing."""
    if not sys.stderr.isatty():
        yield lambda phase, done, total: None
        return
    import rich.console
    import rich.progress

    columns = [*rich.progress.Progress.get_default_columns(), rich.progress.DownloadColumn()]
    with rich.progress.Progress(*columns, console=rich.console.Console(stderr=True)) as bars:
        tasks: dict[str, rich.progress.TaskID] = {}

        def report(phase: str, done: int, total: int):
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase)
            bars.update(tasks[phase], completed=done, total=total)

        yield report


if __name__ == "__main__":
    run()
