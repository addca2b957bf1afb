"""The command line of prepare, as a user meets it: separate processes, their output and exit codes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def prepare(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-m", "lmscale.prepare", *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture
def texts(tmp_path):
    for name, text in {"train": "a b a\n", "valid": "b\n", "test": "c\n"}.items():
        (tmp_path / f"{name}.txt").write_text(text)
    return tmp_path


THREE = ["--train=train.txt", "--valid=valid.txt", "--test=test.txt"]


def test_prepare_then_again(texts):
    first = prepare(*THREE, "--output=out", cwd=texts)
    assert (first.returncode, first.stderr) == (0, "")
    assert first.stdout.splitlines() == [
        "vocabulary 4 rows, of 2 types in the training text",
        "train 4 tokens, 1 lines, 3 types, 0 <unk> (0.00%)",
        "valid 2 tokens, 1 lines, 2 types, 0 <unk> (0.00%)",
        "test  2 tokens, 1 lines, 2 types, 1 <unk> (50.00%)",
        "Wrote out.",
    ]
    assert sorted(path.name for path in (texts / "out").iterdir()) == [
        "manifest.json",
        "test.bin",
        "train.bin",
        "valid.bin",
        "vocab.txt",
    ]
    again = prepare(*THREE, "--output=out", cwd=texts)
    assert (again.returncode, again.stderr) == (0, "")
    assert again.stdout.splitlines()[-1] == "out holds this already: nothing to do."
    other = prepare(*THREE, "--output=out", "--vocab_size=3", cwd=texts)
    assert other.returncode == 2
    assert other.stderr == (
        "error: out exists and holds other data: vocab_size is None, wanted 3. "
        "Pass --overwrite to replace it, or choose another output.\n"
    )
    replaced = prepare(*THREE, "--output=out", "--vocab_size=3", "--overwrite", cwd=texts)
    assert replaced.returncode == 0
    assert json.loads((texts / "out" / "manifest.json").read_text())["vocabulary"]["size"] == 3


def test_one_input(texts):
    (texts / "book.txt").write_text("one line of a book\n" * 40)
    arguments = [
        "--input=book.txt",
        "--block_lines=2",
        "--valid_fraction=0.1",
        "--test_fraction=0.2",
        "--output=out",
    ]
    result = prepare(*arguments, cwd=texts)
    assert (result.returncode, result.stderr) == (0, "")
    manifest = json.loads((texts / "out" / "manifest.json").read_text())
    assert {name: entry["lines"] for name, entry in manifest["splits"].items()} == {
        "train": 28,
        "valid": 4,
        "test": 8,
    }
    assert manifest["options"]["split"] == {"valid_fraction": 0.1, "test_fraction": 0.2, "block_lines": 2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (THREE, "--output must name the directory to make. Received none."),
        (
            ["--output=out"],
            "--train, --valid and --test are needed, or --input alone. Received: none of them.",
        ),
        (["--output=out", *THREE[:2]], "or --input alone. Received: --train, --valid."),
        (
            ["--output=out", *THREE, "--input=test.txt"],
            "in place of --train, --valid and --test. Received also: --train,",
        ),
        (["--output=out", *THREE, "--block_lines=9"], "--block_lines applies to --input only."),
        (
            ["--output=out", "--input=train.txt", "--valid_fraction=1.5"],
            "valid_fraction=1.5, test_fraction=0.05",
        ),
        (
            ["--output=out", *THREE, "--tokenizer=bpe"],
            "one of characters, sentencepiece, whitespace, wordpiece, words. Re",
        ),
        (
            ["--output=out", *THREE, "--tokenizer=sentencepiece"],
            "tokenizer=sentencepiece needs sentencepiece_model",
        ),
        (
            ["--output=out", *THREE, "--sentencepiece_model=m"],
            "sentencepiece_model does not apply to tokenizer=whites",
        ),
        (["--output=out", *THREE, "--vocab_size=2"], "vocab_size must be at least 3"),
        (["--output=out", *THREE, "--vocab_size=many"], "--vocab_size=many"),
        (["--output=out", *THREE, "--vocabulary=9"], "Unknown command line flag 'vocabulary'"),
        (["--output=out", *THREE[:2], "--test=tset.txt"], "test: no such file. Received: 'tset.txt'"),
        (["--output=out", *THREE[:2], "--test=*.md"], "test: no file matches. Received: '*.md'"),
        (["--output=train.txt", *THREE], "output must be a directory. Received: 'train.txt'"),
        (["--output=train.txt/out", *THREE], "train.txt/out: the output cannot be written there"),
        (["--output=.", *THREE, "--overwrite"], "holds other files"),
        (["out", *THREE], "flags only. Received also: out."),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(texts, arguments, message):
    before = sorted(texts.rglob("*"))
    result = prepare(*arguments, cwd=texts)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
    assert sorted(texts.rglob("*")) == before


def test_help_lists_the_flags(texts):
    result = prepare("--help", cwd=texts)
    assert (result.returncode, result.stderr) == (0, "")
    for flag in (
        "--train",
        "--input",
        "--output",
        "--vocab_size",
        "--min_count",
        "--tokenizer",
        "--block_lines",
    ):
        assert flag in result.stdout


def test_tensorflow_is_not_imported_without_need():
    code = "import sys, lmscale.prepare; sys.exit('tensorflow' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
