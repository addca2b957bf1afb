"""A run that is killed and started again ends as if nothing had happened."""

import errno
import json
import shutil
import signal

import numpy as np
import pytest
import tiny_runs
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lmscale import configuration
from lmscale.checkpoints.directory import Checkpoints
from lmscale.data.token_files import PreparedData
from lmscale.run import train as train_run
from lmscale.trainer import Trainer
from lmscale.workdir import Workdir

LAST_STEP = tiny_runs.TINY_MACROS["TRAIN_STEPS"]
SAVE_EVERY = tiny_runs.TINY_MACROS["SAVE_EVERY"]


def unfinished_saves(workdir):
    return list((workdir / "checkpoints").glob(".step_*.saving"))


def kill_in_a_save(process, workdir):
    """Kills the process while a save has begun and is not published. Returns the directory left behind."""

    def caught():
        if not unfinished_saves(workdir):
            return None
        process.send(signal.SIGSTOP)  # So that it cannot finish the save before it is killed.
        left = unfinished_saves(workdir)
        if not left:
            process.send(signal.SIGCONT)
        return left

    left = process.wait_until(caught, poll_secs=0.0005)
    process.kill()
    return left


@pytest.fixture(scope="module")
def killed_run(data_dir, in_background, tmp_path_factory):
    """The future of a run on 2 devices, killed during its first save, between two saves and during a later save."""
    directory = tmp_path_factory.mktemp("killed")

    def run():
        workdir = directory / "run"
        arguments = tiny_runs.train_arguments(workdir=workdir, data_dir=data_dir, cpu_devices=2)

        process = tiny_runs.Process("lmscale.train", arguments, log=directory / "start_0")
        kill_in_a_save(process, workdir)
        # Nothing was ever saved, though the log has got to where a save is due.
        assert tiny_runs.checkpoint_steps(workdir) == []
        assert tiny_runs.steps_done(workdir) == SAVE_EVERY

        process = tiny_runs.Process("lmscale.train", arguments, log=directory / "start_1")
        process.wait_until(lambda: tiny_runs.steps_done(workdir) >= 3 * SAVE_EVERY + 7)
        process.kill()
        assert f"starting over: an earlier start in {workdir}" in process.stderr
        assert "had logged step 20" in process.stderr
        assert tiny_runs.checkpoint_steps(workdir)[:3] == [20, 40, 60]

        process = tiny_runs.Process("lmscale.train", arguments, log=directory / "start_2")
        process.wait_until(lambda: tiny_runs.checkpoint_steps(workdir)[-1] >= 5 * SAVE_EVERY)
        left = kill_in_a_save(process, workdir)
        assert unfinished_saves(workdir) == left
        newest = tiny_runs.checkpoint_steps(workdir)[-1]

        process = tiny_runs.Process("lmscale.train", arguments, log=directory / "start_3")
        assert process.wait() == 0, process.stderr
        assert f"resuming at step {newest}" in process.stderr
        assert unfinished_saves(workdir) == []
        return workdir

    return in_background(run)


@pytest.fixture(scope="module")
def moved_run(data_dir, in_background, reference_run, tmp_path_factory):
    """The future of a run that did its first 100 steps on 3 devices and the others on 2."""
    workdir = tmp_path_factory.mktemp("moved") / "run"
    reference = reference_run(3)

    def run():
        tiny_runs.go_back(reference.result(), workdir, step=100)
        arguments = tiny_runs.train_arguments(workdir=workdir, data_dir=data_dir, cpu_devices=2)
        return tiny_runs.finish(arguments, log=workdir.with_name("resumed"))

    return in_background(run)


@pytest.fixture(scope="module")
def pair(reference_run, killed_run, moved_run):
    """(uninterrupted work directory, killed one), both on 2 devices."""
    return reference_run(2).result(), killed_run.result()


def test_killed_run_ends_bit_identical(pair):
    uninterrupted, killed = pair
    assert tiny_runs.checkpoint_steps(killed) == tiny_runs.checkpoint_steps(uninterrupted)
    tiny_runs.assert_same_bits(
        tiny_runs.tensors(killed, LAST_STEP), tiny_runs.tensors(uninterrupted, LAST_STEP)
    )


def test_killed_run_reports_every_step_once_and_the_same(pair):
    def without_times(lines):
        excluded = ("wall_time", "step_secs", "tokens_per_sec", "valid/eval_secs")
        return [
            {tag: v for tag, v in line.items() if tag not in excluded and not tag.startswith("memory_mib/")}
            for line in lines
        ]

    uninterrupted, killed = pair
    assert [line["step"] for line in tiny_runs.metrics(killed)] == list(range(1, LAST_STEP + 1))
    for name in ("train", "eval"):
        expected = without_times(tiny_runs.metrics(uninterrupted, name))
        assert without_times(tiny_runs.metrics(killed, name)) == expected
    summaries = [json.loads((workdir / "finished.json").read_text()) for workdir in pair]
    assert summaries[0] == summaries[1]
    assert summaries[0]["step"] == LAST_STEP


@pytest.mark.parametrize("name", ["train", "eval"])
def test_tensorboard_shows_every_step_once(pair, name):
    _, killed = pair
    accumulator = EventAccumulator(str(killed / name), size_guidance={"scalars": 0}).Reload()
    lines = tiny_runs.metrics(killed, name)
    assert set(accumulator.Tags()["scalars"]) == set(lines[0]) - {"step", "wall_time"}
    for tag in accumulator.Tags()["scalars"]:
        events = accumulator.Scalars(tag)
        assert [event.step for event in events] == [line["step"] for line in lines]
        np.testing.assert_allclose(
            [event.value for event in events], [line[tag] for line in lines], rtol=1e-6
        )


def test_resumes_on_another_number_of_devices(reference_run, moved_run):
    """3 devices, then 2: the same curve but for rounding, and the steps before the move untouched."""
    on_3, moved = reference_run(3).result(), moved_run.result()
    expected, actual = tiny_runs.metrics(on_3), tiny_runs.metrics(moved)
    assert [line["step"] for line in actual] == list(range(1, LAST_STEP + 1))
    assert actual[:100] == expected[:100]
    assert [len([tag for tag in line if tag.startswith("rows_touched")]) for line in actual] == [3] * 100 + [
        2
    ] * 100
    losses = [[line["sampled_loss_nats"] for line in lines] for lines in (actual, expected)]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    losses = [[line["valid/exact_loss_nats"] for line in tiny_runs.metrics(w, "eval")] for w in (moved, on_3)]
    np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_restores_every_tensor_exactly_on_other_numbers_of_devices(
    reference_run, mirrored, tmp_path, devices
):
    """Saved on 3 devices, restored on others, saved again: the same bits, the carried state included."""
    workdir = reference_run(3).result()
    experiment = configuration.load([str(workdir / "config.gin")]).experiment
    data = PreparedData.open(experiment.data_dir)
    trainer = Trainer(experiment, data=data, strategy=mirrored(devices))
    items = trainer.parameters()
    metadata = Checkpoints(workdir / "checkpoints", readonly=True).restore(items)
    assert (metadata["step"], metadata["num_devices"]) == (LAST_STEP, 3)
    expected = tiny_runs.tensors(workdir, LAST_STEP)
    restored = {item.path: item.read(0, item.shape[0] if item.shape else 1) for item in items}
    tiny_runs.assert_same_bits(restored, expected)
    assert any(name.startswith("state/") and np.any(value) for name, value in restored.items())
    Checkpoints(tmp_path / "checkpoints").save(LAST_STEP, items, metadata={})
    tiny_runs.assert_same_bits(tiny_runs.tensors(tmp_path, LAST_STEP), expected)


def test_saving_more_often_after_an_early_end_starts_over(data_dir, mirrored, monkeypatch, tmp_path, caplog):
    """A first save that meets a full disk, then SAVE_EVERY below what was logged; and checkpoints that are lost."""

    def train(save_every):
        arguments = {"DATA_DIR": str(data_dir)} | tiny_runs.TINY_MACROS
        arguments |= {"TRAIN_STEPS": 4, "EVAL_EVERY": 4, "SAVE_EVERY": save_every}
        bindings = [f"{name} = {value!r}" for name, value in arguments.items()]
        config = configuration.load([str(tiny_runs.QUICKSTART)], bindings)
        with Workdir(tmp_path / "run") as workdir:
            return train_run(
                config.experiment,
                workdir=workdir,
                strategy=mirrored(1),
                config_text=config.text,
                hparams=config.macros,
            )

    def full_disk(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", full_disk)
        with pytest.raises(OSError, match="No space left"):
            train(save_every=3)
    assert [line["step"] for line in tiny_runs.metrics(tmp_path / "run")] == [1, 2, 3]
    assert train(save_every=2)["step"] == 4
    assert "starting over" in caplog.text
    assert tiny_runs.checkpoint_steps(tmp_path / "run") == [2, 4]
    assert [line["step"] for line in tiny_runs.metrics(tmp_path / "run")] == [1, 2, 3, 4]
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    before = tiny_runs.snapshot(tmp_path / "run")
    with pytest.raises(
        ValueError, match=r"has saved checkpoints.*Received: none in .*Put the checkpoints back"
    ):
        train(save_every=2)
    assert tiny_runs.snapshot(tmp_path / "run") == before


def test_damaged_newest_checkpoint_falls_back_loudly(reference_run, in_background, tmp_path):
    """It goes on from the checkpoint before, says so, and still ends bit-identical."""
    finished = reference_run(2).result()
    workdir = tmp_path / "run"
    tiny_runs.go_back(finished, workdir, step=180)
    data = next((workdir / "checkpoints" / "step_00000180").glob("tensors.data-*"))
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    arguments = tiny_runs.train_arguments(workdir=workdir, bindings={}, gin_file=workdir / "config.gin")
    process = tiny_runs.Process("lmscale.train", arguments, log=tmp_path / "resumed")
    assert process.wait() == 0, process.stderr
    assert "DAMAGED CHECKPOINT: step 180" in process.stderr
    assert "resuming at step 160" in process.stderr
    tiny_runs.assert_same_bits(tiny_runs.tensors(workdir, LAST_STEP), tiny_runs.tensors(finished, LAST_STEP))
    assert [line["step"] for line in tiny_runs.metrics(workdir)] == list(range(1, LAST_STEP + 1))
