import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "runs"))

import faulty_runs
import tiny_runs


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A prepared directory of 3,001 made-up tokens over 503 words."""
    return faulty_runs.write_data(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(scope="session")
def reference(data_dir, tmp_path_factory):
    """The work directory of a run in two processes that nothing interrupted."""
    directory = tmp_path_factory.mktemp("reference")
    processes = faulty_runs.start(2, workdir=directory / "run", data_dir=data_dir, log=directory / "log")
    assert tiny_runs.wait_for_all(processes) == [0, 0], processes[0].stderr + processes[1].stderr
    return directory / "run"
