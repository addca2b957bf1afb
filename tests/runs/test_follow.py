"""An evaluation that follows a run: each checkpoint once, as it appears, beside the run and after a restart."""

import json
import logging
import shutil
import signal

import numpy as np
import pytest
import tiny_experiments
import tiny_runs
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lmscale import model
from lmscale.bodies.lstm import lstm_body
from lmscale.checkpoints import directory as checkpoints_directory
from lmscale.follow import Follower
from lmscale.workdir import Workdir

NUM_STEPS = 6
POLL_SECS = 7.5


def body():
    return lstm_body(num_layers=1, hidden_dim=7, dropout=0.2)


@pytest.fixture(scope="module")
def experiment(data_dir):
    """Six steps, of which each is saved and evaluated."""
    task = tiny_experiments.language_model(body=body, head=tiny_experiments.sampled(), eval_window=13)
    return tiny_experiments.experiment(
        task=task,
        data_dir=str(data_dir),
        train_steps=NUM_STEPS,
        keep_checkpoints=NUM_STEPS,
        eval_batch_size=7,
        probe_tokens=0,
    )


@pytest.fixture(scope="module")
def run(experiment, mirrored, tmp_path_factory):
    """The work directory of a finished run."""
    path = tmp_path_factory.mktemp("followed") / "run"
    summary = tiny_runs.train_here(experiment, workdir=path, strategy=mirrored(2))
    with Workdir(path) as workdir:
        workdir.mark_finished(step=NUM_STEPS, summary=summary)
    return path


@pytest.fixture(scope="module")
def losses(run):
    """{step: exact loss in nats} as the run itself evaluated them."""
    lines = tiny_runs.metrics(run, "eval")
    found = {line["step"]: line["valid/exact_loss_nats"] for line in lines}
    assert list(found) == list(range(1, NUM_STEPS + 1))
    assert len(set(found.values())) == NUM_STEPS
    return found


class Trainer:
    """Stands in for the job that trains: does the next thing each time that the follower sleeps."""

    def __init__(self, run, path):
        self.path = path
        self._run = run
        self._todo = []

    def will(self, *actions):
        self._todo += actions

    def sleep(self, secs):
        assert secs == POLL_SECS
        assert self._todo, "nothing will happen any more, and the follower waits"
        self._todo.pop(0)()

    def nothing(self):
        pass

    def start(self):
        shutil.copytree(self._run, self.path, ignore=shutil.ignore_patterns("step_*", "finished.json"))

    def save(self, *steps):
        def act():
            for step in steps:
                name = f"checkpoints/step_{step:08d}"
                shutil.copytree(self._run / name, self.path / name)

        return act

    def remove(self, *steps):
        for step in steps:
            shutil.rmtree(self.path / f"checkpoints/step_{step:08d}")

    def finish(self):
        shutil.copyfile(self._run / "finished.json", self.path / "finished.json")


@pytest.fixture
def trainer(run, tmp_path):
    return Trainer(run, tmp_path / "run")


@pytest.fixture
def follow(experiment, mirrored, trainer):
    """follow(): yields what the follower reports, on one device."""

    def reports(split="valid"):
        with Follower(trainer.path, split=split, poll_secs=POLL_SECS, sleep=trainer.sleep) as follower:
            workdir = follower.wait_for_run()
            yield from follower.reports(experiment, workdir=workdir, strategy=mirrored(1))

    return reports


def assert_metrics(path, losses):
    """metrics.jsonl and TensorBoard hold these steps and losses, each once, in order."""
    lines = tiny_runs.metrics(path, "eval_valid")
    assert [line["step"] for line in lines] == list(losses)
    found = [line["valid/exact_loss_nats"] for line in lines]
    np.testing.assert_allclose(found, list(losses.values()), rtol=1e-6)
    events = EventAccumulator(str(path / "eval_valid")).Reload().Scalars("valid/exact_loss_nats")
    assert [event.step for event in events] == list(losses)
    np.testing.assert_allclose([event.value for event in events], found, rtol=1e-6)


def test_each_checkpoint_as_it_appears(trainer, follow, losses, caplog, monkeypatch):
    forward_calls = []
    forward = model.Model.forward
    monkeypatch.setattr(
        model.Model,
        "forward",
        lambda *args, **kwargs: forward_calls.append(1) or forward(*args, **kwargs),
    )
    caplog.set_level(logging.INFO)
    trainer.will(
        trainer.nothing, trainer.start, trainer.nothing, trainer.nothing, trainer.save(1), trainer.nothing
    )
    trainer.will(trainer.save(2, 3), trainer.save(4), trainer.nothing, trainer.save(5, 6), trainer.finish)
    reports, calls = [], []
    for report in follow():
        reports.append(report)
        calls.append(len(forward_calls))
        # It has been written when it is reported.
        assert tiny_runs.metrics(trainer.path, "eval_valid")[-1]["step"] == report["step"]
    assert [report["step"] for report in reports] == list(losses)
    np.testing.assert_allclose([r["loss_nats"] for r in reports], list(losses.values()), rtol=1e-6)
    assert {(report["split"], report["tokens"]) for report in reports} == {("valid", 701)}
    # The graph is built with the first one, and never again.
    assert calls[0] > 0
    assert set(calls) == {calls[0]}
    assert_metrics(trainer.path, losses)
    messages = [record.getMessage() for record in caplog.records]
    assert messages.count(f"waiting for a run to start in {trainer.path}") == 1
    assert messages.count(f"waiting for the first checkpoint of {trainer.path}") == 1


def test_the_run_is_left_alone(run, follow, trainer):
    trainer.start()
    trainer.save(5, 6)()
    trainer.finish()
    before = tiny_runs.snapshot(trainer.path)
    with Workdir(trainer.path):  # As the trainer has it.
        assert [report["step"] for report in follow("test")] == [5, 6]
    after = tiny_runs.snapshot(trainer.path)
    assert before.items() <= after.items()
    assert {name.split("/")[0] for name in after.keys() - before.keys()} == {"eval_test"}
    tags = list(tiny_runs.metrics(trainer.path, "eval_test")[0])[2:]
    assert tags[:4] == ["test/exact_loss_nats", "test/exact_perplexity", "test/eval_tokens", "test/eval_secs"]
    # Each decile has tokens of this text, and there are unknown words.
    groups = [f"decile_{number:02}" for number in range(1, 11)] + ["unknown"]
    assert tags[4:] == [f"test/by_frequency/{group}_loss_nats" for group in groups]


def test_after_a_restart_no_step_is_evaluated_twice(trainer, follow, losses):
    trainer.start()
    trainer.save(1, 2, 3, 4)()
    first = follow()
    assert [next(first)["step"] for _ in range(3)] == [1, 2, 3]
    first.close()
    second = follow()
    assert next(second)["step"] == 4
    second.close()
    # As a process that is killed leaves it: an event in TensorBoard's file, and a line cut short.
    lines = trainer.path / "eval_valid" / "metrics.jsonl"
    lines.write_text(lines.read_text()[:-9])
    trainer.will(trainer.save(5, 6), trainer.finish)
    assert [report["step"] for report in follow()] == [4, 5, 6]
    assert_metrics(trainer.path, losses)
    # And when there is nothing to do any more, nothing is done.
    assert list(follow()) == []
    assert_metrics(trainer.path, losses)


def test_checkpoints_that_go_while_they_are_read(trainer, follow, losses, monkeypatch, caplog):
    read_tensors = checkpoints_directory.read_tensors

    def removed_first(directory, *args, **kwargs):
        if directory.name == "step_00000002":
            trainer.remove(2)
        read_tensors(directory, *args, **kwargs)

    monkeypatch.setattr(checkpoints_directory, "read_tensors", removed_first)
    trainer.start()
    trainer.save(1, 2, 4)()
    trainer.will(trainer.save(6), trainer.finish)
    assert [report["step"] for report in follow()] == [1, 4, 6]
    assert_metrics(trainer.path, {step: losses[step] for step in (1, 4, 6)})
    assert "step 2 is not evaluated: There is no checkpoint of step 2" in caplog.text


def damage(path, step):
    (file,) = path.glob(f"checkpoints/step_{step:08d}/tensors.data-00000*")
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)


def test_a_damaged_checkpoint_is_left_out_unless_it_is_the_last(trainer, follow, losses, caplog):
    trainer.start()
    trainer.save(3, 4)()
    damage(trainer.path, 3)

    def last():
        trainer.save(6)()
        damage(trainer.path, 6)

    trainer.will(trainer.nothing, last, trainer.nothing, trainer.finish)
    reports = follow()
    assert next(reports)["step"] == 4
    assert caplog.text.count("step 3 is not evaluated: The checkpoint of step 3") == 1
    with pytest.raises(ValueError, match=r"is finished after step 6, whose checkpoint is damaged .* Restore"):
        next(reports)
    assert_metrics(trainer.path, {4: losses[4]})


def test_a_run_that_goes_back(trainer, follow, losses, caplog):
    trainer.start()
    trainer.save(1, 2, 3, 4)()
    trainer.will(lambda: trainer.remove(3, 4), trainer.save(3, 4), trainer.save(6), trainer.finish)
    assert [report["step"] for report in follow()] == [1, 2, 3, 4, 3, 4, 6]
    assert_metrics(trainer.path, {step: losses[step] for step in (1, 2, 3, 4, 6)})
    assert caplog.text.count("the run went back to step 2") == 1


def test_one_follower_of_a_split(trainer, follow):
    trainer.start()
    trainer.save(1, 2)()
    first = follow("test")
    next(first)
    folder = trainer.path / "eval_test"
    with pytest.raises(ValueError, match=f"The folder {folder} is in use by another evaluation .*: pid "):
        next(follow("test"))
    assert next(follow("valid"))["step"] == 1
    first.close()
    assert next(follow("test"))["step"] == 2


def test_a_finished_run_without_checkpoints(trainer, follow):
    trainer.start()
    trainer.finish()
    with pytest.raises(
        ValueError, match="is finished after step 6, whose checkpoint is damaged or not there"
    ):
        next(follow())


# ------------------------------------------------------------------------------------------------------- The command


def lines_of(process):
    return [json.loads(line) for line in process.stdout.splitlines()]


def test_beside_a_job_that_trains(data_dir, in_background, tmp_path):
    workdir = tmp_path / "run"
    flags = [f"--workdir={workdir}", "--follow", "--poll_secs=0.1", "--cpu_devices=1"]
    follower = tiny_runs.Process("lmscale.evaluate", flags, log=tmp_path / "follower")
    follower.wait_until(lambda: f"waiting for a run to start in {workdir}" in follower.stderr)
    arguments = tiny_runs.train_arguments(
        workdir=workdir,
        data_dir=data_dir,
        TRAIN_STEPS=60,
        EVAL_EVERY=20,
        **{"experiment.Experiment.keep_checkpoints": 1},
    )
    training = in_background(tiny_runs.finish, arguments, log=tmp_path / "trainer")
    assert follower.wait() == 0, follower.stderr
    training.result()
    lines = lines_of(follower)
    steps = [line["step"] for line in lines]
    # Checkpoints that were pruned before it got to them are left out.
    assert steps == sorted(set(steps))
    assert set(steps) <= {20, 40, 60}
    assert steps[-1] == 60
    own = {line["step"]: line["valid/exact_loss_nats"] for line in tiny_runs.metrics(workdir, "eval")}
    for line in lines:
        assert line["loss_nats"] == pytest.approx(own[line["step"]], rel=1e-6)


def test_several_processes_and_a_signal(reference_run, tmp_path):
    workdir = tiny_runs.go_back(reference_run(2).result(), tmp_path / "run", step=40)
    flags = [f"--workdir={workdir}", "--follow", "--poll_secs=0.1"]
    processes = tiny_runs.start_processes(2, "lmscale.evaluate", flags, log=tmp_path / "follower")
    try:
        chief, other = processes
        chief.wait_until(lambda: len(tiny_runs.metrics(workdir, "eval_valid")) == 2)
        other.send(signal.SIGTERM)
        assert [process.wait() for process in processes] == [128 + signal.SIGTERM] * 2
    finally:
        for process in processes:
            process.kill()
    assert [line["step"] for line in lines_of(chief)] == [20, 40]
    assert other.stdout == ""
    # One process, started again, goes on with the rest.
    for step in (100, 200):
        name = f"checkpoints/step_{step:08d}"
        shutil.copytree(reference_run(2).result() / name, workdir / name)
    shutil.copyfile(reference_run(2).result() / "finished.json", workdir / "finished.json")
    code, stdout, stderr = tiny_runs.run_forked(
        "lmscale.evaluate", [*flags, "--cpu_devices=1"], log=tmp_path / "again"
    )
    assert code == 0, stderr
    found = {json.loads(line)["step"]: json.loads(line)["loss_nats"] for line in stdout.splitlines()}
    own = {line["step"]: line["valid/exact_loss_nats"] for line in tiny_runs.metrics(workdir, "eval")}
    assert found == pytest.approx({step: own[step] for step in (100, 200)}, rel=1e-6)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--follow", "--checkpoint=best"],
            "--checkpoint must be given without --follow. Received: --checkpoint=best",
        ),
        (["--poll_secs=3"], "--poll_secs must be given with --follow. Received: --poll_secs=3.0"),
    ],
)
def test_flags_that_contradict(flags, message, tmp_path):
    flags = [f"--workdir={tmp_path}", *flags]
    code, _, stderr = tiny_runs.run_forked("lmscale.evaluate", flags, log=tmp_path / "log")
    assert code == 2
    assert message in stderr
