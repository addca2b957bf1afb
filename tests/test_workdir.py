import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from lmscale.workdir import Workdir, replace_file

REPOSITORY = Path(__file__).parents[1]
HOLD_THE_LOCK = """
import sys, time
from lmscale.workdir import Workdir
workdir = Workdir(sys.argv[1])
print("held", flush=True)
time.sleep(60)
"""


def test_paths(tmp_path):
    with Workdir(tmp_path / "a" / "run") as workdir:
        assert workdir.path == tmp_path / "a" / "run"
        assert workdir.path.is_dir()
        assert workdir.config_path == workdir.path / "config.gin"
        assert workdir.checkpoints_dir == workdir.path / "checkpoints"
        assert workdir.train_dir == workdir.path / "train"
        assert workdir.eval_dir == workdir.path / "eval"


def test_paths_as_users_give_them(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with Workdir("~/run") as workdir:
        assert workdir.path == tmp_path / "run"
    for name in ("lr[0.004]", "back\\slash", "a\udcff"):
        with pytest.raises(ValueError, match=r"^The working directory must "):
            Workdir(tmp_path / name)
    (tmp_path / "lr[0.004]").mkdir()
    with pytest.raises(ValueError, match=r"must not have square brackets"):
        Workdir(tmp_path / "lr[0.004]", readonly=True)
    assert {path.name for path in tmp_path.iterdir()} == {"run", "lr[0.004]"}
    monkeypatch.chdir(tmp_path / "lr[0.004]")
    with Workdir("run") as workdir:
        assert str(workdir.path) == "run"


def test_one_writer_until_it_closes(tmp_path):
    with Workdir(tmp_path):
        with pytest.raises(
            ValueError,
            match=f"{re.escape(str(tmp_path))} is in use by another run: "
            f"pid {os.getpid()} on {re.escape(socket.gethostname())}",
        ):
            Workdir(tmp_path)
        readonly = Workdir(tmp_path, readonly=True)
        readonly.close()
    with Workdir(tmp_path) as workdir:
        workdir.write_config("A = 1\n")
        assert workdir.config_path.read_text() == "A = 1\n"
    with pytest.raises(ValueError, match="closed"):
        workdir.write_config("A = 2\n")


def test_a_killed_writer_gives_the_lock_back(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD_THE_LOCK, str(tmp_path)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"in use by another run: pid {holder.pid} on "):
            Workdir(tmp_path)
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        holder.stdout.close()
    with Workdir(tmp_path):
        assert (tmp_path / ".lock").read_text() == f"pid {os.getpid()} on {socket.gethostname()}\n"


def test_readonly_writes_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"There is no working directory .*absent"):
        Workdir(tmp_path / "absent", readonly=True)
    with Workdir(tmp_path, readonly=True) as workdir:
        for write in (
            lambda: workdir.write_config(""),
            lambda: workdir.mark_finished(step=1, summary={}),
            workdir.clear_finished,
        ):
            with pytest.raises(ValueError, match="readonly"):
                write()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["file", "file/below", "file/far/below"])
def test_a_directory_that_cannot_be_made(tmp_path, name):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=rf"can be written to\. Received: {tmp_path / name} \("):
        Workdir(tmp_path / name)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="Permission denied"):
        Workdir(tmp_path)


def test_finished(tmp_path):
    with Workdir(tmp_path) as workdir:
        assert workdir.finished() is None
        workdir.mark_finished(step=30, summary={"loss_nats": 4.5})
        assert Workdir(tmp_path, readonly=True).finished() == {"step": 30, "summary": {"loss_nats": 4.5}}
        workdir.clear_finished()
        workdir.clear_finished()
        assert workdir.finished() is None
        workdir.finished_path.write_text('{"step": 3')
        with pytest.raises(ValueError, match=r"finished\.json must be the JSON that the run wrote"):
            workdir.finished()


def test_replace_file_leaves_the_old_content_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "f"
    replace_file(path, text="old")

    def fail(descriptor):
        raise OSError("no space")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        replace_file(path, text="new")
    assert path.read_text() == "old"


def test_a_full_disk_is_named(tmp_path):
    (tmp_path / "f.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as caught:
        replace_file(tmp_path / "f", text="new")
    assert caught.value.filename == str(tmp_path / "f.tmp")


def test_the_first_save_is_recorded_once(tmp_path):
    with Workdir(tmp_path) as workdir:
        assert not workdir.has_saved()
        workdir.mark_saved()
        before = workdir.saved_path.stat()
        workdir.mark_saved()
    readonly = Workdir(tmp_path, readonly=True)
    assert readonly.has_saved()
    assert readonly.saved_path.stat() == before


def test_a_finished_run_has_saved(tmp_path):
    """Also one that an earlier version ran, which did not record its first save."""
    with Workdir(tmp_path) as workdir:
        workdir.mark_finished(step=5, summary={})
        assert workdir.has_saved()
