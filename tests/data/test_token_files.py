"""Prepared directories written by hand, whole and damaged."""

import hashlib
import json

import numpy as np
import pytest

from lmscale.data.token_files import PreparedData

TOKENS = ["a", "<eos>", "b", "<unk>"]
COUNTS = [5, 3, 1, 0]
SPLITS = {"train": [0, 1, 0, 0, 1, 2, 0, 0, 1], "valid": [3, 1], "test": [2, 1, 2]}


def write(directory, *, tokens=TOKENS, counts=COUNTS, splits=SPLITS, dtype="<u2", **changes):
    """A prepared directory, by the documented form alone."""
    directory.mkdir()
    contents = {"vocab.txt": "".join(f"{t}\t{c}\n" for t, c in zip(tokens, counts, strict=True)).encode()}
    contents |= {f"{name}.bin": np.array(ids, dtype).tobytes() for name, ids in splits.items()}
    for name, content in contents.items():
        (directory / name).write_bytes(content)

    def entry(name):
        content = contents[name]
        return {"file": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    manifest = {
        "format": "lmscale prepared data",
        "format_version": 1,
        "vocabulary": entry("vocab.txt") | {"size": len(tokens), "unk_id": 3, "eos_id": 1},
        "splits": {name: entry(f"{name}.bin") | {"tokens": len(ids)} for name, ids in splits.items()},
        **changes,
    }
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return directory


def test_reads_what_the_form_says(tmp_path):
    data = PreparedData.open(write(tmp_path / "data"))
    assert (data.vocab_size, data.eos_id, data.unk_id) == (4, 1, 3)
    assert data.vocabulary.tokens == tuple(TOKENS)
    assert data.counts.dtype == np.int64
    assert data.counts.tolist() == COUNTS
    for name, ids in SPLITS.items():
        assert data.split(name).tolist() == ids
        assert isinstance(data.split(name), np.memmap)
        assert not data.split(name).flags.writeable
    with pytest.raises(ValueError, match=r"train, valid, test. Received: 'dev'"):
        data.split("dev")


def test_ids_beyond_16_bits(tmp_path):
    tokens = [*TOKENS, *(f"t{i}" for i in range(65_533))]
    counts = COUNTS + [0] * 65_533
    splits = SPLITS | {"test": [65_536, 1]}
    data = PreparedData.open(
        write(tmp_path / "data", tokens=tokens, counts=counts, splits=splits, dtype="<i4")
    )
    assert data.split("test").tolist() == [65_536, 1]


def test_fingerprint_depends_on_vocabulary_and_ids_only(tmp_path):
    first = PreparedData.open(write(tmp_path / "1", options={"min_count": 1}))
    second = PreparedData.open(write(tmp_path / "2", options={"min_count": 2}))
    other_ids = PreparedData.open(write(tmp_path / "3", splits=SPLITS | {"valid": [2, 1]}))
    other_counts = PreparedData.open(write(tmp_path / "4", counts=[6, 3, 1, 0]))
    assert first.fingerprint == second.fingerprint
    assert len({first.fingerprint, other_ids.fingerprint, other_counts.fingerprint}) == 3


def overwrite(name, content):
    return lambda directory: (directory / name).write_bytes(content)


def edit_manifest(**changes):
    def damage(directory):
        path = directory / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "valid.bin").unlink(), r"valid\.bin: missing"),
        (lambda d: (d / "vocab.txt").unlink(), r"vocab\.txt: missing"),
        (lambda d: (d / "manifest.json").unlink(), r"manifest\.json: no such file.*lmscale\.prepare"),
        (overwrite("test.bin", b"\2\0\1\0"), r"test\.bin: must have 6 bytes.*Received: 4 bytes"),
        (overwrite("test.bin", b"\2\0\1\0\1\0"), r"test\.bin: must have SHA-256 .*Received: [0-9a-f]{64}"),
        (overwrite("vocab.txt", b"a\t5\n<eos>\t3\nc\t1\n<unk>\t0\n"), r"vocab\.txt: must have SHA-256"),
        (overwrite("manifest.json", b"{"), r"manifest\.json: not JSON"),
        (overwrite("manifest.json", b"\xff"), r"manifest\.json: not JSON"),
        (overwrite("manifest.json", b"[]"), r"must say \"format\""),
        (edit_manifest(format="else"), r"must say \"format\""),
        (edit_manifest(format_version=2), r"format_version must be 1. Received: 2"),
        (edit_manifest(splits={}), r"'splits.train' must hold file, bytes, sha256, tokens. Received: None"),
        (edit_manifest(vocabulary={"file": "vocab.txt"}), r"'vocabulary' must hold"),
        (edit_manifest(tokenizer_files=[3]), r"'tokenizer_files' must list"),
    ],
)
def test_damage_is_named(tmp_path, damage, message):
    directory = write(tmp_path / "data")
    damage(directory)
    with pytest.raises(ValueError, match=message):
        PreparedData.open(directory)


def test_without_verify_only_sizes_are_checked(tmp_path):
    directory = write(tmp_path / "data")
    (directory / "test.bin").write_bytes(b"\1\0\1\0\1\0")
    assert PreparedData.open(directory, verify=False).split("test").tolist() == [1, 1, 1]
    (directory / "test.bin").write_bytes(b"\1\0")
    with pytest.raises(ValueError, match="Received: 2 bytes"):
        PreparedData.open(directory, verify=False)


@pytest.mark.parametrize(("dtype", "bad"), [("<u2", 4), ("<u2", 65_535)])
def test_ids_out_of_range_are_named(tmp_path, dtype, bad):
    directory = write(tmp_path / "data", splits=SPLITS | {"valid": [1, 0, bad, 1]}, dtype=dtype)
    with pytest.raises(
        ValueError, match=rf"valid\.bin: ids must be in 0 \.\. 3\. Received: {bad} at position 2"
    ):
        PreparedData.open(directory)


def test_negative_ids_are_named(tmp_path):
    tokens = [*TOKENS, *(f"t{i}" for i in range(65_533))]
    counts = COUNTS + [0] * 65_533
    directory = write(
        tmp_path / "data", tokens=tokens, counts=counts, splits=SPLITS | {"train": [0, -7]}, dtype="<i4"
    )
    with pytest.raises(ValueError, match=r"Received: -7 at position 1"):
        PreparedData.open(directory)


def test_contradictory_numbers_are_named(tmp_path):
    directory = write(tmp_path / "short", tokens=TOKENS[:2] + TOKENS[3:], counts=[5, 3, 0])
    with pytest.raises(ValueError, match=r"unk_id and eos_id must be below size"):
        PreparedData.open(directory)
    manifest = json.loads((write(tmp_path / "data") / "manifest.json").read_text())
    manifest["vocabulary"]["size"] = 5
    (tmp_path / "data" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"vocab\.txt: must have 5 lines.*Received: 4"):
        PreparedData.open(tmp_path / "data")
    manifest["splits"]["valid"]["tokens"] = 3
    (tmp_path / "data" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"3 tokens of 'splits.valid' must take 6 bytes.*Received: bytes=4"):
        PreparedData.open(tmp_path / "data")


def test_missing_directory_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere/manifest\.json: no such directory"):
        PreparedData.open(tmp_path / "nowhere")


def test_home_directories(tmp_path, monkeypatch):
    write(tmp_path / "data")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert PreparedData.open("~/data").directory == tmp_path / "data"
