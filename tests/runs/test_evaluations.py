"""Evaluations inside a run: of a piece of the split, and of averages in place of the weights."""

import dataclasses

import numpy as np
import pytest
import tiny_experiments
import tiny_runs

from lmscale import dry_run
from lmscale.bodies.lstm import lstm_body
from lmscale.data.batches import EvaluationBatches
from lmscale.data.token_files import PreparedData
from lmscale.evaluation import Evaluator
from lmscale.parameters.averages import Averaged
from lmscale.parameters.update_rules import Adam
from lmscale.trainer import Trainer
from lmscale.workdir import Workdir

NUM_STEPS, DECAY = 6, 0.7


def body():
    return lstm_body(num_layers=1, hidden_dim=7, dropout=0.2)


def make_experiment(data_dir, **changes):
    """Six steps, of which each is logged and saved and every other evaluated, in 7 lanes that nothing divides."""
    adam = Adam(learning_rate=0.05, beta_1=0.0)
    settings = {
        "data_dir": str(data_dir),
        "groups": tiny_experiments.one_rule(Averaged(update=adam, decay=DECAY)),
        "train_steps": NUM_STEPS,
        "eval_every": 2,
        "keep_checkpoints": NUM_STEPS,
        "eval_batch_size": 7,
        "probe_tokens": 0,
    }
    task = tiny_experiments.language_model(body=body, head=tiny_experiments.sampled(), eval_window=13)
    return tiny_experiments.experiment(task=task, **(settings | changes))


def losses(workdir):
    return [line["valid/exact_loss_nats"] for line in tiny_runs.metrics(workdir, "eval")]


def evaluate(experiment, *, tensors, strategy, tokens):
    """Exact loss of a piece of text, in nats, by a model whose parameters are `tensors`."""
    data = PreparedData.open(experiment.data_dir)
    experiment = dataclasses.replace(experiment, evaluate_averages=False)
    trainer = Trainer(experiment, data=data, strategy=strategy)
    for parameter in trainer.model.parameters():
        if parameter.shape and parameter.path in tensors:
            parameter.write(0, tensors[parameter.path].astype(parameter.dtype))
    batches = EvaluationBatches(tokens, batch_size=7, window=13, eos_id=data.eos_id)
    return Evaluator.of_experiment(experiment, trainer.model, strategy=strategy).evaluate(batches).loss_nats


@pytest.fixture(scope="module")
def averaged_run(data_dir, mirrored, tmp_path_factory):
    """A run on 2 devices that evaluates averages."""
    workdir = tmp_path_factory.mktemp("averaged") / "run"
    tiny_runs.train_here(
        make_experiment(data_dir, evaluate_averages=True), workdir=workdir, strategy=mirrored(2)
    )
    return workdir


# ------------------------------------------------------------------------------------------------- A piece of the split


@pytest.mark.parametrize("eval_tokens", [97, 100_000])
def test_eval_tokens_bound_the_evaluation(data_dir, mirrored, tmp_path, eval_tokens):
    experiment = make_experiment(data_dir, eval_tokens=eval_tokens, train_steps=2)
    summary = tiny_runs.train_here(experiment, workdir=tmp_path / "run", strategy=mirrored(1))
    valid = PreparedData.open(data_dir).split("valid")
    evaluated = min(eval_tokens, len(valid))
    (line,) = tiny_runs.metrics(tmp_path / "run", "eval")
    assert line["valid/eval_tokens"] == summary["validation_tokens"] == evaluated
    assert line["valid/exact_loss_nats"] == summary["validation_loss_nats"]
    # The first ones of the split, in lanes of their own.
    tensors = tiny_runs.tensors(tmp_path / "run", 2)
    expected = evaluate(experiment, tensors=tensors, strategy=mirrored(1), tokens=valid[:evaluated])
    assert line["valid/exact_loss_nats"] == pytest.approx(expected, rel=1e-6)
    # Evaluated by itself, it is the whole split.
    with Workdir(tmp_path / "run", readonly=True) as workdir:
        report = tiny_runs.evaluate_checkpoint(
            experiment, workdir=workdir, strategy=mirrored(1), split="valid", checkpoint="latest"
        )
    assert report["tokens"] == len(valid)
    same = report["loss_nats"] == pytest.approx(line["valid/exact_loss_nats"], rel=1e-6)
    assert same == (evaluated == len(valid))


def test_a_resumed_run_that_is_at_its_end_still_tells_the_tokens(data_dir, mirrored, tmp_path):
    experiment = make_experiment(data_dir, eval_tokens=97, train_steps=2)
    first = tiny_runs.train_here(experiment, workdir=tmp_path / "run", strategy=mirrored(1))
    assert tiny_runs.train_here(experiment, workdir=tmp_path / "run", strategy=mirrored(1)) == first


# ------------------------------------------------------------------------------------------------------------- Averages


def test_averages_are_evaluated_and_do_not_change_the_training(data_dir, mirrored, averaged_run, tmp_path):
    tiny_runs.train_here(make_experiment(data_dir), workdir=tmp_path / "run", strategy=mirrored(2))
    lines = [tiny_runs.without_times(tiny_runs.metrics(w)) for w in (tmp_path / "run", averaged_run)]
    assert len(lines[0]) == NUM_STEPS
    assert lines[0] == lines[1]
    assert all(
        weights != averages
        for weights, averages in zip(losses(tmp_path / "run"), losses(averaged_run), strict=True)
    )


def test_against_averages_of_the_checkpoints(data_dir, mirrored, averaged_run):
    """The loss of a model that holds sum_i (1 - d) d^(t - i) w_i / (1 - d^t), summed in float64."""
    valid = PreparedData.open(data_dir).split("valid")
    checkpoints = [tiny_runs.tensors(averaged_run, step) for step in range(1, NUM_STEPS + 1)]
    paths = [path for path in checkpoints[0] if path.startswith(("tables/", "layers/"))]
    paths = [path for path in paths if checkpoints[0][path].dtype == np.float32]
    assert len(paths) == 6  # Embedding, bias, three of the LSTM, one of the projection.
    for step, loss in zip((2, 4, 6), losses(averaged_run), strict=True):
        weights = [(1 - DECAY) * DECAY ** (step - i) / (1 - DECAY**step) for i in range(1, step + 1)]
        averages = {
            path: sum(
                w * tensors[path].astype(np.float64)
                for w, tensors in zip(weights, checkpoints[:step], strict=True)
            )
            for path in paths
        }
        expected = evaluate(make_experiment(data_dir), tensors=averages, strategy=mirrored(1), tokens=valid)
        assert loss == pytest.approx(expected, rel=1e-5), step


def test_averages_resume_to_the_bit(data_dir, mirrored, averaged_run, tmp_path):
    workdir = tiny_runs.go_back(averaged_run, tmp_path / "resumed", step=3)
    experiment = make_experiment(data_dir, evaluate_averages=True)
    tiny_runs.train_here(experiment, workdir=workdir, strategy=mirrored(2))
    expected = tiny_runs.tensors(averaged_run, NUM_STEPS)
    assert {
        "slots/tables/words/embedding/average",
        "slots/layers/lstm_0/kernel/averaged_at",
    } <= expected.keys()
    tiny_runs.assert_same_bits(tiny_runs.tensors(workdir, NUM_STEPS), expected)
    for name in ("train", "eval"):
        resumed, whole = (
            tiny_runs.without_times(tiny_runs.metrics(w, name)) for w in (workdir, averaged_run)
        )
        assert resumed == whole


@pytest.mark.parametrize("devices", [1, 2, 3])
def test_the_evaluation_of_a_checkpoint_gives_the_last_value_of_the_run(
    data_dir, mirrored, averaged_run, devices
):
    before = tiny_runs.snapshot(averaged_run)
    experiment = make_experiment(data_dir, evaluate_averages=True)
    with Workdir(averaged_run, readonly=True) as workdir:
        arguments = {"workdir": workdir, "strategy": mirrored(devices), "split": "valid"}
        report = tiny_runs.evaluate_checkpoint(experiment, checkpoint="latest", **arguments)
        early = tiny_runs.evaluate_checkpoint(experiment, checkpoint="2", **arguments)
    assert (report["step"], early["step"]) == (6, 2)
    assert report["loss_nats"] == pytest.approx(losses(averaged_run)[-1], rel=1e-6)
    assert early["loss_nats"] == pytest.approx(losses(averaged_run)[0], rel=1e-6)
    assert tiny_runs.snapshot(averaged_run) == before


def test_there_must_be_averages(data_dir, mirrored, tmp_path):
    experiment = make_experiment(data_dir, evaluate_averages=True, groups=tiny_experiments.one_rule())
    message = r"evaluate_averages needs .* averages\.Averaged\. Received: none\."
    with pytest.raises(ValueError, match=message):
        tiny_runs.train_here(experiment, workdir=tmp_path / "run", strategy=mirrored(1))
    with pytest.raises(ValueError, match="evaluate_averages needs"):
        dry_run.print_report(experiment, num_devices=1)


def test_there_must_be_averages_in_an_evaluation_of_them(averaged_run, data_dir, mirrored):
    experiment = make_experiment(data_dir, evaluate_averages=True, groups=tiny_experiments.one_rule())
    with (
        Workdir(averaged_run, readonly=True) as workdir,
        pytest.raises(ValueError, match="evaluate_averages needs"),
    ):
        tiny_runs.evaluate_checkpoint(
            experiment, workdir=workdir, strategy=mirrored(1), split="valid", checkpoint="latest"
        )
