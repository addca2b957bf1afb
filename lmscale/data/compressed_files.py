"""Decompression of gzip and xz files in which every byte of the file counts.

Python's `lzma` module reads the first stream of a file and takes what it cannot read behind it for the end, without
a word: zero padding, a damaged later stream, anything appended. The readers here read all streams, skip the padding
that the formats allow, and refuse the rest by its byte offset.

Sources: the .xz file format 1.2.1, sections 2 and 2.2; RFC 1952, section 2.2; the manual of gzip on zero padding.
"""

import abc
import lzma
import zlib
from typing import BinaryIO, ClassVar

# Behind each stream up to this much is read twice: small, for files of many small streams.
_INPUT_BYTES = 1 << 14


class _Reader(abc.ABC):
    """The content of a file that holds compressed streams, one after the other, and zero padding behind each.

    Attributes:
      magic: how each stream begins.
      padding_unit: padding has a multiple of so many bytes.
      tool: the program that checks such a file.
    """

    magic: ClassVar[bytes]
    padding_unit: ClassVar[int]
    tool: ClassVar[str]

    def __init__(self, raw: BinaryIO):
        """Takes a file that stands at its beginning, which must be `magic`."""
        self._raw = raw
        self._begin_stream()

    def read(self, size: int) -> bytes:
        """Some bytes, `size` at most; none at the end. The file never stands behind what was decoded.

        Raises:
          ValueError: if the file is damaged, cut off, or holds anything but streams and padding; naming the
            byte offset.
        """
        content = b""
        while not content and not self._at_end:
            if self._decoder.eof:  # Only now, so that what is wrong there does not hide what came before.
                self._enter_next_stream()
                continue
            content = self._decode(size)
            if self._decoder.eof:
                self._raw.seek(-len(self._decoder.unused_data), 1)
        return content

    @abc.abstractmethod
    def _new_decoder(self):
        """A decoder of one stream, which checks its checksums; it has `eof` and `unused_data`."""

    @abc.abstractmethod
    def _decode(self, size: int) -> bytes:
        """At most `size` more bytes of the stream; perhaps none yet."""

    def _begin_stream(self):
        self._start = self._raw.tell()
        self._decoder = self._new_decoder()
        self._at_end = False

    def _enter_next_stream(self):
        padding_start = self._raw.tell()
        while block := self._raw.read(_INPUT_BYTES):
            if content := block.lstrip(b"\0"):
                self._raw.seek(-len(content), 1)
                break
        start = self._raw.tell()
        following = self._raw.read(len(self.magic))
        self._raw.seek(start)
        padding = start - padding_start
        if padding % self.padding_unit:
            raise ValueError(
                f"the zero bytes at byte {padding_start:,} must be a multiple of {self.padding_unit}. "
                f"Received: {padding:,}. {self._advice()}"
            )
        if following == self.magic:
            self._begin_stream()
        elif following:
            raise ValueError(
                f"at byte {start:,} the file must end, or go on with {self.magic!r}. Received: {following!r}. "
                f"{self._advice()}"
            )
        else:
            self._at_end = True

    def _damage(self, error: Exception) -> ValueError:
        return ValueError(
            f"at or before byte {self._raw.tell():,}, in the stream that begins at byte {self._start:,}: "
            f"{error}. {self._advice()}"
        )

    def _cut_off(self) -> ValueError:
        return ValueError(
            f"the stream that begins at byte {self._start:,} must end. Received: the end of the file, at byte "
            f"{self._raw.tell():,}. {self._advice()}"
        )

    def _advice(self) -> str:
        return f"Get the file again, and check it with {self.tool} -t."


class XzReader(_Reader):
    """What `xz --decompress` gives of a file."""

    magic = b"\xfd7zXZ\x00"
    padding_unit = 4
    tool = "xz"

    def _new_decoder(self):
        return lzma.LZMADecompressor(format=lzma.FORMAT_XZ)

    def _decode(self, size):
        compressed = b""
        if self._decoder.needs_input and not (compressed := self._raw.read(_INPUT_BYTES)):
            raise self._cut_off()
        try:
            return self._decoder.decompress(compressed, size)
        except lzma.LZMAError as error:
            raise self._damage(error) from error


class GzipReader(_Reader):
    """What `gzip --decompress` gives of a file, and members behind zeros, which that leaves out with a warning."""

    magic = b"\x1f\x8b"
    padding_unit = 1
    tool = "gzip"

    def _new_decoder(self):
        return zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)  # With header, CRC and length of gzip.

    def _decode(self, size):
        compressed = self._decoder.unconsumed_tail or self._raw.read(_INPUT_BYTES)
        try:
            content = self._decoder.decompress(compressed, size)
        except zlib.error as error:
            raise self._damage(error) from error
        if not (compressed or content or self._decoder.eof):
            raise self._cut_off()
        return content
