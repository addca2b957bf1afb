"""A run that starts with the slots of another goes on as that one does: on the same batch, bit for bit."""

import dataclasses
import functools

import numpy as np
import pytest
import tiny_experiments
import tiny_runs
from tiny_experiments import language_model, tied

from lmscale.bodies.lstm import lstm_body
from lmscale.data.batches import ContiguousBatches
from lmscale.parameters.activity import Always, From
from lmscale.parameters.averages import Averaged
from lmscale.parameters.groups import Group
from lmscale.parameters.update_rules import Adam
from lmscale.parameters.warm_start import WarmStart
from lmscale.workdir import Workdir

# The old run's steps, those before the checkpoint that the new one starts from, and those at which its rows rest.
NUM_STEPS, NUM_SAVED, NUM_RESTED = 9, 5, 2


def experiment(data_dir, *, rows_active, **changes):
    averaged_adam = Averaged(update=Adam(learning_rate=0.03, beta_2=0.95), decay=0.8)
    return tiny_experiments.experiment(
        task=language_model(
            body=functools.partial(lstm_body, num_layers=1, hidden_dim=7), **tied(embed_dim=5)
        ),
        data_dir=str(data_dir),
        groups=[
            Group(pattern="tables/.*", update=averaged_adam, active=rows_active),
            Group(pattern="layers/.*", update=Adam(learning_rate=0.01)),
        ],
        evaluate_averages=True,
        keep_checkpoints=NUM_STEPS,
        **changes,
    )


@pytest.fixture(scope="module")
def one_batch():
    """Every step has the batch of step 0, so that it does not matter at which step a run is."""
    at = ContiguousBatches.at
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ContiguousBatches, "at", lambda self, step, *examples: at(self, 0, *examples))
        yield


@pytest.fixture(scope="module")
def old(mirrored, data_dir, one_batch, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("old") / "run"
    run = experiment(data_dir, rows_active=From(step=NUM_RESTED), train_steps=NUM_STEPS, eval_every=NUM_STEPS)
    tiny_runs.train_here(run, workdir=workdir, strategy=mirrored(2))
    return workdir


@pytest.fixture(scope="module", params=[1, 2])
def new(request, mirrored, data_dir, old, tmp_path_factory):
    """(work directory, experiment, strategy) of a run whose rows never rest; its steps count from 0."""
    num_steps = NUM_STEPS - NUM_SAVED
    start = WarmStart(checkpoint=str(old / "checkpoints" / f"step_{NUM_SAVED:08d}"), slots=True)
    run = experiment(
        data_dir, rows_active=Always(), train_steps=num_steps, eval_every=num_steps, warm_start=start
    )
    workdir, strategy = tmp_path_factory.mktemp("new") / "run", mirrored(request.param)
    tiny_runs.train_here(run, workdir=workdir, strategy=strategy)
    return workdir, run, strategy


def test_it_goes_on_as_the_old_run_does(old, new):
    workdir, run, strategy = new
    expected = tiny_runs.tensors(old, NUM_STEPS)
    actual = tiny_runs.tensors(workdir, run.train_steps)
    assert actual.keys() == expected.keys()
    compare = np.testing.assert_array_equal
    if strategy.num_replicas_in_sync != 2:  # Sums are of another order.
        compare = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-6)
    for path, value in expected.items():
        compare(actual[path], value, err_msg=path)
    # As the clock has it, without the steps at which the rows rested.
    assert expected["slots/tables/words/embedding/last_step"].max() == NUM_STEPS - NUM_RESTED
    assert expected["slots/layers/lstm_0/kernel/last_step"].max() == NUM_STEPS
    losses = [tiny_runs.metrics(of, "eval")[-1]["valid/exact_loss_nats"] for of in (old, workdir)]
    np.testing.assert_allclose(*losses, rtol=1e-6)


def test_the_clocks_go_on_after_a_resume(new, tmp_path):
    workdir, run, strategy = new
    resumed = tiny_runs.go_back(workdir, tmp_path / "resumed", step=2)
    tiny_runs.train_here(run, workdir=resumed, strategy=strategy)
    steps = [tiny_runs.tensors(of, run.train_steps) for of in (resumed, workdir)]
    tiny_runs.assert_same_bits(*steps)


def test_an_evaluation_knows_the_clocks(new):
    """Of averages, which are corrected by what the clock has counted."""
    workdir, run, strategy = new
    with Workdir(workdir, readonly=True) as opened:
        result = tiny_runs.evaluate_checkpoint(
            run, workdir=opened, strategy=strategy, split="valid", checkpoint="latest"
        )
    expected = tiny_runs.metrics(workdir, "eval")[-1]["valid/exact_loss_nats"]
    np.testing.assert_allclose(result["loss_nats"], expected, rtol=1e-6)
    without = dataclasses.replace(run, evaluate_averages=False)
    with Workdir(workdir, readonly=True) as opened:
        other = tiny_runs.evaluate_checkpoint(
            without, workdir=opened, strategy=strategy, split="valid", checkpoint="latest"
        )
    assert abs(other["loss_nats"] - expected) > 1e-4
