"""The command line of prepare, as a user meets it: separate processes, their output and exit codes."""

import gzip
import json
import lzma
import os
import shutil
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
        "Wrote 'out'.",
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
    assert again.stdout.splitlines()[-1] == "'out' holds this already: nothing to do."
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


def test_a_name_with_a_comma(texts):
    (texts / "train.txt").rename(texts / "a, b.txt")
    arguments = ["--train=a, b.txt", *THREE[1:], "--output=out"]
    result = prepare(*arguments, cwd=texts)
    assert (result.returncode, result.stderr) == (0, "")
    assert (
        json.loads((texts / "out" / "manifest.json").read_text())["inputs"]["train"][0]["file"] == "a, b.txt"
    )
    (texts / "more.txt").write_text("b b\n")
    for value in ('--train="a, b.txt",m*.txt', '--train=more.txt , "a, b.txt"'):
        result = prepare(value, *THREE[1:], "--output=out", "--overwrite", cwd=texts)
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout.splitlines()[1].startswith("train 7 tokens, 2 lines")
    result = prepare("--train=a,c.txt", *THREE[1:], "--output=out", cwd=texts)
    assert result.stderr == "error: train: no such file. Received: 'a'. Give an existing file or a glob.\n"


OUTPUT_FILES = ["manifest.json", "test.bin", "train.bin", "valid.bin", "vocab.txt"]


def test_output_may_be_the_current_directory(texts):
    here = texts / "here"
    here.mkdir()
    here.chmod(0o2750)
    before = here.stat()
    three = [argument.replace("=", "=../") for argument in THREE]
    for arguments, message in [
        ([], "Wrote '.'."),
        ([], "'.' holds this already: nothing to do."),
        (["--min_count=2", "--overwrite"], "Wrote '.'."),
    ]:
        result = prepare(*three, "--output=.", *arguments, cwd=here)
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout.splitlines()[-1] == message
        assert sorted(path.name for path in here.iterdir()) == OUTPUT_FILES
        assert (here.stat().st_ino, here.stat().st_mode) == (before.st_ino, before.st_mode)
    failed = prepare(*three[:2], "--test=../nothing.txt", "--output=.", "--overwrite", cwd=here)
    assert failed.returncode == 2
    assert sorted(path.name for path in here.iterdir()) == OUTPUT_FILES
    assert sorted(path.name for path in texts.iterdir()) == ["here", "test.txt", "train.txt", "valid.txt"]


def test_output_may_be_a_mount_point(texts):
    """In a mount namespace of its own, which ends with the process."""
    (texts / "disk").mkdir()
    command = (
        "mount -t tmpfs -o mode=2770 none disk && mkdir disk/lost+found && "
        f"for more in '' '--overwrite --min_count=2'; do "
        f"{sys.executable} -m lmscale.prepare {' '.join(THREE)} --output=disk $more || exit; done && "
        "stat --format=%a disk && mountpoint -q disk && ls -A disk"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    unshare = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "--map-root-user"]
    if (
        not shutil.which("unshare")
        or subprocess.run(
            [*unshare, "mount", "-t", "tmpfs", "none", str(texts / "disk")], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("no private mount namespace can be made here")
    result = subprocess.run(
        [*unshare, "sh", "-c", command],
        cwd=texts,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines()[-7:] == ["2770", "lost+found", *OUTPUT_FILES]


def test_files_of_the_user_beside_a_killed_preparation_are_left_alone(texts):
    for name in ("vocab.txt", "tokenizer.json"):
        (texts / "bert" / name).parent.mkdir(exist_ok=True)
        (texts / "bert" / name).write_text("mine")
    (texts / "bert" / ".out.partial-0123abcd").mkdir()
    three = [argument.replace("=", "=../") for argument in THREE]
    for arguments in ([], ["--overwrite"]):
        result = prepare(*three, "--output=.", *arguments, cwd=texts / "bert")
        assert (result.returncode, result.stdout) == (2, "")
        assert (
            "output must be new, empty or made by this command. Received: '.', which holds" in result.stderr
        )
        assert {path.read_text() for path in (texts / "bert").iterdir() if path.is_file()} == {"mine"}
        assert len(list((texts / "bert").iterdir())) == 3


def test_links_that_go_in_a_circle_are_mistakes(texts):
    (texts / "loop").symlink_to("loop")
    before = sorted(texts.rglob("*"))
    for arguments in (
        [*THREE, "--output=loop"],
        [*THREE, "--output=loop/x"],
        ["--train=loop", *THREE[1:], "--output=out"],
        ["--train=loop/x", *THREE[1:], "--output=out"],
        ["--train=loo*", *THREE[1:], "--output=out"],
    ):
        result = prepare(*arguments, cwd=texts)
        assert (result.returncode, result.stdout) == (2, "")
        assert "loop" in result.stderr
    assert sorted(texts.rglob("*")) == before


def test_a_killed_preparation_is_tidied_up(texts):
    (texts / ".out.partial-0123abcd").mkdir()
    (texts / ".out.partial-0123abcd" / "train.bin").write_bytes(b"x")
    result = prepare(*THREE, "--output=out", cwd=texts)
    assert result.returncode == 0
    assert "Removing" in result.stderr
    assert ".out.partial-0123abcd, which a preparation that was killed has left behind." in result.stderr
    assert sorted(path.name for path in texts.iterdir()) == ["out", "test.txt", "train.txt", "valid.txt"]


def xz(*contents):
    return b"".join(map(lzma.compress, contents))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.xz",
            xz(b"a\n") + bytes(4) + xz(b"b\n")[:-1],
            "a.xz: damaged behind line 2: the stream that begins at b",
        ),
        (
            "a.xz",
            xz(b"a\n") + bytes(3),
            "must be a multiple of 4. Received: 3. Get the file again, and check it wit",
        ),
        (
            "a.xz",
            xz(b"a\n") + b"more",
            "the file must end, or go on with b'\\xfd7zXZ\\x00'. Received: b'more'.",
        ),
        (
            "a.gz",
            gzip.compress(b"a\n") + b"more",
            "the file must end, or go on with b'\\x1f\\x8b'. Received: b'mo'.",
        ),
        (
            "a.gz",
            gzip.compress(b"a\n")[:-2],
            "a.gz: damaged behind line 1: the stream that begins at byte 0 must e",
        ),
        (
            "a.txt",
            "a b\n".encode("UTF-16LE"),
            "a.txt: must be UTF-8. Received: what looks like UTF-16LE, from line",
        ),
        (
            "a.txt",
            "a b\n".encode("UTF-16"),
            "a.txt: must be UTF-8. Received: the byte order mark of UTF-16. Conve",
        ),
    ],
)
def test_text_that_would_be_lost_is_refused(texts, name, content, message):
    (texts / name).write_bytes(content)
    before = sorted(texts.rglob("*"))
    result = prepare(f"--train={name}", *THREE[1:], "--output=out", cwd=texts)
    assert (result.returncode, result.stdout) == (2, "")
    assert message in result.stderr
    assert sorted(texts.rglob("*")) == before


def test_padded_streams_are_read_whole(texts):
    (texts / "a.xz").write_bytes(xz(b"a\n") + bytes(8) + xz(b"b\n") + bytes(4))
    result = prepare("--train=a.xz", *THREE[1:], "--output=out", cwd=texts)
    assert result.stdout.splitlines()[1].startswith("train 4 tokens, 2 lines")


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
        (
            ["--output=out", "--train=train.txt,", *THREE[1:]],
            "may be empty. Received: 'train.txt,'. Remove a comma",
        ),
        (["--output=out", '--train="train.txt', *THREE[1:]], "a name with a comma be in double quotes"),
        (["--output=out", *THREE, "--min_count=0"], "Received: min_count=0. Use 1 to keep all."),
        (["--output=out", *THREE, "--vocab_size=2"], "vocab_size must be at least 3"),
        (["--output=out", *THREE, "--vocab_size=many"], "--vocab_size=many"),
        (["--output=out", *THREE, "--vocabulary=9"], "Unknown command line flag 'vocabulary'"),
        (["--output=out", *THREE[:2], "--test=tset.txt"], "test: no such file. Received: 'tset.txt'"),
        (["--output=out", *THREE[:2], "--test=*.md"], "test: no file matches. Received: '*.md'"),
        (["--output=train.txt", *THREE], "output must be a directory. Received: 'train.txt'"),
        (
            ["--output=train.txt/out", *THREE],
            "train.txt/out: the output cannot be written there: train.txt is a file. Choose another output.",
        ),
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
