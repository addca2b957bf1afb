import concurrent.futures
import functools

import pytest
import tiny_runs

# Starting a process takes one core for most of its time; most hosts have two.
NUM_PROCESSES = 2


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A prepared directory of 6,007 made-up tokens over 5,003 words."""
    return tiny_runs.write_data(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(scope="session")
def in_background():
    """in_background(function): starts it, at most so many at a time as there are cores, and returns its future."""
    with concurrent.futures.ThreadPoolExecutor(NUM_PROCESSES) as pool:
        yield pool.submit


@pytest.fixture(scope="session")
def reference_run(data_dir, in_background, tmp_path_factory):
    """reference_run(n): the future work directory of a run on n devices that nothing interrupted."""
    directory = tmp_path_factory.mktemp("reference")

    @functools.cache
    def start(cpu_devices):
        workdir = directory / f"on_{cpu_devices}"
        arguments = tiny_runs.train_arguments(workdir=workdir, data_dir=data_dir, cpu_devices=cpu_devices)
        return in_background(tiny_runs.finish, arguments, log=f"{workdir}.log")

    return start
