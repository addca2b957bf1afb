"""Prepared directories come whole or not at all, whatever ends the process, and in whatever place."""

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_token_files import write

from lmscale.data.prepared_directory import (
    PreparedDirectoryWriter,
    TokenFileWriter,
    is_empty,
    is_replaceable,
    remove_abandoned_folders,
)
from lmscale.data.token_files import PreparedData

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("num_ids", [1, 100_000])
def test_a_full_disk_is_named(tmp_path, num_ids):
    path = tmp_path / "train.bin"
    path.symlink_to("/dev/full")
    # Few ids stay in the buffer until the file is closed.
    with (
        pytest.raises(OSError, match="No space left") as caught,
        TokenFileWriter(path, vocab_size=9) as file,
    ):
        file.append(np.zeros([num_ids], np.int32))
    assert caught.value.filename == str(path)
    with PreparedDirectoryWriter(tmp_path / "data") as writer:
        (writer.folder / "vocab.txt").symlink_to("/dev/full")
        with pytest.raises(OSError, match="No space left") as caught:
            writer.write_file("vocab.txt", b"a")
        assert caught.value.filename == str(writer.folder / "vocab.txt")


def test_writer_leaves_nothing_behind_on_failure(tmp_path):
    def interrupted():
        with PreparedDirectoryWriter(tmp_path / "a" / "b" / "out") as writer:
            writer.write_file("vocab.txt", b"x")
            assert [path.name for path in tmp_path.iterdir()] == ["a"]
            assert not (tmp_path / "a" / "b" / "out").exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_writer_keeps_the_old_directory_until_the_new_one_is_whole(tmp_path):
    directory = write(tmp_path / "data")
    with pytest.raises(RuntimeError), PreparedDirectoryWriter(directory, replace=True):
        raise RuntimeError
    assert PreparedData.open(directory).vocab_size == 4
    with pytest.raises(ValueError, match=r"data: must be new or empty. Received: \['manifest.json'"):
        PreparedDirectoryWriter(directory)
    with PreparedDirectoryWriter(directory, replace=True) as writer:
        writer.write_file("vocab.txt", b"x")
        assert PreparedData.open(directory).vocab_size == 4
        writer.finish({})
    assert names_in(directory) == ["manifest.json", "vocab.txt"]
    assert names_in(tmp_path) == ["data"]


def names_in(directory):
    return sorted(path.name for path in directory.iterdir())


def replace(directory):
    with PreparedDirectoryWriter(directory, replace=True) as writer:
        for name in ("vocab.txt", "train.bin"):
            writer.write_file(name, b"new")
        writer.finish({})


def test_an_existing_directory_stays_the_same_with_its_mode(tmp_path):
    directory = write(tmp_path / "data")
    directory.chmod(0o2750)
    before = directory.stat()
    replace(directory)
    after = directory.stat()
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)
    assert names_in(directory) == ["manifest.json", "train.bin", "vocab.txt"]


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_a_new_directory_has_the_mode_that_mkdir_gives(tmp_path, umask):
    tmp_path.chmod(0o2755)
    previous = os.umask(umask)
    try:
        (tmp_path / "plain").mkdir()
        replace(tmp_path / "data")
    finally:
        os.umask(previous)
    plain, made = (tmp_path / "plain").stat(), (tmp_path / "data").stat()
    assert (made.st_mode, made.st_gid) == (plain.st_mode, plain.st_gid)
    assert made.st_mode & stat.S_ISGID


def test_who_reads_the_old_files_is_not_disturbed(tmp_path):
    data = PreparedData.open(write(tmp_path / "data"))
    mapped = data.split("train")
    before = mapped.tolist()
    replace(tmp_path / "data")
    assert mapped.tolist() == before


def test_an_interruption_among_the_moves_is_made_good(tmp_path, monkeypatch):
    directory = write(tmp_path / "data")
    move, calls = Path.replace, []

    def interrupted_once(self, target):
        calls.append(target)
        if len(calls) == 2:
            assert not (directory / "manifest.json").exists()
            raise KeyboardInterrupt
        return move(self, target)

    monkeypatch.setattr(Path, "replace", interrupted_once)
    with pytest.raises(KeyboardInterrupt):
        replace(directory)
    assert names_in(directory) == ["manifest.json", "train.bin", "vocab.txt"]
    assert Path(calls[-1]).name == "manifest.json"
    assert (directory / "vocab.txt").read_bytes() == b"new"


KILLED = """
import os, signal, sys
from pathlib import Path
from lmscale.data.prepared_directory import PreparedDirectoryWriter

directory, moves = Path(sys.argv[1]), int(sys.argv[2])
move = Path.replace

def counted(self, target):
    global moves
    if moves == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    moves -= 1
    return move(self, target)

Path.replace = counted
with PreparedDirectoryWriter(directory, replace=True) as writer:
    writer.write_file("vocab.txt", b"half")
    writer.write_file("train.bin", b"half")
    if moves < 0:
        print("writing", flush=True)
        sys.stdin.read()
    writer.finish({})
"""


def run_killed(directory, moves):
    arguments = [sys.executable, "-c", KILLED, str(directory), str(moves)]
    return subprocess.run(arguments, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False).returncode


@pytest.mark.parametrize("moves", [0, 1, 2])
@pytest.mark.parametrize("existing", ["data", "empty"])
def test_a_directory_whose_replacement_was_killed(tmp_path, caplog, existing, moves):
    directory = tmp_path / "data"
    _ = write(directory) if existing == "data" else directory.mkdir()
    assert run_killed(directory, moves) == -signal.SIGKILL
    with pytest.raises(ValueError, match=r"manifest.json: no such file"):
        PreparedData.open(directory)
    assert is_replaceable(directory)
    remove_abandoned_folders(directory)
    assert list(directory.iterdir()) == []  # Neither half of the data is left, nor anything hidden.
    assert "which a preparation that was killed has left behind" in caplog.text


@pytest.mark.parametrize("existing", [False, True])
def test_folders_of_killed_processes_are_removed_and_those_of_living_ones_are_not(tmp_path, existing):
    directory = tmp_path / "data"
    if existing:
        write(directory)
    arguments = [sys.executable, "-c", KILLED, str(directory), "-1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        arguments, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "writing\n"
        base = directory if existing else tmp_path
        (hidden,) = [name for name in names_in(base) if name.startswith(".")]
        with pytest.raises(
            ValueError, match=r"Only one process at a time may prepare .*data. Received: .*partial"
        ):
            PreparedDirectoryWriter(directory, replace=True)
        assert [name for name in names_in(base) if name.startswith(".")] == [hidden]
        process.kill()
    if existing:
        assert PreparedData.open(directory).vocab_size == 4
    replace(directory)
    assert names_in(directory) == ["manifest.json", "train.bin", "vocab.txt"]
    assert names_in(tmp_path) == ["data"]


def test_what_file_systems_put_into_a_folder_is_no_content(tmp_path):
    (tmp_path / "lost+found").mkdir()
    (tmp_path / ".nfs000012").touch()
    assert is_empty(tmp_path)
    replace(tmp_path)
    assert is_replaceable(tmp_path)
    assert names_in(tmp_path) == [".nfs000012", "lost+found", "manifest.json", "train.bin", "vocab.txt"]


def test_foreign_files_are_not_replaceable(tmp_path):
    directory = write(tmp_path / "data")
    (directory / "tokenizer.wordpiece.txt").touch()
    assert is_replaceable(directory)
    (directory / "notes.txt").touch()
    assert not is_replaceable(directory)
    (directory / "notes.txt").unlink()
    (directory / "tokenizer.folder").mkdir()
    assert not is_replaceable(directory)
