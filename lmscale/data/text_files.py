"""Text as a stream of blocks of lines, from plain, gzip or xz files, in bounded memory."""

import dataclasses
import glob
import gzip
import lzma
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from lmscale.paths import expand

BLOCK_BYTES = 1 << 20
_BLANKS = (b" ", b"\t")
_GZIP, _XZ = b"\x1f\x8b", b"\xfd7zXZ\x00"
_MAGIC_OF_SUFFIX = {".gz": _GZIP, ".xz": _XZ}
_UNREADABLE_SUFFIXES = (".bz2", ".zst", ".zip", ".7z", ".lz4", ".tar", ".tgz")


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
      patterns: paths or globs (`*`, `?`, `[...]`, `**`); `~` is expanded.
      flag: what the user calls them, for the messages.
    Raises:
      ValueError: if there is none, a glob matches nothing, or a file is missing, empty, not a regular
        file, or named twice.
    """
    paths: list[Path] = []
    for pattern in map(expand, patterns):
        if Path(pattern).exists():
            paths.append(Path(pattern))
        elif glob.has_magic(pattern):
            matches = sorted(Path(match) for match in glob.glob(pattern, recursive=True))
            paths.extend(match for match in matches if not match.is_dir())
            if not any(not match.is_dir() for match in matches):
                raise ValueError(f"{flag}: no file matches. Received: {pattern!r}. Quote globs in the shell.")
        else:
            raise ValueError(f"{flag}: no such file. Received: {pattern!r}. Give an existing file or a glob.")
    if not paths:
        raise ValueError(f"{flag} must name at least one file. Received: {','.join(patterns)!r}.")
    for path in paths:
        if not path.is_file():
            kind = "a directory" if path.is_dir() else "a pipe or device, and text is read twice"
            raise ValueError(f"{flag} must name regular files. Received: {str(path)!r}, {kind}.")
        if path.stat().st_size == 0:
            raise ValueError(f"{flag}: {str(path)!r} is empty (0 bytes). Remove it from the list or fill it.")
        if path.suffix in _UNREADABLE_SUFFIXES:
            raise ValueError(
                f"{flag}: {path.suffix} is not read. Received: {str(path)!r}. Use text, .gz or .xz."
            )
    resolved = [path.resolve() for path in paths]
    for position, path in enumerate(resolved):
        if path in resolved[:position]:
            raise ValueError(f"{flag} must name each file once. Received twice: {str(paths[position])!r}.")
    return paths


def read_blocks(path: Path, *, on_bytes: Callable[[int], None] = lambda count: None) -> Iterator[Block]:
    """Streams a UTF-8 text file; gzip and xz are told by their first bytes.

    Lines end at line feeds only (a carriage return before one is dropped), and a last line without line feed
    counts as a line. A byte order mark at the start is skipped. Memory stays within a few MiB unless a single
    stretch without any blank is longer than that.

    Args:
      path: a regular file.
      on_bytes: called with the number of bytes read from disk since the last call.
    Raises:
      ValueError: if the file is damaged or empty, or not UTF-8, naming the line.
    """
    with path.open("rb") as raw:
        stream = _decompressed(raw, path)
        position = 0
        lines_before = 0
        rest = b""
        at_start = True
        at_end = False
        while not at_end:
            try:
                data = stream.read(BLOCK_BYTES)
            except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
                raise ValueError(f"{path}: damaged behind line {lines_before:,}: {error}.") from error
            on_bytes(raw.tell() - position)
            position = raw.tell()
            at_end = not data
            data = rest + data
            if at_start and data.startswith(b"\xef\xbb\xbf"):
                data = data[3:]
            cut = len(data) if at_end else _last_cut(data)
            data, rest = data[:cut], data[cut:]
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
            raise ValueError(f"{path}: holds no text. Remove it from the list or fill it.")


def _last_cut(data: bytes) -> int:
    """Where to cut: behind the last line end; in a longer line, before its last blank; if neither, at 0."""
    line_end = data.rfind(b"\n") + 1
    return line_end or max(max(data.rfind(blank) for blank in _BLANKS), 0)


def _decompressed(raw: BinaryIO, path: Path) -> BinaryIO:
    start = raw.read(6)
    raw.seek(0)
    expected = _MAGIC_OF_SUFFIX.get(path.suffix)
    if expected and not start.startswith(expected):
        raise ValueError(
            f"{path}: must be a {path.suffix} file by its name. Received: first bytes {start!r}. "
            "Rename or remake it."
        )
    if start.startswith(_GZIP):
        return gzip.open(raw)  # type: ignore[return-value]
    if start.startswith(_XZ):
        return lzma.open(raw)  # type: ignore[return-value]
    return raw
