"""Streams of lines from real files, plain and compressed, sound and damaged."""

import gzip
import lzma
import random
import tarfile
import time

import pytest

from lmscale.data import text_files
from lmscale.data.text_files import expand_patterns, read_blocks, read_text

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


def test_a_whole_text(tmp_path, small_blocks):
    """Cuts at blanks leave no trace, and neither do the mark and carriage returns."""
    path = tmp_path / "text"
    path.write_bytes("\ufeff".encode() + TEXT.encode() + b" word" * 99)
    assert read_text(path) == TEXT.replace("\r\n", "\n") + " word" * 99 + "\n"


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


@pytest.mark.parametrize("block_bytes", [10, 1 << 20])
@pytest.mark.parametrize("padding", [0, 4, 12])
@pytest.mark.parametrize("compress", [gzip.compress, lzma.compress])
def test_several_streams_are_one_text(tmp_path, monkeypatch, compress, padding, block_bytes):
    monkeypatch.setattr(text_files, "BLOCK_BYTES", block_bytes)
    path = tmp_path / "text"
    path.write_bytes(
        compress(b"one\ntw") + bytes(padding) + compress(b"o\n") + bytes(padding) + compress(b"three")
    )
    assert lines_of(path) == ["one", "two", "three"]


@pytest.mark.parametrize("compress", [gzip.compress, lzma.compress])
def test_what_stands_behind_a_stream_is_not_passed_over(tmp_path, compress):
    path = tmp_path / "text"
    good = compress(b"one\ntwo\n")
    for behind, message in [
        (b"garbage", rf"behind line 2: at byte {len(good)} the file must end.* Received: b'ga"),
        (
            compress(b"three\n")[:-3],
            rf"behind line [23]: the stream that begins at byte {len(good)} must end",
        ),
    ]:
        path.write_bytes(good + behind)
        with pytest.raises(ValueError, match=message):
            list(read_blocks(path))


def test_xz_padding_must_be_a_multiple_of_four(tmp_path):
    path = tmp_path / "text.xz"
    good = lzma.compress(b"one\n")
    path.write_bytes(good + bytes(3) + good)
    with pytest.raises(ValueError, match=rf"text.xz: damaged .* at byte {len(good)} must be a multiple of 4"):
        list(read_blocks(path))


def test_an_archive_of_files_is_not_text(tmp_path):
    (tmp_path / "a").write_text("text\n")
    for mode, name in (("w", "a.txt"), ("w:gz", "a.tar.gz"), ("w:xz", "a.tar.xz")):
        with tarfile.open(tmp_path / name, mode) as archive:
            archive.add(tmp_path / "a", "a")
        with pytest.raises(ValueError, match=f"{name}: must be text. Received: a tar archive. Unpack it"):
            list(read_blocks(tmp_path / name))


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
@pytest.mark.parametrize(
    "text",
    [
        "the cat sat\non a mat\n",
        "Чай, да\nЮля\n",
        "naïve café\n",
        "x",
        "ਪੰਜਾਬੀ ਭਾਸ਼ਾ ਬੋਲੀ ਹੈ\n" * 9,
        "ਪ is a letter\n",
    ],
)
@pytest.mark.parametrize("encoding", ["UTF-16LE", "UTF-16BE", "UTF-32LE", "UTF-32BE"])
def test_wide_encodings_are_named(tmp_path, encoding, text, compress):
    path = tmp_path / "text"
    path.write_bytes(compress(text.encode(encoding)))
    message = f"text: must be UTF-8. Received: what looks like {encoding}, .* iconv -f {encoding} -t UTF-8"
    with pytest.raises(ValueError, match=message):
        list(read_blocks(path))
    path.write_bytes(compress(f"\ufeff{text}".encode(encoding)))
    marked = encoding[:-2]
    with pytest.raises(
        ValueError, match=f"Received: the byte order mark of {marked}. .* iconv -f {marked} -t UTF-8"
    ):
        list(read_blocks(path))


def test_wide_encodings_are_found_further_on(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "BLOCK_BYTES", 100)
    path = tmp_path / "text"
    path.write_bytes(b"plain line\n" * 50 + ("wide line\n" * 50).encode("UTF-16LE"))
    with pytest.raises(ValueError, match=r"what looks like UTF-16.., from line \d+ on"):
        list(read_blocks(path))


@pytest.mark.parametrize(
    "text", ["one\0two\n", "a b\0c d\n\0", "x\n\0y\nz\n\0" * 3, "aaa\n\0bbb\n\0cc\n\0", "a" * 99 + "\0" * 400]
)
def test_stray_zero_bytes_are_text(tmp_path, text):
    path = tmp_path / "text"
    path.write_text(text)
    assert "\n".join(lines_of(path)) == text.removesuffix("\n")


def test_a_few_zero_bytes_in_a_large_text_are_text(tmp_path):
    """Also where they stand as in UTF-16 in the last block, which is short."""
    path = tmp_path / "text"
    lines = ["some words of a line"] * 49_932 + ["a\0a\0a\0"]
    path.write_text("\n".join(lines))
    assert lines_of(path) == lines


def test_text_with_the_mark_of_tar_is_text(tmp_path):
    path = tmp_path / "text"
    for text in ("x" * 257 + "ustar", "x" * 257 + "ustar  \0" + "y" * 1000):
        path.write_text(text)
        assert lines_of(path) == [text]


@pytest.mark.parametrize("compress", ["one stream", "many members"])
def test_text_without_blanks_is_read_in_linear_time(tmp_path, compress):
    content = random.Random(0).randbytes(4 << 20).hex().encode()
    path = tmp_path / "text"
    size = len(content) if compress == "one stream" else 500
    starts = range(0, len(content), size)
    path.write_bytes(b"".join(gzip.compress(content[start : start + size], 1) for start in starts))
    before = time.process_time()
    assert lines_of(path) == [content.decode()]
    assert time.process_time() - before < 1.5


def test_what_comes_before_damage_is_handed_out(tmp_path):
    path = tmp_path / "text.gz"
    path.write_bytes(gzip.compress(b"one\ntwo\nthr") + b"more")
    blocks = read_blocks(path)
    assert next(blocks).lines == ["one", "two"]
    with pytest.raises(ValueError, match="damaged behind line 2"):
        next(blocks)


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
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "a.bz2").write_text("x\n")
    for patterns, message in [
        (["missing"], "train: no such file. Received: '.*missing'"),
        (["*.nothing"], r"train: no file matches. Received: '.*\*.nothing'"),
        (["empty"], "empty' is empty"),
        ([""], "regular files. Received: '.*', a directory. Name the files in it"),
        (["nowhere"], "regular files. Received: '.*nowhere', a link that leads to no file. Mend"),
        (["no*"], "regular files. Received: '.*nowhere', a link that leads to no file. Mend"),
        (["loop"], "regular files. Received: '.*loop', a link that leads to no file. Mend"),
        (["loop/x"], "train: no such file. Received: '.*loop/x'"),
        (["a", "a"], "once. Received twice: '.*a'"),
        (["a", "link"], "once. Received twice: '.*link'"),
        (["a.bz2"], ".bz2 is not read"),
    ]:
        with pytest.raises(ValueError, match=message):
            expand_patterns([f"{tmp_path}/{pattern}" for pattern in patterns], flag="train")
    with pytest.raises(
        ValueError, match=r"train: no name in the list may be empty. Received: 'a,'. Remove a comma"
    ):
        expand_patterns(["a", ""], flag="train")
    with pytest.raises(ValueError, match="train must name at least one file"):
        expand_patterns([], flag="train")
    with pytest.raises(ValueError, match="a pipe or device"):
        expand_patterns(["/dev/null"], flag="train")
