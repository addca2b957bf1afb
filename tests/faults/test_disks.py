"""Disks that fill up, damaged checkpoints, folders that cannot be written, and another number of processes."""

import functools
import re
import shutil
import signal

import faulty_runs
import numpy as np
import tiny_runs
from faulty_runs import LAST_STEP, SAVE_EVERY, STOPPED, USAGE


def test_a_disk_that_is_full_for_one_process_ends_all_naming_it(data_dir, tmp_path):
    """That process is not the chief. TensorBoard's folder cannot be written either, which ends nothing."""
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "train").write_text("a file where a folder should be")
    # What another host left when it died: a lock that nobody holds.
    (workdir / ".lock").write_text("pid 1 on another-host\n")
    processes = faulty_runs.start(
        2,
        workdir=workdir,
        data_dir=data_dir,
        log=tmp_path / "log",
        before={
            0: faulty_runs.save_in_small_blocks,
            1: functools.partial(faulty_runs.fill_disk_in_save, 2),
        },
    )
    assert tiny_runs.wait_for_all(processes) == [USAGE, USAGE]
    chief, other = processes
    (at_chief,), (own,) = faulty_runs.errors(chief), faulty_runs.errors(other)
    saving = f"{workdir}/checkpoints/.step_{2 * SAVE_EVERY:08d}.saving"
    for error in (at_chief, own):
        assert f"{saving}: the checkpoint cannot be written" in error
        assert "File too large" in error
    assert re.match(r"process 1 of 2 \(127\.0\.0\.1:\d+\) failed: ", at_chief)
    assert tiny_runs.checkpoint_steps(workdir) == [SAVE_EVERY]
    assert chief.stderr.count("TRAINING WITHOUT METRICS") == 1
    assert f"{workdir}/train" in chief.stderr
    assert "WITHOUT METRICS" not in other.stderr


def test_damaged_checkpoints_are_passed_over_by_all_and_other_numbers_of_processes_go_on(
    data_dir, reference, tmp_path
):
    """Two processes fall back by three checkpoints; one process goes on from what they save; then two again."""
    workdir = tiny_runs.go_back(reference, tmp_path / "run", step=LAST_STEP)
    steps = [LAST_STEP - number * SAVE_EVERY for number in range(4)]
    directories = [workdir / "checkpoints" / f"step_{step:08d}" for step in steps]
    (data_file,) = directories[0].glob("tensors.data-*")
    content = bytearray(data_file.read_bytes())
    content[len(content) // 2] ^= 4
    data_file.write_bytes(content)
    (data_file,) = directories[1].glob("tensors.data-*")
    data_file.write_bytes(data_file.read_bytes()[:-100])
    (directories[2] / "tensors.index").unlink()
    common = {"workdir": workdir, "data_dir": data_dir}

    processes = faulty_runs.start(2, log=tmp_path / "two", **common)
    # It saves a good one in place of the third, sets the later ones aside, and is killed then.
    processes[0].wait_until(lambda: tiny_runs.checkpoint_steps(workdir)[-1] == steps[2])
    for process in processes:
        process.send(signal.SIGKILL)
    assert tiny_runs.wait_for_all(processes) == [-signal.SIGKILL] * 2
    damages = re.findall(r"DAMAGED CHECKPOINT: step (\d+) in \S+: (.*)\. Trying", processes[0].stderr)
    assert [int(step) for step, _ in damages] == steps[:3]
    assert damages[0][1].startswith("the checksum of tensors.data-00000")
    assert re.match(r"tensors\.data-00000-of-00001 has \d+ bytes instead of \d+", damages[1][1])
    assert damages[2][1] == "tensors.index cannot be read (No such file or directory)"
    assert f"resuming at step {steps[3]}\n" in processes[0].stderr
    assert "DAMAGED" not in processes[1].stderr
    newest = steps[2]
    tiny_runs.assert_same_bits(tiny_runs.tensors(workdir, newest), tiny_runs.tensors(reference, newest))

    (alone,) = faulty_runs.start(1, log=tmp_path / "one", **common)
    alone.wait_until(lambda: steps[1] in tiny_runs.checkpoint_steps(workdir))
    alone.send(signal.SIGTERM)
    assert alone.wait() in (STOPPED, 0)
    assert f"resuming at step {newest}\n" in alone.stderr
    newest = tiny_runs.checkpoint_steps(workdir)[-1]
    if newest == LAST_STEP:  # The machine was too fast: take the last save away.
        tiny_runs.go_back(workdir, tmp_path / "back", step=steps[1])
        shutil.rmtree(workdir)
        (tmp_path / "back").rename(workdir)
        newest = steps[1]

    processes = faulty_runs.start(2, log=tmp_path / "again", **common)
    assert tiny_runs.wait_for_all(processes) == [0, 0], processes[0].stderr
    assert f"resuming at step {newest}\n" in processes[0].stderr
    expected, actual = (tiny_runs.tensors(each, LAST_STEP) for each in (reference, workdir))
    assert actual.keys() == expected.keys()
    before = tiny_runs.tensors(reference, steps[2])
    for name, value in expected.items():
        if value.dtype.kind == "f":
            np.testing.assert_allclose(actual[name], value, rtol=2e-3, atol=2e-4, err_msg=name)
    moved = "tables/words/embedding"  # By more than that.
    assert np.abs(expected[moved] - before[moved]).max() > 2e-3
