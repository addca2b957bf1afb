"""Text as a stream of blocks of lines, from plain, gzip or xz files, in bounded memory."""

import codecs
import contextlib
import dataclasses
import glob
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from lmscale.data.compressed_files import GzipReader, XzReader

BLOCK_BYTES = 1 << 20
_BLANKS = (b" ", b"\t")
_READERS = {".gz": GzipReader, ".xz": XzReader}
_UNREADABLE_SUFFIXES = (".bz2", ".zst", ".zip", ".7z", ".lz4", ".tar", ".tgz", ".txz", ".lzma")
_MARKS = {  # The longer ones first: that of UTF-32LE begins with that of UTF-16LE.
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
_TAR_MAGIC_PLACE = 257
_SAMPLE_BYTES = 1 << 16
_ASCII_BLANKS = b" \n"
_LEADS_NOWHERE = "a link that leads to no file. Mend or remove it."


@dataclasses.dataclass(frozen=True)
class Block:
    """Some lines of a text, without their line ends.

    Attributes:
      lines: at least one.
      ends_line: False if the last line goes on in the next block: a line longer than a block is cut at
        a blank.
    """

    lines: list[str]
    ends_line: bool


def expand_patterns(patterns: Sequence[str], *, flag: str) -> list[Path]:
    """Files named by paths and globs: in the order given, those of a glob sorted by name.

    Args:
      patterns: paths or globs (`*`, `?`, `[...]`, `**`).
      flag: what the user calls them, for the messages.
    Raises:
      ValueError: if there is none, a glob matches nothing, or a file is missing, empty, not a regular
        file, or named twice.
    """
    if "" in patterns:
        raise ValueError(
            f"{flag}: no name in the list may be empty. Received: {','.join(patterns)!r}. Remove a comma."
        )
    paths: list[Path] = []
    for pattern in patterns:
        if Path(pattern).exists():
            paths.append(Path(pattern))
        elif glob.has_magic(pattern):
            matches = sorted(Path(match) for match in glob.glob(pattern, recursive=True))
            paths.extend(match for match in matches if not match.is_dir())
            if not any(not match.is_dir() for match in matches):
                raise ValueError(f"{flag}: no file matches. Received: {pattern!r}. Quote globs in the shell.")
        elif Path(pattern).is_symlink():
            raise ValueError(f"{flag} must name regular files. Received: {pattern!r}, {_LEADS_NOWHERE}")
        else:
            raise ValueError(f"{flag}: no such file. Received: {pattern!r}. Give an existing file or a glob.")
    if not paths:
        raise ValueError(
            f"{flag} must name at least one file. Received: {','.join(patterns)!r}. Give a file or a glob."
        )
    for path in paths:
        if not path.is_file():
            kind = "a pipe or device, and text is read twice. Make a file of it."
            if path.is_dir():
                kind = "a directory. Name the files in it, with a glob for instance."
            elif not path.exists():
                kind = _LEADS_NOWHERE
            raise ValueError(f"{flag} must name regular files. Received: {str(path)!r}, {kind}")
        if path.stat().st_size == 0:
            raise ValueError(f"{flag}: {str(path)!r} is empty (0 bytes). Fill it, or leave it out.")
        if path.suffix in _UNREADABLE_SUFFIXES:
            raise ValueError(
                f"{flag}: {path.suffix} is not read. Received: {str(path)!r}. Use text, .gz or .xz."
            )
    resolved = [path.resolve() for path in paths]
    for position, path in enumerate(resolved):
        if path in resolved[:position]:
            raise ValueError(
                f"{flag} must name each file once. Received twice: {str(paths[position])!r}. Remove one."
            )
    return paths


def read_blocks(path: Path, *, on_bytes: Callable[[int], None] = lambda count: None) -> Iterator[Block]:
    """Streams a UTF-8 text file; gzip and xz are told by their first bytes.

    Lines end at line feeds only (a carriage return before one is dropped), and a last line without line feed
    counts as a line. A byte order mark at the start is skipped. Memory stays within a few MiB unless a single
    stretch without any blank is longer than that. NUL and other control characters are text like any other.

    Args:
      path: a regular file.
      on_bytes: called with the number of bytes read from disk since the last call.
    Raises:
      ValueError: if the file is damaged, naming the byte; or empty, an archive of files, or not UTF-8, naming
        the line. Text of UTF-16 or UTF-32 is named as such, also where its bytes happen to be UTF-8.
    """
    with path.open("rb") as raw:
        stream = decompressed(raw, path)
        position = 0
        lines_before = 0
        held: list[bytes] = []  # What was read behind the last cut; it is not searched again.
        before = b""  # The last bytes that were read before, whether cut off or not.
        at_start = True
        at_end = False
        damage: Exception | None = None
        while not at_end:
            if damage is None:
                data, damage = read_full(stream, max(BLOCK_BYTES, tarfile.BLOCKSIZE if at_start else 1))
            else:
                data = b""
            if damage is not None and not data:  # What came before is handed out first.
                message = str(damage).rstrip(".")
                raise ValueError(f"{path}: damaged behind line {lines_before:,}: {message}.") from damage
            on_bytes(raw.tell() - position)
            position = raw.tell()
            at_end = not data
            if at_start and not held:
                check_start(data, path)
                data = data.removeprefix(codecs.BOM_UTF8)
            if b"\0" in data and (encoding := _wide_encoding(before + data)):
                shown = f"what looks like {encoding}, from line {lines_before + 1:,} on"
                raise _wide_encoding_error(path, encoding, shown)
            before = (before + data[-_SAMPLE_BYTES:])[-_SAMPLE_BYTES:]
            cut = len(data) if at_end else _last_cut(data)
            if cut is None or (cut == 0 and not held):
                held.append(data)
                continue
            held.append(data[:cut])
            data, held = b"".join(held), [data[cut:]] if cut < len(data) else []
            if not data:
                continue
            at_start = False
            try:
                text = data.decode("utf-8")
            except UnicodeDecodeError as error:
                number = lines_before + data.count(b"\n", 0, error.start) + 1
                column = error.start - (data.rfind(b"\n", 0, error.start) + 1)
                wrong = f"byte 0x{data[error.start]:02x} at byte {column + 1} of the line"
                raise ValueError(
                    f"{path}, line {number}: must be UTF-8. Received: {wrong}. "
                    "Convert the file, for instance with iconv -t UTF-8."
                ) from error
            lines_before += data.count(b"\n")
            lines = text.replace("\r\n", "\n").split("\n")
            ends_line = lines[-1] == ""
            if ends_line:
                lines.pop()
            yield Block(lines, ends_line=ends_line or at_end)
        if at_start:
            raise ValueError(f"{path}: holds no text. Fill it, or leave it out.")


def read_text(path: Path) -> str:
    """A whole text, as `read_blocks` reads it; for lists of words and their like."""
    return "".join("\n".join(block.lines) + ("\n" if block.ends_line else "") for block in read_blocks(path))


def read_full(stream, size: int) -> tuple[bytes, Exception | None]:
    """What is read until there are `size` bytes, the end or an error, as decoders may give little at a time."""
    pieces: list[bytes] = []
    missing = size
    try:
        while missing and (piece := stream.read(missing)):
            pieces.append(piece)
            missing -= len(piece)
    except (ValueError, OSError) as error:
        return b"".join(pieces), error
    return b"".join(pieces), None


def _last_cut(data: bytes) -> int | None:
    """Where to cut: behind the last line end; in a longer line, before its last blank; None if there is neither."""
    line_end = data.rfind(b"\n") + 1
    blank = max(map(data.rfind, _BLANKS))
    return line_end or (blank if blank >= 0 else None)


def decompressed(raw: BinaryIO, path: Path):
    """The content of a plain, gzip or xz file that stands at its beginning: `read(size)` gives some bytes of it.

    Raises:
      ValueError: if the name says that it is compressed and its first bytes do not.
    """
    start = raw.read(6)
    raw.seek(0)
    named = _READERS.get(path.suffix)
    if named and not start.startswith(named.magic):
        raise ValueError(
            f"{path}: must be a {path.suffix} file by its name. Received: first bytes {start!r}. "
            "Rename or remake it."
        )
    for reader in _READERS.values():
        if start.startswith(reader.magic):
            return reader(raw)
    return raw


def check_start(data: bytes, path: Path):
    """Raises ValueError if the first `tarfile.BLOCKSIZE` bytes of a file, or more, are of UTF-16, UTF-32 or tar."""
    for mark, encoding in _MARKS.items():
        if data.startswith(mark):
            raise _wide_encoding_error(path, encoding, f"the byte order mark of {encoding}")
    if data.startswith(b"ustar", _TAR_MAGIC_PLACE):
        with contextlib.suppress(tarfile.HeaderError):  # Text that has the word there; it has no checksum.
            tarfile.TarInfo.frombuf(data[: tarfile.BLOCKSIZE], "utf-8", "surrogateescape")
            raise ValueError(f"{path}: must be text. Received: a tar archive. Unpack it and give its files.")


def _wide_encoding_error(path: Path, encoding: str, received: str) -> ValueError:
    return ValueError(
        f"{path}: must be UTF-8. Received: {received}. "
        f"Convert the file: iconv -f {encoding} -t UTF-8 OLD > NEW."
    )


def _wide_encoding(data: bytes) -> str | None:
    """UTF-16LE, UTF-16BE, UTF-32LE or UTF-32BE, if the zero bytes stand as they do in such text.

    In UTF-32 two neighbours of each four bytes are zero. In UTF-16 every other byte is, in Latin script; in
    other scripts still that of every blank and line feed, as these are zero-extended ASCII; the low bytes of a few
    letters are those of blanks, too.
    """
    start = max(min(data.find(0), len(data) - _SAMPLE_BYTES), 0) // 4 * 4
    data = data[start : start + _SAMPLE_BYTES]
    quarter = max(len(data) // 4, 1)
    zero = [data[place::4].count(0) > 0.9 * quarter for place in range(4)]
    if zero[2] and zero[3] and not zero[0]:
        return "UTF-32LE"
    if zero[0] and zero[1] and not zero[3]:
        return "UTF-32BE"
    for encoding, high, low in (("UTF-16LE", data[1::2], data[::2]), ("UTF-16BE", data[::2], data[1::2])):
        num_zeros = high.count(0)
        if not num_zeros or low.count(0) > 0.1 * num_zeros:
            continue
        blanks = [byte for byte, above in zip(low, high, strict=False) if byte in _ASCII_BLANKS and not above]
        num_blanks = sum(map(low.count, _ASCII_BLANKS))
        if num_zeros > 0.5 * len(high) or len(blanks) > max(0.7 * num_blanks, 1):
            return encoding
    return None
