"""A run in two processes whose work directory is in a store: it loses one of them, goes on, and is evaluated.

The store is a folder that both see, of a scheme that is left on: TensorFlow reaches it as any store.
"""

import json
import re
import signal

import faulty_runs
import tiny_runs
from faulty_runs import LOST


def evaluate(workdir, *, log, before=None):
    """The report of `lmscale.evaluate` in two processes."""
    (port,) = tiny_runs.free_ports(1)
    flags = [f"--workdir={workdir}", "--split=test", "--cpu_devices=1"]
    group = [f"--coordinator=127.0.0.1:{port}", "--num_processes=2"]
    processes = [
        faulty_runs.Forked(
            "lmscale.evaluate", [*flags, *group, f"--process_id={rank}"], log=f"{log}.{rank}", before=before
        )
        for rank in range(2)
    ]
    assert tiny_runs.wait_for_all(processes) == [0, 0], processes[0].stderr
    return json.loads(processes[0].stdout)


def test_a_run_in_a_store_loses_a_process_and_goes_on_bit_for_bit(data_dir, reference, tmp_path):
    workdir, store = tmp_path / "run", faulty_runs.take_files_for_a_store
    url = f"file://localhost{workdir}"

    def start(name):
        return faulty_runs.start(
            2, workdir=url, data_dir=data_dir, log=tmp_path / name, before={0: store, 1: store}
        )

    processes = start("killed")
    faulty_runs.until_step(processes, faulty_runs.SAVE_EVERY + 5)
    processes[0].send(signal.SIGKILL)
    assert [process.wait() for process in processes] == [-signal.SIGKILL, LOST]
    saved = max(int(path.parent.name[5:]) for path in workdir.glob("checkpoints/step_*/metadata.json"))

    processes = start("again")
    assert tiny_runs.wait_for_all(processes) == [0, 0], processes[0].stderr
    assert f"resuming at step {saved}\n" in processes[0].stderr
    assert re.search("was in use by pid .* a moment ago", processes[0].stderr)
    assert (workdir / "train" / "metrics.000000.jsonl").exists()  # As in a store.
    steps = tiny_runs.checkpoint_steps(reference)
    assert tiny_runs.checkpoint_steps(workdir)[-len(steps) :] == steps
    for step in steps:
        tiny_runs.assert_same_bits(tiny_runs.tensors(workdir, step), tiny_runs.tensors(reference, step))
    in_store, local = (
        evaluate(url, log=tmp_path / "evaluated", before=store),
        evaluate(reference, log=tmp_path / "local"),
    )
    assert in_store["loss_nats"] == local["loss_nats"]
