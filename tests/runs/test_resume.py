"""A run that is killed and started again ends as if nothing had happened."""

import errno
import functools
import json
import shutil
import signal

import keras
import numpy as np
import pytest
import tiny_experiments
import tiny_runs
from faulty_losses import FaultySoftmax
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lmscale import configuration
from lmscale.bodies.body import keras_body
from lmscale.checkpoints.directory import Checkpoints
from lmscale.data.token_files import PreparedData
from lmscale.softmax.samplers import LogUniformSampler
from lmscale.trainer import Trainer

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
    uninterrupted, killed = pair
    assert [line["step"] for line in tiny_runs.metrics(killed)] == list(range(1, LAST_STEP + 1))
    for name in ("train", "eval"):
        expected = tiny_runs.without_times(tiny_runs.metrics(uninterrupted, name))
        assert tiny_runs.without_times(tiny_runs.metrics(killed, name)) == expected
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
        return tiny_runs.train_here(
            config.experiment,
            workdir=tmp_path / "run",
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


def penalised_gru():
    regularizer = keras.regularizers.L2(0.03)
    layer = functools.partial(keras.layers.GRU, 7, return_sequences=True, kernel_regularizer=regularizer)
    return keras_body(layer=layer)


def train_and_log_every_fifth_step(workdir, *, data_dir, strategy, log_every=5):
    """Trains 11 steps in calls of up to 2, saves at every third, and skips number 6, whose loss is not finite."""
    head = functools.partial(
        FaultySoftmax,
        bad_steps=(5,),
        place="loss",
        fault="nan",
        sampler=functools.partial(LogUniformSampler, num_sampled=11),
    )
    experiment = tiny_experiments.experiment(
        task=tiny_experiments.language_model(body=penalised_gru, head=head),
        data_dir=str(data_dir),
        train_steps=11,
        log_every=log_every,
        save_every=3,
        eval_every=11,
        keep_checkpoints=9,
        probe_tokens=0,
        on_bad_step="skip",
        steps_per_call=2,
    )
    tiny_runs.train_here(experiment, workdir=workdir, strategy=strategy)
    return workdir


@pytest.fixture(scope="module")
def logged_run(data_dir, mirrored, tmp_path_factory):
    """logged_run(n): a run of `train_and_log_every_fifth_step` on n devices that nothing interrupted."""

    @functools.cache
    def start(devices):
        workdir = tmp_path_factory.mktemp("logged") / "run"
        return train_and_log_every_fifth_step(workdir, data_dir=data_dir, strategy=mirrored(devices))

    return start


@pytest.mark.parametrize("devices", [1, 3])
@pytest.mark.parametrize("step", [3, 6, 9])
def test_a_log_line_goes_on_over_a_resume(data_dir, mirrored, logged_run, tmp_path, devices, step):
    """Saved in the middle of a line: its means are those of all its steps, also of the ones before the save."""
    whole = tiny_runs.metrics(logged_run(devices))
    assert [line["step"] for line in whole] == [5, 10, 11]
    assert [line["skipped_steps"] for line in whole] == [0, 1, 1]
    tags = {"sampled_loss_nats", "gradient_norm", "penalty_nats"}
    tags |= {f"rows_touched/words/shard_{i}" for i in range(devices)}
    assert all(tags <= line.keys() and all(line[tag] > 0 for tag in tags) for line in whole)
    workdir = tiny_runs.go_back(logged_run(devices), tmp_path / "resumed", step=step)
    train_and_log_every_fifth_step(workdir, data_dir=data_dir, strategy=mirrored(devices))
    resumed = tiny_runs.metrics(workdir)
    assert tiny_runs.without_times(resumed) == tiny_runs.without_times(whole)
    assert all(0 < line["step_secs"] < 60 for line in resumed)


def test_a_log_line_is_the_mean_of_its_steps(data_dir, mirrored, logged_run, tmp_path):
    """Against the same run, logged step by step; the step that was skipped counts in none of the means."""
    single = train_and_log_every_fifth_step(
        tmp_path / "run", data_dir=data_dir, strategy=mirrored(1), log_every=1
    )
    steps = tiny_runs.metrics(single)
    assert [line["step"] for line in steps if line["sampled_loss_nats"] is None] == [6]
    for line, numbers in zip(tiny_runs.metrics(logged_run(1)), (range(5), (6, 7, 8, 9), [10]), strict=True):
        for tag in ("sampled_loss_nats", "gradient_norm", "penalty_nats", "rows_touched/words/shard_0"):
            expected = np.mean([steps[i][tag] for i in numbers])
            assert line[tag] == pytest.approx(expected, rel=1e-6), (line["step"], tag)


def test_on_another_number_of_devices_the_line_begins_anew(data_dir, mirrored, logged_run, tmp_path):
    """Rows by shard of 3 devices and of 2 have no mean; steps 7 to 10 have."""
    workdir = tiny_runs.go_back(logged_run(3), tmp_path / "resumed", step=6)
    train_and_log_every_fifth_step(workdir, data_dir=data_dir, strategy=mirrored(2))
    before, after = tiny_runs.metrics(workdir)[:2]
    assert [sum(tag.startswith("rows_touched/") for tag in line) for line in (before, after)] == [3, 2]
    (_, whole, _) = tiny_runs.metrics(logged_run(3))
    # Step 6, which was skipped, is in neither.
    assert after["sampled_loss_nats"] == pytest.approx(whole["sampled_loss_nats"], rel=1e-5)
    assert sum(after[f"rows_touched/words/shard_{i}"] for i in range(2)) == sum(
        whole[f"rows_touched/words/shard_{i}"] for i in range(3)
    )
