"""Processes that do not come, or do not belong together: refused before the first step, and named."""

import functools
import re
import shutil

import faulty_runs
import pytest
import tiny_runs
from faulty_runs import LOST, USAGE

from lmscale import __version__
from lmscale.workdir import Workdir


@pytest.fixture
def start(data_dir, tmp_path):
    """start(...): (exit codes, the messages at the end of each process) of a start of two processes that fails."""

    def run(*, data_dir=data_dir, workdir=tmp_path / "run", **kwargs):
        processes = faulty_runs.start(2, workdir=workdir, data_dir=data_dir, log=tmp_path / "log", **kwargs)
        codes = tiny_runs.wait_for_all(processes)
        assert not list(tmp_path.glob("**/metrics.jsonl"))  # No step was done.
        assert "Traceback" not in processes[0].stderr + processes[1].stderr
        return codes, [faulty_runs.errors(process) for process in processes]

    return run


def check_both_named(messages, *words):
    """Every process says it once, with both their names."""
    for said in messages:
        (error,) = said
        for word in ("process 0", "process 1", *words):
            assert word in error


def in_two_places(directory, data_dir):
    """Copies of prepared data under one relative path in two directories, as on two hosts."""
    for place in ("here", "there"):
        shutil.copytree(data_dir, directory / place / "data")
    return {0: directory / "here", 1: directory / "there"}


# ----------------------------------------------------------------------------------------------- Who does not come


def test_processes_that_do_not_find_each_other_give_up_at_the_deadline(data_dir, tmp_path):
    """Process 1 is told another port, process 2 a name that does not resolve, and process 3 never starts."""
    (wrong_port,) = tiny_runs.free_ports(1)
    chief, at_port, at_name = faulty_runs.start(
        4,
        ranks=[0, 1, 2],
        workdir=tmp_path / "run",
        data_dir=data_dir,
        log=tmp_path / "log",
        flags=["--start_timeout_secs=4"],
        of_rank={
            1: [f"--coordinator=127.0.0.1:{wrong_port}"],
            2: ["--coordinator=chief.invalid:2222"],
        },
    )
    assert tiny_runs.wait_for_all([chief, at_port, at_name]) == [LOST] * 3
    ((error,), (port_error,), (name_error,)) = map(faulty_runs.errors, (chief, at_port, at_name))
    assert re.match(r"All 4 processes of the run must join the chief at 127\.0\.0\.1:\d+ in time", error)
    assert "nothing of process 1, 2, 3" in error
    assert f"process 0, at 127.0.0.1:{wrong_port} in time. Received: no connection" in port_error
    assert "process 0, at chief.invalid:2222 in time" in name_error
    assert "the name chief.invalid does not resolve" in name_error
    assert not (tmp_path / "run").exists()


def test_one_that_never_starts_is_told_to_those_that_did(data_dir, tmp_path):
    processes = faulty_runs.start(
        3,
        ranks=[0, 1],
        workdir=tmp_path / "run",
        data_dir=data_dir,
        log=tmp_path / "log",
        flags=["--start_timeout_secs=4"],
    )
    assert tiny_runs.wait_for_all(processes) == [LOST, LOST]
    for process in processes:
        (error,) = faulty_runs.errors(process)
        assert "nothing of process 2" in error


# ------------------------------------------------------------------------------------------ Who does not belong here


def test_another_configuration(start):
    codes, messages = start(of_rank={1: ["--gin_param=SEED = 6"]})
    assert codes == [USAGE, USAGE]
    check_both_named(messages, "The configuration must be the same", "SEED = 5", "SEED = 6")


def test_another_version(start):
    codes, messages = start(before={1: functools.partial(faulty_runs.claim_version, "0.0.7")})
    assert codes == [USAGE, USAGE]
    check_both_named(messages, f"{__version__} in process 0", "0.0.7 in process 1")


def test_another_number_of_processes(start):
    codes, messages = start(of_rank={1: ["--num_processes=3"]})
    assert codes == [USAGE, USAGE]
    check_both_named(messages, "Received: 2 in process 0", "process 1 of 3")


def test_another_number_of_devices(start):
    codes, ((at_chief,), (own,)) = start(of_rank={1: ["--cpu_devices=2"]})
    assert codes == [USAGE, USAGE]
    for error in (at_chief, own):
        assert "takes one CPU device of each process. Received: cpu_devices=2, 2 processes" in error
    assert "process 1 of 2" in at_chief


def test_another_vocabulary(start, data_dir, tmp_path):
    places = in_two_places(tmp_path, data_dir)
    shutil.rmtree(places[1] / "data")
    faulty_runs.write_data(places[1] / "data", seed=1)
    codes, messages = start(data_dir="data", cwd=places)
    assert codes == [USAGE, USAGE]
    check_both_named(messages, "The data must be the same in every process", "data with the fingerprint")


def test_a_token_file_that_is_damaged_for_one_process_only(start, data_dir, tmp_path):
    places = in_two_places(tmp_path, data_dir)
    path = places[1] / "data" / "train.bin"
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    codes, ((at_chief,), (own,)) = start(data_dir="data", cwd=places)
    assert codes == [USAGE, USAGE]
    assert re.match(
        r"process 1 of 2 \(127\.0\.0\.1:\d+\) failed: data/train\.bin: must have SHA-256", at_chief
    )
    assert own.startswith("data/train.bin: must have SHA-256")


def test_a_work_directory_in_use(start, tmp_path):
    with Workdir(tmp_path / "run"):
        codes, ((own,), (at_other,)) = start()
    assert codes == [USAGE, USAGE]
    for error in (own, at_other):
        assert re.search(r"is in use by another run: pid \d+ on \S+", error)
    assert "process 0 of 2" in at_other


def test_a_work_directory_that_the_other_does_not_see(start, tmp_path):
    """One path, on filesystems that are not shared: an old run of that name is there."""
    places = {0: tmp_path / "here", 1: tmp_path / "there"}
    for place in places.values():
        with Workdir(place / "run"):
            pass
    codes, ((at_chief,), (own,)) = start(
        workdir="run", cwd=places, before={1: functools.partial(faulty_runs.look_for_shared_files, 1.0)}
    )
    assert codes == [USAGE, USAGE]
    for error in (at_chief, own):
        assert "must be on a filesystem that all processes of the run share" in error
    assert "process 1 of 2" in at_chief
