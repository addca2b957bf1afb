"""Streams of lines from real files, plain and compressed, sound and damaged."""

import gzip
import lzma
import random

import pytest

from lmscale.data import text_files
from lmscale.data.text_files import expand_patterns, read_blocks

TEXT = "one two\n\n  three\n" + "".join(f"line {i} ü 日本 \u2028 x\r\n" for i in range(2000)) + "no line end"
LINES = TEXT.replace("\r\n", "\n").split("\n")


def lines_of(path):
    """Lines put together again from the blocks."""
    lines, open_line = [], ""
    for block in read_blocks(path):
        assert block.lines
        *whole, last = block.lines
        for line in whole:
            lines.append(open_line + line)
            open_line = ""
        open_line += last
        if block.ends_line:
            lines.append(open_line)
            open_line = ""
    assert open_line == ""
    return lines


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(text_files, "BLOCK_BYTES", 100)


@pytest.mark.parametrize("compress", [bytes, gzip.compress, lzma.compress])
@pytest.mark.parametrize("name", ["text", "text.txt"])
@pytest.mark.usefixtures("small_blocks")
def test_lines_plain_and_compressed(tmp_path, compress, name):
    path = tmp_path / name  # The form is told by the content.
    path.write_bytes(compress(TEXT.encode()))
    assert lines_of(path) == LINES


@pytest.mark.usefixtures("small_blocks")
def test_long_lines_are_cut_at_blanks_only(tmp_path):
    rng = random.Random(0)
    words = ["".join(rng.choices("abü日", k=rng.randint(1, 300))) for _ in range(300)]
    lines = [" ".join(words[:100]), "", " ".join(words[100:])]
    path = tmp_path / "text"
    path.write_text("\n".join(lines), encoding="utf-8")
    assert lines_of(path) == lines
    pieces = [piece for block in read_blocks(path) for line in block.lines for piece in line.split()]
    assert pieces == words


def test_mark_at_the_start_and_last_line_end(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(b"\xef\xbb\xbfa\nb\n")
    assert lines_of(path) == ["a", "b"]
    path.write_bytes(b"a\nb\n\n")
    assert lines_of(path) == ["a", "b", ""]


def test_bytes_read_are_reported(tmp_path):
    path = tmp_path / "text.xz"
    path.write_bytes(lzma.compress(random.Random(0).randbytes(1 << 18).hex().encode()))
    reported = []
    list(read_blocks(path, on_bytes=reported.append))
    assert sum(reported) == path.stat().st_size


@pytest.mark.parametrize("block_bytes", [10, 1 << 20])
def test_not_utf8_names_file_and_line(tmp_path, monkeypatch, block_bytes):
    monkeypatch.setattr(text_files, "BLOCK_BYTES", block_bytes)
    path = tmp_path / "latin1.txt"
    path.write_bytes(b"good\n" * 1000 + "naïve\n".encode("latin-1") + b"good\n" * 10)
    with pytest.raises(
        ValueError, match=r"latin1.txt, line 1001: must be UTF-8. Received: byte 0xef at byte 3"
    ):
        list(read_blocks(path))


@pytest.mark.parametrize("compress", [gzip.compress, lzma.compress])
def test_damaged_archives_are_named(tmp_path, compress):
    data = compress(random.Random(0).randbytes(1 << 16).hex().encode())
    path = tmp_path / "text"
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"text: damaged behind line 0"):
        list(read_blocks(path))
    path.write_bytes(data[:5000] + bytes(100) + data[5100:])
    with pytest.raises(ValueError, match=r"text: "):
        list(read_blocks(path))
    path.write_bytes(compress(b""))
    with pytest.raises(ValueError, match=r"text: holds no text"):
        list(read_blocks(path))


@pytest.mark.parametrize("suffix", [".gz", ".xz"])
def test_suffix_that_lies(tmp_path, suffix):
    path = tmp_path / f"text{suffix}"
    path.write_bytes(b"plain text")
    with pytest.raises(
        ValueError, match=rf"text\{suffix}: must be a \{suffix} file.*Received: first bytes b'plain"
    ):
        list(read_blocks(path))


def test_patterns(tmp_path):
    for name in ("b.txt", "a.txt", "c.md", "[x].txt", "sub/d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x\n")

    def names(*patterns):
        paths = expand_patterns([str(tmp_path / pattern) for pattern in patterns], flag="train")
        return [str(path.relative_to(tmp_path)) for path in paths]

    assert names("c.md", "?.txt") == ["c.md", "a.txt", "b.txt"]
    assert names("**/*.txt") == ["[x].txt", "a.txt", "b.txt", "sub/d.txt"]
    assert names("[x].txt") == ["[x].txt"]  # A file of that name comes before the glob.


def test_pattern_errors_name_what_was_received(tmp_path):
    (tmp_path / "empty").touch()
    (tmp_path / "a").write_text("x\n")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    (tmp_path / "a.bz2").write_text("x\n")
    for patterns, message in [
        (["missing"], "train: no such file. Received: '.*missing'"),
        (["*.nothing"], r"train: no file matches. Received: '.*\*.nothing'"),
        (["empty"], "empty' is empty"),
        ([""], "regular files. Received: '.*', a directory"),
        (["a", "a"], "once. Received twice: '.*a'"),
        (["a", "link"], "once. Received twice: '.*link'"),
        (["a.bz2"], ".bz2 is not read"),
    ]:
        with pytest.raises(ValueError, match=message):
            expand_patterns([f"{tmp_path}/{pattern}" for pattern in patterns], flag="train")
    with pytest.raises(ValueError, match="train must name at least one file"):
        expand_patterns([], flag="train")
    with pytest.raises(ValueError, match="a pipe or device"):
        expand_patterns(["/dev/null"], flag="train")


def test_home_directories(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("a")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand_patterns(["~/*.txt"], flag="train") == [tmp_path / "a.txt"]
