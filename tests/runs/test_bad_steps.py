"""A loss or gradient that is not finite: the run stops or skips the update, and never takes it for its best."""

import functools
import math

import numpy as np
import pytest
import tiny_runs
from faulty_losses import FaultySoftmax

from lmscale.bodies.lstm import lstm_body
from lmscale.checkpoints.directory import Checkpoints
from lmscale.experiment import Experiment
from lmscale.parameters.groups import Group
from lmscale.parameters.update_rules import Adam
from lmscale.run import NonFiniteError
from lmscale.softmax.samplers import LogUniformSampler
from lmscale.tables.table_config import TableConfig
from lmscale.tasks.next_token import NextToken

EXIT_NON_FINITE = 3
LAST_STEPS = "slots/tables/words/embedding/last_step"


def run(workdir, *, data_dir, strategy, on_bad_step, place, fault, bad_steps=(3,), every=1, **settings):
    """Trains 6 steps on 2 devices, logging, saving and evaluating after `every`. Returns the summary."""
    experiment = Experiment(
        data_dir=str(data_dir),
        task=functools.partial(
            NextToken,
            tables={"words": TableConfig(embed_dim=4)},
            inputs="words",
            outputs="words",
            body=functools.partial(lstm_body, num_layers=1, hidden_dim=4, dropout=0.2),
            head=functools.partial(
                FaultySoftmax,
                bad_steps=bad_steps,
                place=place,
                fault=fault,
                sampler=functools.partial(LogUniformSampler, num_sampled=16),
            ),
            window=3,
        ),
        groups=[Group(pattern=".*", update=Adam(learning_rate=0.01))],
        train_steps=6,
        global_batch_size=4,
        seed=1,
        log_every=every,
        eval_every=every,
        save_every=every,
        **settings,
        keep_checkpoints=10,
        on_bad_step=on_bad_step,
        eval_batch_size=20,
        probe_tokens=0,
    )
    return tiny_runs.train_here(experiment, workdir=workdir, strategy=strategy)


@pytest.mark.parametrize(("place", "fault"), [("loss", "nan"), ("d_candidate_rows", "inf")])
def test_skipped_step_leaves_no_trace(data_dir, mirrored, tmp_path, place, fault):
    """One replica's bad loss or gradient: all replicas keep weights, slots and state, and the run goes on."""
    summary = run(
        tmp_path, data_dir=data_dir, strategy=mirrored(2), on_bad_step="skip", place=place, fault=fault
    )
    assert summary["step"] == 6
    assert summary["skipped_steps"] == 1
    tensors = {step: tiny_runs.tensors(tmp_path, step) for step in range(1, 7)}
    assert tensors[3].keys() >= {"tables/words/embedding", LAST_STEPS, "state/0"}
    tiny_runs.assert_same_bits(tensors[4], tensors[3])
    for name in ("tables/words/embedding", LAST_STEPS, "state/0"):
        assert np.any(tensors[5][name] != tensors[4][name]), name
        assert np.any(tensors[3][name] != tensors[2][name]), name
    assert all(np.isfinite(value).all() for value in tensors[6].values())
    lines = tiny_runs.metrics(tmp_path)
    assert [line["skipped_steps"] for line in lines] == [0, 0, 0, 1, 1, 1]
    assert [line["sampled_loss_nats"] is None for line in lines] == [False] * 3 + [True] + [False] * 2


def test_stop_names_the_step_and_what_was_seen(data_dir, mirrored, tmp_path):
    """A gradient that is not finite on one of two replicas, under a finite loss."""
    arguments = {"data_dir": data_dir, "strategy": mirrored(2), "place": "d_hidden", "fault": "-inf"}
    with pytest.raises(NonFiniteError) as error:
        run(tmp_path, on_bad_step="stop", **arguments)
    assert "not finite at step 4: loss " in str(error.value)
    assert "loss nan" not in str(error.value)
    assert "gradient norm nan" in str(error.value) or "gradient norm inf" in str(error.value)
    assert "on_bad_step = 'skip'" in str(error.value)
    assert Checkpoints(tmp_path / "checkpoints").steps() == [1, 2, 3]
    assert [line["step"] for line in tiny_runs.metrics(tmp_path)] == [1, 2, 3]
    # Again: the same step; by setting, past it.
    with pytest.raises(NonFiniteError, match="at step 4"):
        run(tmp_path, on_bad_step="stop", **arguments)
    assert run(tmp_path, on_bad_step="skip", **arguments)["step"] == 6


def test_several_steps_in_a_call_find_the_same_bad_step(data_dir, mirrored, tmp_path):
    """Step 4 of 6, in calls of 1; in calls of 4 and 2, the bad one last; and resumed with calls of another size."""
    arguments = {"data_dir": data_dir, "strategy": mirrored(2), "place": "d_hidden", "fault": "nan"}
    run(tmp_path / "single", on_bad_step="skip", **arguments)
    expected = tiny_runs.tensors(tmp_path / "single", 6)
    summary = run(tmp_path / "calls", on_bad_step="skip", every=6, steps_per_call=4, **arguments)
    assert summary["skipped_steps"] == 1
    tiny_runs.assert_same_bits(tiny_runs.tensors(tmp_path / "calls", 6), expected)
    assert [line["skipped_steps"] for line in tiny_runs.metrics(tmp_path / "calls")] == [1]

    with pytest.raises(NonFiniteError, match=r"not finite at step 4: .*norm nan"):
        run(tmp_path / "resumed", on_bad_step="stop", every=3, steps_per_call=2, **arguments)
    assert Checkpoints(tmp_path / "resumed" / "checkpoints").steps() == [3]
    run(tmp_path / "resumed", on_bad_step="skip", every=6, steps_per_call=5, **arguments)
    tiny_runs.assert_same_bits(tiny_runs.tensors(tmp_path / "resumed", 6), expected)


def test_divergence_stops_with_its_exit_code_and_is_never_the_best(data_dir, tmp_path):
    """A learning rate past all bounds, on the shipped configuration, in a process of its own."""
    workdir = tmp_path / "run"
    arguments = tiny_runs.train_arguments(
        workdir=workdir, data_dir=data_dir, LEARNING_RATE=1e38, SAVE_EVERY=1, EVAL_EVERY=1
    )
    code, _, stderr = tiny_runs.run_forked("lmscale.train", arguments, log=tmp_path / "stop")
    assert code == EXIT_NON_FINITE, stderr
    assert "error: The loss or the gradient is not finite at step 2: loss " in stderr
    assert "Lower LEARNING_RATE" in stderr
    assert "Traceback" not in stderr
    # The first step was good, and led to weights beyond evaluation: saved, but not as the best.
    checkpoints = Checkpoints(workdir / "checkpoints")
    assert checkpoints.steps() == [1]
    assert checkpoints.best_step() is None
    assert not (workdir / "finished.json").exists()


def test_skipping_all_steps_still_ends(data_dir, tmp_path):
    """Nothing can be learned any more: the run says so step by step, ends, and has no best checkpoint."""
    workdir = tmp_path / "run"
    arguments = tiny_runs.train_arguments(
        workdir=workdir,
        data_dir=data_dir,
        cpu_devices=1,
        LEARNING_RATE=1e38,
        TRAIN_STEPS=8,
        EVAL_EVERY=4,
        SAVE_EVERY=4,
        **{"experiment.Experiment.on_bad_step": "skip"},
    )
    code, stdout, stderr = tiny_runs.run_forked("lmscale.train", arguments, log=tmp_path / "skip")
    assert code == 0, stderr
    assert stderr.count("skipped the update of step") == 7
    assert '"skipped_steps": 7' in stdout
    assert "NaN" not in stdout + (workdir / "finished.json").read_text()  # JSON has none.
    checkpoints = Checkpoints(workdir / "checkpoints")
    assert checkpoints.steps() == [4, 8]
    assert checkpoints.best_step() is None
    losses = [line["valid/exact_loss_nats"] for line in tiny_runs.metrics(workdir, "eval")]
    assert all(loss is None or not math.isfinite(loss) or loss > 1e6 for loss in losses)
