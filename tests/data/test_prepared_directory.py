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

from lmscale.data import prepared_directory
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
    assert is_replaceable(directory)
    for name in ("tokenizer.json", "notes.txt", "tokenizer.wordpiece.txt"):
        (directory / name).touch()
        assert not is_replaceable(directory)
        (directory / name).unlink()
    (directory / "tokenizer.folder").mkdir()
    assert not is_replaceable(directory)


def test_only_tokenizer_files_that_the_manifest_lists_are_replaced(tmp_path):
    directory = tmp_path / "data"
    with PreparedDirectoryWriter(directory) as writer:
        writer.finish({"tokenizer_files": [writer.write_file("tokenizer.a", b"a")]})
    assert is_replaceable(directory)
    (directory / "tokenizer.mine").touch()
    replace(directory)
    assert names_in(directory) == ["manifest.json", "tokenizer.mine", "train.bin", "vocab.txt"]


@pytest.mark.parametrize(
    "hidden", [".out.partial-0123abcd", ".data.partial-0123abcd", ".lmscale-partial-0123abcd"]
)
def test_a_folder_left_behind_does_not_make_the_files_around_it_ours(tmp_path, hidden):
    """Of a sibling, which is prepared inside of the directory; or of a filling that had moved nothing yet."""
    for name in ("vocab.txt", "tokenizer.json"):
        (tmp_path / name).write_text("mine")
    (tmp_path / hidden).mkdir()
    assert not is_replaceable(tmp_path)
    remove_abandoned_folders(tmp_path)
    assert {"tokenizer.json", "vocab.txt"} <= set(names_in(tmp_path))


def test_a_file_that_came_after_a_killed_move_is_left_alone(tmp_path):
    tmp_path = tmp_path / "data"
    tmp_path.mkdir()
    assert run_killed(tmp_path, 1) == -signal.SIGKILL
    (moved,) = [name for name in names_in(tmp_path) if not name.startswith(".")]
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "mine").replace(tmp_path / moved)
    assert not is_replaceable(tmp_path)
    remove_abandoned_folders(tmp_path)
    assert names_in(tmp_path) == [moved]


def test_folders_of_other_directories_are_left_alone(tmp_path):
    others = [
        ".a.partial-0123abcd.partial-0123abcd",
        ".ab.partial-0123abcd",
        ".a.partial-mine",
        ".a.partial-0123abcd",
    ]
    for name in others:
        (tmp_path / name).mkdir()
    replace(tmp_path / "a")
    assert names_in(tmp_path) == [*sorted(others[:3]), "a"]


def test_a_file_that_comes_into_the_directory_meanwhile_is_not_overwritten(tmp_path):
    with PreparedDirectoryWriter(tmp_path) as writer:
        writer.write_file("vocab.txt", b"x")
        (tmp_path / "vocab.txt").write_text("mine")
        with pytest.raises(ValueError, match=r"by others while it is prepared. Received: \['vocab.txt'\]"):
            writer.finish({})
    assert names_in(tmp_path) == ["vocab.txt"]
    assert (tmp_path / "vocab.txt").read_text() == "mine"


@pytest.mark.parametrize("function", ["_lock", "remove_abandoned_folders"])
@pytest.mark.parametrize("existing", [False, True])
def test_an_interruption_at_the_start_leaves_nothing_behind(tmp_path, monkeypatch, existing, function):
    if existing:
        (tmp_path / "data").mkdir()

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepared_directory, function, interrupted)
    with pytest.raises(KeyboardInterrupt):
        PreparedDirectoryWriter(tmp_path / "data")
    assert [path.name for path in tmp_path.rglob("*")] == ["data"] * existing


def test_a_folder_that_another_process_removes_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    lock, calls = prepared_directory._lock, []

    def slow_lock(folder):
        calls.append(folder)
        if len(calls) == 1:
            folder.rmdir()  # Before it is opened,
        descriptor = lock(folder)
        if len(calls) == 2:
            folder.rmdir()  # between that and the lock,
        if len(calls) == 3:
            os.close(descriptor)
            raise BlockingIOError  # or about to.
        return descriptor

    monkeypatch.setattr(prepared_directory, "_lock", slow_lock)
    with PreparedDirectoryWriter(tmp_path / "data") as writer:
        writer.write_file("vocab.txt", b"x")
        writer.finish({})
    assert len(set(calls)) == 4
    assert names_in(tmp_path / "data") == ["manifest.json", "vocab.txt"]


def test_links_that_go_in_a_circle_are_named(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    for name in ("loop", "loop/x"):
        with pytest.raises(
            ValueError, match=r"loop.*must lead to a place. Received: .*loop, a link that leads back"
        ):
            PreparedDirectoryWriter(tmp_path / name)
    assert names_in(tmp_path) == ["loop"]
