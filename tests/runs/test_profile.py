"""Profiles of chosen steps: which steps they hold, and that the run is the same with and without."""

import logging

import pytest
import tensorflow as tf
import tiny_experiments
import tiny_runs
from tensorflow.tsl.profiler.protobuf import xplane_pb2

from lmscale import run
from lmscale.profiling import Profiler
from lmscale.workdir import Workdir

NUM_STEPS = 9


@pytest.fixture(scope="module")
def experiment(data_dir):
    """Nine steps in calls of up to four, saved after the fourth and at the end."""
    task = tiny_experiments.language_model()
    return tiny_experiments.experiment(
        task=task,
        data_dir=str(data_dir),
        train_steps=NUM_STEPS,
        steps_per_call=4,
        log_every=NUM_STEPS,
        eval_every=NUM_STEPS,
        save_every=4,
        probe_tokens=0,
    )


@pytest.fixture(scope="module")
def train(experiment, mirrored):
    """train(path, steps to profile): trains to the end, or goes on."""

    def do(path, profile_steps=None):
        with Workdir(path) as workdir:
            run.train(
                experiment,
                workdir=workdir,
                strategy=mirrored(2),
                config_text="",
                hparams={},
                profile_steps=profile_steps,
            )

    return do


@pytest.fixture(scope="module")
def unprofiled(train, tmp_path_factory):
    path = tmp_path_factory.mktemp("unprofiled") / "run"
    train(path)
    return path


def profiled_calls(workdir):
    """First steps of the calls that the one profile of a run holds, and the names of all events in it."""
    (path,) = (workdir / "train" / "plugins" / "profile").glob("*/*.xplane.pb")
    space = xplane_pb2.XSpace.FromString(path.read_bytes())
    steps, names = [], set()
    for plane in space.planes:
        for event in (event for line in plane.lines for event in line.events):
            name = plane.event_metadata[event.metadata_id].name
            stats = {plane.stat_metadata[s.metadata_id].name: s.int64_value for s in event.stats}
            names.add(name)
            if name == "train" and stats.get("_r") == 1:
                steps.append(stats["step_num"])
    return sorted(steps), names


def assert_same_run(workdir, unprofiled):
    assert tiny_runs.checkpoint_steps(workdir) == [4, 8, NUM_STEPS]
    for step in (4, 8, NUM_STEPS):
        tiny_runs.assert_same_bits(tiny_runs.tensors(workdir, step), tiny_runs.tensors(unprofiled, step))
    for name in ("train", "eval"):
        lines, expected = (tiny_runs.without_times(tiny_runs.metrics(w, name)) for w in (workdir, unprofiled))
        assert lines == expected


def test_the_steps_asked_for_and_the_same_run(train, unprofiled, tmp_path):
    assert not (unprofiled / "train" / "plugins").exists()
    train(tmp_path / "run", (3, 6))
    steps, names = profiled_calls(tmp_path / "run")
    # Calls of up to four steps end where the profile begins and ends, and at the save after step 4.
    assert steps == [3, 5]
    assert any("MatMul" in name for name in names)
    assert_same_run(tmp_path / "run", unprofiled)


@pytest.mark.parametrize(
    ("profile_steps", "expected"), [((2, 6), [5]), ((8, 9), [8, 9]), ((2, 4), None), ((1, 1), None)]
)
def test_a_resumed_run_profiles_what_it_passes(profile_steps, expected, train, unprofiled, tmp_path, caplog):
    workdir = tiny_runs.go_back(unprofiled, tmp_path / "run", step=4)
    train(workdir, profile_steps)
    message = "nothing is profiled: the run goes on after step 4"
    if expected is None:
        assert not (workdir / "train" / "plugins").exists()
        assert message in caplog.text
    else:
        assert profiled_calls(workdir)[0] == expected
        assert message not in caplog.text
    assert_same_run(workdir, unprofiled)


def test_a_profile_that_cannot_be_made_does_not_end_the_run(train, unprofiled, tmp_path, caplog):
    tf.profiler.experimental.start(str(tmp_path / "other"))
    try:
        train(tmp_path / "run", (2, 3))
    finally:
        tf.profiler.experimental.stop(save=False)
    assert caplog.text.count("NOT PROFILED: Another profiler is running") == 1
    assert not (tmp_path / "run" / "train" / "plugins").exists()
    assert_same_run(tmp_path / "run", unprofiled)


def test_a_profile_is_written_when_the_run_ends_early(tmp_path, caplog):
    caplog.set_level(logging.INFO)

    def train():
        with Profiler((1, 5), directory=tmp_path / "train") as profiler:
            for step in range(5):
                with profiler.call(step):
                    tf.ones([3]) + step
                if step == 2:
                    raise run.NonFiniteError

    with pytest.raises(run.NonFiniteError):
        train()
    assert profiled_calls(tmp_path)[0] == [1, 2, 3]
    assert f"a profile is in {tmp_path}/train/plugins/profile" in caplog.text


def test_other_processes_make_the_same_calls_and_write_nothing(tmp_path):
    profilers = [Profiler((3, 6), directory=tmp_path, is_written=is_written) for is_written in (True, False)]
    assert [[p.due(step) for step in range(8)] for p in profilers] == [[2, 1, 4, 3, 2, 1, None, None]] * 2
    with profilers[1] as profiler:
        for step in range(2, 6):
            with profiler.call(step):
                pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["3", "0:2", "5:4", "199:201"])
def test_steps_that_are_none_of_the_run(text, data_dir, tmp_path):
    arguments = tiny_runs.train_arguments(workdir=tmp_path / "run", data_dir=data_dir)
    code, _, stderr = tiny_runs.run_forked(
        "lmscale.train", [*arguments, f"--profile_steps={text}"], log=tmp_path / "log"
    )
    assert code == 2
    wanted = "--profile_steps must be FIRST:LAST, two steps of the run, which are 1 to 200."
    assert f"error: {wanted} Received: {text}. Pass" in stderr
    assert not (tmp_path / "run").exists()
