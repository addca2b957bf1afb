import contextlib
import errno
import os
import shutil
import subprocess
import time

import pytest
from boards import LOADERS, Board
from tensorboard.backend.event_processing import event_accumulator
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary

from lmscale.event_files import EventFile, event_files
from lmscale.metrics import MetricsWriter, read_metrics
from lmscale.workdir import Workdir, replace_file


def seconds_of(paths):
    return [int(path.name.split(".")[3]) for path in paths]


def write_scalar(directory, step, value):
    with EventFile(directory) as file:
        value = Summary.Value(tag="loss", simple_value=value)
        file.add(Event(summary=Summary(value=[value]), step=step, wall_time=time.time()))
    return file.path


def test_the_name_holds_the_time(tmp_path):
    before = int(time.time())
    path = write_scalar(tmp_path, 1, 0.5)
    assert path.parent == tmp_path
    assert before <= seconds_of([path])[0] <= time.time()
    assert oct(path.stat().st_mode & 0o777) == oct(0o666 & ~os.umask(os.umask(0o022)))


def test_each_file_sorts_behind_all_that_are_there(tmp_path):
    """Made within a second, beside one of a clock that was years ahead, and one of another program."""
    ahead = int(time.time()) + 10**8
    (tmp_path / f"events.out.tfevents.{ahead:010d}.host").touch()
    (tmp_path / "events.out.tfevents.profile-empty").touch()
    paths = [write_scalar(tmp_path, step, 0.5) for step in range(3)]
    assert paths == sorted(paths)
    assert seconds_of(paths) == [ahead + 1, ahead + 2, ahead + 3]


@pytest.fixture
def clock(monkeypatch):
    """clock(seconds): puts the clock forward, or back, by so much from what it is; clock(None): right."""
    true_time, ahead = time.time, 0.0
    monkeypatch.setattr(time, "time", lambda: true_time() + ahead)

    def put(by):
        nonlocal ahead
        ahead = 0.0 if by is None else ahead + by

    return put


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("is_running", [False, True])
def test_a_clock_that_went_back_hides_no_point(tmp_path, clock, loader, is_running):
    """Between two starts, and within the second."""
    with MetricsWriter(tmp_path / "run", resume_step=-1) as writer:
        for step in (10, 20, 30):
            clock(+1000)
            writer.scalars(step, {"loss": step / 10})
    board = Board(tmp_path, loader=loader) if is_running else None
    clock(-7200)
    with MetricsWriter(tmp_path / "run", resume_step=20) as writer:
        writer.scalars(30, {"loss": 7.0})
        clock(-7200)
        writer.scalars(40, {"loss": 8.0})
    clock(-7200)
    with MetricsWriter(tmp_path / "run", resume_step=40) as writer:
        writer.scalars(50, {"loss": 9.0})

    expected = [(10, 1.0), (20, 2.0), (30, 7.0), (40, 8.0), (50, 9.0)]
    clock(None)
    board = board or Board(tmp_path, loader=loader)
    board.reload_until(lambda: board.scalars("run", "loss") == expected)
    assert board.scalars("run", "loss") == expected
    times = board.wall_times("run", "loss")
    assert times == sorted(times)
    scripts = event_accumulator.EventAccumulator(str(tmp_path / "run")).Reload()
    assert [(event.step, event.value) for event in scripts.Scalars("loss")] == expected
    lines = read_metrics(tmp_path / "run")
    assert [(line["step"], line["loss"]) for line in lines] == expected
    assert [line["wall_time"] for line in lines] == pytest.approx(times, abs=0.001)


@pytest.fixture
def full_disk(tmp_path):
    """(directory, fill): `fill()` leaves no room there."""
    directory = tmp_path / "disk"
    directory.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(directory)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted: {mounted.stderr.decode().strip()}")

    def fill():
        with contextlib.suppress(OSError), open(directory / "filling", "wb", buffering=0) as filling:
            while True:
                filling.write(bytes(4096))

    yield directory, fill
    subprocess.run(["umount", str(directory)], check=True)


def test_a_full_disk_is_an_error_that_names_the_file(full_disk, tmp_path):
    directory, fill = full_disk
    workdir = Workdir(directory)
    writer = MetricsWriter(directory / "train")
    writer.scalars(1, {"loss": 0.5})
    fill()
    (events,) = event_files(directory / "train")

    def write_many():
        for step in range(2, 2000):  # Of the last block of a file there is room left.
            writer.scalars(step, {"loss": 0.5})

    with pytest.raises(OSError, match="No space left on device") as raised:
        write_many()
    assert raised.value.errno == errno.ENOSPC
    assert raised.value.filename in (str(events), str(directory / "train" / "metrics.jsonl"))
    assert f"'{raised.value.filename}'" in str(raised.value)

    with pytest.raises(OSError, match="No space left on device") as raised:
        EventFile(directory / "train")
    assert (raised.value.errno, raised.value.filename.startswith(f"{directory}/train/events.out")) == (
        28,
        True,
    )
    with pytest.raises(OSError, match="No space left on device") as raised:
        replace_file(directory / "config.gin", text="A = 1\n")
    assert raised.value.filename == str(directory / "config.gin.tmp")

    (directory / "filling").unlink()
    writer.close()
    workdir.close()
    # What had been reported before is there, and a later start goes on.
    with MetricsWriter(directory / "train", resume_step=1) as writer:
        writer.scalars(2, {"loss": 0.25})
    copy = tmp_path / "copy"  # A disk that the data server reads cannot be unmounted.
    shutil.copytree(directory / "train", copy / "train")
    for loader in LOADERS:
        assert Board(copy, loader=loader).scalars("train", "loss") == [(1, 0.5), (2, 0.25)]
