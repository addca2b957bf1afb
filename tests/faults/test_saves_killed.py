"""SIGKILL before any file operation of a save of two processes, in either of them: the next start loses nothing saved.

The processes are forked from one that has imported TensorFlow and run nothing. They save through a real `ProcessGroup`,
whose connections are all that they share; one of the parameters is sharded, so both of them write.
"""

import functools
import os
import signal
import subprocess
import sys
import textwrap

import faulty_runs
import numpy as np
import pytest
import tiny_runs
from array_parameters import array_parameters
from faulty_runs import LAST_STEP, LOST

from lmscale.checkpoints.directory import Checkpoints

TESTS = tiny_runs.REPOSITORY / "tests"
SCRIPT = """
    import os, shutil, signal, sys
    import numpy as np
    import tensorflow as tf
    from array_parameters import callback_parameter
    from lmscale.checkpoints.directory import Checkpoints
    from lmscale.distribution.process_group import Connection, ProcessGroup
    from small_groups import cluster, connected_pair

    ADDRESSES = ("chief:1", "other:2")

    def parameters(value):
        def parameter(path, rows, sharded):
            read = lambda start, stop: np.full((stop - start, 3), value, np.float32)
            return callback_parameter(path, (rows, 3), np.float32, read=read, write=None, sharded=sharded)
        return [parameter("table", 100, True), parameter("layer", 20, False)]

    def save(directory, step, value, group=None, **kwargs):
        checkpoints = Checkpoints(directory, block_mib=2e-4, group=group, **kwargs)
        checkpoints.save(step, parameters(value), metadata={})

    def group_of(rank, ends):
        ends[1 - rank].close()
        connections = {1 - rank: Connection(ends[rank])}
        described = cluster(2, rank, addresses=ADDRESSES)
        return ProcessGroup(cluster=described, addresses=ADDRESSES, connections=connections)

    def run(rank, ends, directory, kill_at):
        group = group_of(rank, ends)
        group.gather()
        calls = 0
        def killing(function):
            def counted(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls > kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)
            return counted
        for name in ("SaveV2", "MergeV2Checkpoints"):
            setattr(tf.raw_ops, name, killing(getattr(tf.raw_ops, name)))
        for name in ("fsync", "mkdir", "unlink", "rmdir", "rename", "replace"):
            setattr(os, name, killing(getattr(os, name)))
        save(directory, 20, 2, group, keep=1)
        group.leave()
        os._exit(0)

    def end_of(pid):
        _, status = os.waitpid(pid, 0)
        return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)

    start, runs, killed_rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
    first = os.fork()
    if first == 0:
        save(start, 10, 0)
        save(start, 20, 1)
        os._exit(0)
    assert end_of(first) == 0
    os.mkdir(runs)
    for kill_at in range(200):
        directory = f"{runs}/{kill_at:03d}"
        shutil.copytree(start, directory)
        ends = connected_pair()
        pids = []
        for rank in range(2):
            pids.append(os.fork())
            if pids[-1] == 0:
                try:
                    run(rank, ends, directory, kill_at if rank == killed_rank else 10**9)
                finally:
                    os._exit(1)
        for end in ends:
            end.close()
        codes = [end_of(pid) for pid in pids]
        print(*codes, flush=True)
        if codes == [0, 0]:
            break
"""


def saves_killed(directory, *, rank):
    """The exit codes of both processes at each kill, one operation later each time; the last was not killed."""
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            textwrap.dedent(SCRIPT),
            str(directory / "start"),
            str(directory / "runs"),
            str(rank),
        ],
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join(map(str, [tiny_runs.REPOSITORY, TESTS])),
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "CUDA_VISIBLE_DEVICES": "",
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return [tuple(map(int, line.split())) for line in result.stdout.splitlines()]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_save_killed_at_any_file_operation_of_either_process(tmp_path, rank):
    *killed, unharmed = saves_killed(tmp_path, rank=rank)
    assert unharmed == (0, 0)
    # The other one ends, unless it had done its part: then it is done with 0, or learns of the loss.
    assert {codes[rank] for codes in killed} == {-signal.SIGKILL}
    assert {codes[1 - rank] for codes in killed} <= {LOST, 0}
    assert killed[0][1 - rank] == LOST
    assert len(killed) >= (15 if rank == 0 else 6)
    values = []
    for number in range(len(killed) + 1):
        directory = tmp_path / "runs" / f"{number:03d}"
        arrays = {"table": np.full((100, 3), -1, np.float32), "layer": np.full((20, 3), -1, np.float32)}
        checkpoints = Checkpoints(directory)
        assert checkpoints.restore(array_parameters(arrays))["step"] == 20
        (value,) = {x for array in arrays.values() for x in np.unique(array)}
        values.append(value)
        steps = checkpoints.steps()
        assert steps in ([10, 20], [20])
        # No trace is left, and older checkpoints are whole.
        assert sorted(path.name for path in directory.iterdir()) == [f"step_{step:08d}" for step in steps]
        assert checkpoints.restore(array_parameters(arrays), step=steps[0])["step"] == steps[0]
    # Old up to some operation, new from there on; never anything else.
    assert values == sorted(values)
    assert set(values) == ({1, 2} if rank == 0 else set(values) & {1, 2})
    assert values[-1] == 2


def test_runs_killed_in_a_save_go_on_from_the_one_before(data_dir, reference, tmp_path):
    """The chief as it joins the parts of its second save; later the other one as it writes its part of a save."""
    workdir = tmp_path / "run"
    common = {"workdir": workdir, "data_dir": data_dir}
    resumes_at = None
    for number, (lost, operation) in enumerate([(0, "MergeV2Checkpoints"), (1, "SaveV2")]):
        processes = faulty_runs.start(
            2,
            log=tmp_path / f"log_{number}",
            before={
                lost: functools.partial(faulty_runs.die_in_save, operation),
                1 - lost: faulty_runs.save_in_small_blocks,
            },
            **common,
        )
        codes = tiny_runs.wait_for_all(processes)
        assert (codes[lost], codes[1 - lost]) == (-signal.SIGKILL, LOST)
        if resumes_at is not None:
            assert f"resuming at step {resumes_at}\n" in processes[0].stderr
        # One save more, and what was left of the next one.
        resumes_at = (number + 1) * faulty_runs.SAVE_EVERY
        assert tiny_runs.checkpoint_steps(workdir)[-1] == resumes_at
        assert [path.name for path in (workdir / "checkpoints").glob(".*")] == [
            f".step_{resumes_at + faulty_runs.SAVE_EVERY:08d}.saving"
        ]
    processes = faulty_runs.start(2, log=tmp_path / "last", **common)
    assert tiny_runs.wait_for_all(processes) == [0, 0], processes[0].stderr
    assert f"resuming at step {resumes_at}\n" in processes[0].stderr
    assert list((workdir / "checkpoints").glob(".*")) == []
    tiny_runs.assert_same_bits(tiny_runs.tensors(workdir, LAST_STEP), tiny_runs.tensors(reference, LAST_STEP))
