"""Compressed files made of several streams, sound and damaged at every place."""

import contextlib
import gzip
import io
import lzma
import random
import shutil
import subprocess
import tracemalloc
import zlib

import pytest

from lmscale.data.compressed_files import GzipReader, XzReader

READERS = {
    "xz": (lzma.compress, XzReader),
    "gzip": (lambda content: gzip.compress(content, mtime=0), GzipReader),
}
CONTENTS = [b"first line\n", b"", b"second line\n" * 50, bytes(range(256)) * 8]


@pytest.fixture(params=sorted(READERS))
def form(request):
    return request.param


def decompressed(data, form, *, size=1 << 20):
    """All that is read of a file, by so many bytes at a time."""
    reader = READERS[form][1](io.BytesIO(data))
    blocks = []
    while block := reader.read(size):
        assert len(block) <= size
        blocks.append(block)
    assert reader.read(size) == b""
    return b"".join(blocks)


@pytest.mark.parametrize("size", [1, 100, 1 << 20])
@pytest.mark.parametrize("padding", [0, 4, 8, 1 << 15])
def test_streams_and_padding(form, size, padding):
    streams = [READERS[form][0](content) + bytes(padding) for content in CONTENTS]
    assert decompressed(b"".join(streams), form, size=size) == b"".join(CONTENTS)


def test_gzip_padding_of_any_length():
    data = gzip.compress(b"a\n") + bytes(3) + gzip.compress(b"b\n") + bytes(1)
    assert decompressed(data, "gzip") == b"a\nb\n"


@pytest.mark.parametrize("behind", [b"", lzma.compress(b"b\n")])
@pytest.mark.parametrize("padding", [1, 2, 3, 5, (1 << 14) + 1])
def test_xz_padding_of_another_length(padding, behind):
    data = lzma.compress(b"a\n")
    message = rf"zero bytes at byte {len(data)} must be a multiple of 4. Received: {padding:,}\."
    with pytest.raises(ValueError, match=message):
        decompressed(data + bytes(padding) + behind, "xz")


@pytest.mark.parametrize("padding", [0, 4])
@pytest.mark.parametrize("garbage", [b"x", b"garbage behind the end", b"\xfd7zXZ\x01", b"\x1f\x8c"])
def test_garbage_behind_a_stream(form, garbage, padding):
    data = READERS[form][0](b"a\n") + bytes(padding)
    with pytest.raises(
        ValueError, match=rf"at byte {len(data)} the file must end, or go on with .*Received: b'"
    ):
        decompressed(data + garbage, form)


def test_the_other_form_behind_a_stream():
    first = lzma.compress(b"a\n")
    with pytest.raises(ValueError, match=rf"at byte {len(first)} the file must end.*Received: b'\\x1f\\x8b"):
        decompressed(first + gzip.compress(b"b\n"), "xz")


def test_cut_off_at_every_place(form):
    streams = [READERS[form][0](content) for content in (b"first\n", b"second\n")]
    data = streams[0] + bytes(8) + streams[1]
    begin = len(streams[0]) + 8
    unit = READERS[form][1].padding_unit
    for length in range(len(READERS[form][1].magic), len(data)):
        if len(streams[0]) <= length <= begin and (length - len(streams[0])) % unit == 0:
            assert decompressed(data[:length], form) == b"first\n"
        else:
            with pytest.raises(ValueError, match=r"must end|multiple of 4"):
                decompressed(data[:length], form)
    for cut in (begin + 10, len(data) - 1):
        with pytest.raises(
            ValueError, match=rf"begins at byte {begin} must end. Received: .* at byte {cut}\."
        ):
            decompressed(data[:cut], form)


def test_damage_at_every_place_is_found(form):
    """Any byte changed: an error, or the same content (gzip does not check the time and system in its header)."""
    rng = random.Random(0)
    streams = [READERS[form][0](content) for content in (b"first\n", b"second\n", b"third\n")]
    data = b"".join(streams)
    read = []
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= rng.randrange(1, 256)
        with contextlib.suppress(ValueError):
            read.append(decompressed(bytes(damaged), form))
    assert set(read) <= {b"first\nsecond\nthird\n"}
    assert len(read) <= (0 if form == "xz" else 3 * 8)


def test_damage_names_the_stream_and_a_bound(form):
    first, second = (READERS[form][0](random.Random(n).randbytes(100_000)) for n in (1, 2))
    damaged = bytearray(first + second)
    for place in range(len(first) + 50_000, len(first) + 50_100):
        damaged[place] ^= 0x55
    with pytest.raises(ValueError, match=rf"in the stream that begins at byte {len(first):,}: ") as caught:
        decompressed(bytes(damaged), form, size=1000)
    bound = int(str(caught.value).split("before byte ")[1].split(", in")[0].replace(",", ""))
    assert len(first) + 50_000 < bound <= len(damaged)


def test_gzip_checksum_and_length():
    data = bytearray(gzip.compress(b"text\n"))
    for place, message in ((-8, "incorrect data check"), (-4, "incorrect length check")):
        damaged = bytearray(data)
        damaged[place] ^= 1
        with pytest.raises(ValueError, match=message):
            decompressed(bytes(damaged), "gzip")


def test_memory_is_bounded(form):
    compress, reader_class = READERS[form]
    data = compress(bytes(1 << 26))  # 64 MiB of zeros in a few KiB.
    reader = reader_class(io.BytesIO(data))
    tracemalloc.start()
    length = 0
    while block := reader.read(1 << 16):
        length += len(block)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert length == 1 << 26
    assert peak < 1 << 24  # xz's dictionary takes 8 MiB.


def test_the_file_stands_behind_what_was_read(form):
    streams = [READERS[form][0](content) for content in CONTENTS]
    raw = io.BytesIO(b"".join(streams))
    reader, places = READERS[form][1](raw), []
    while reader.read(1 << 20):
        places.append(raw.tell())
    assert places == sorted(places)
    assert raw.tell() == len(raw.getvalue())


def test_many_small_streams(form):
    data = READERS[form][0](b"line\n") * 5000
    assert decompressed(data, form) == b"line\n" * 5000


def test_like_the_programs(form, tmp_path):
    if not shutil.which(form):
        pytest.skip(f"{form} is not installed")
    path = tmp_path / "file"
    first, second = b"one\n" * 1000, random.Random(0).randbytes(1 << 16).hex().encode()
    parts = [
        subprocess.run([form, "-c"], input=c, capture_output=True, check=True).stdout for c in (first, second)
    ]
    path.write_bytes(parts[0] + bytes(8 if form == "xz" else 0) + parts[1] + bytes(4))
    theirs = subprocess.run([form, "-dc"], stdin=path.open("rb"), capture_output=True, check=False)
    assert theirs.returncode in (0, 2)  # gzip mentions the zeros, and exits with 2.
    assert decompressed(path.read_bytes(), form) == theirs.stdout == first + second


def test_optional_fields_of_gzip_headers():
    deflate = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    body = deflate.compress(b"text\n") + deflate.flush()
    trailer = zlib.crc32(b"text\n").to_bytes(4, "little") + (5).to_bytes(4, "little")
    extra, name, comment = b"\x03\x00abc", b"name\0", b"comment\0"
    header = b"\x1f\x8b\x08\x1c" + bytes(6) + extra + name + comment
    assert decompressed(header + body + trailer, "gzip") == b"text\n"
