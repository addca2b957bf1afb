"""What TensorBoard shows of real runs: one that finished, and others that went on from its checkpoints."""

import shutil

import pytest
import tiny_runs
from boards import LOADERS, Board

LAST_STEP = tiny_runs.TINY_MACROS["TRAIN_STEPS"]


@pytest.fixture(scope="module")
def runs(data_dir, in_background, reference_run, tmp_path_factory):
    """The future of a --logdir with the runs `finished`, `extended` and `changed`.

    extended: a copy of the first that does ten steps more.
    changed: another work directory, with the checkpoints of the first and other settings, of which one is no macro.
    """
    logdir = tmp_path_factory.mktemp("runs")
    reference = reference_run(2)

    def make():
        finished, extended, changed = (logdir / name for name in ("finished", "extended", "changed"))
        shutil.copytree(reference.result(), finished)
        shutil.copytree(reference.result(), extended)
        changed.mkdir()
        shutil.copytree(finished / "checkpoints", changed / "checkpoints")
        changes = {"LEARNING_RATE": 0.005, "experiment.Experiment.clip_norm": 0.25}
        for workdir, macros in ((extended, {}), (changed, changes)):
            arguments = tiny_runs.train_arguments(
                workdir=workdir, data_dir=data_dir, TRAIN_STEPS=LAST_STEP + 10, **macros
            )
            code, _, stderr = tiny_runs.run_forked(
                "lmscale.train", arguments, log=logdir / workdir.name / "log"
            )
            assert code == 0, stderr
        return logdir

    return in_background(make)


@pytest.fixture(scope="module", params=LOADERS)
def board(runs, request):
    return Board(runs.result(), loader=request.param)


def trial_of(board, run):
    (trial,) = [trial for trial in board.hparams().values() if f"{run}/eval" in trial["runs"]]
    return trial


@pytest.mark.parametrize(
    ("run", "steps", "rate", "clip_norm"),
    [
        ("extended", LAST_STEP + 10, 0.01, 1.0),
        ("changed", LAST_STEP + 10, 0.005, 0.25),
    ],
)
def test_hparams_tell_what_runs_now(board, runs, run, steps, rate, clip_norm):
    trial = trial_of(board, run)
    assert trial["runs"] == [f"{run}/eval", f"{run}/train"]
    assert set(trial["statuses"]) == {"success"}
    shown = trial["hparams"]
    names = ("TRAIN_STEPS", "LEARNING_RATE", "experiment.Experiment.clip_norm")
    assert [shown[name] for name in names] == [steps, rate, clip_norm]
    # A number, a truth value, a text, a default, and what refers to something else.
    assert (
        shown["experiment.Experiment.probe_tokens"]
        == tiny_runs.TINY_MACROS["experiment.Experiment.probe_tokens"]
    )
    assert shown["samplers.LogUniformSampler.replacement"] is False
    assert shown["experiment.Experiment.on_bad_step"] == "stop"
    assert shown["next_token.NextToken.head"] == "@sampled.SampledSoftmax"
    assert shown["experiment.Experiment.groups"] == "[@rows/groups.Group(), @layers/groups.Group()]"
    last = tiny_runs.metrics(runs.result() / run, "eval")[-1]
    assert last["step"] == steps
    for tag in ("valid/exact_loss_nats", "valid/exact_perplexity"):
        assert trial["metrics"][tag] == pytest.approx(last[tag], rel=1e-6)


def test_columns_that_differ(board):
    assert board.differing_hparams() == {"TRAIN_STEPS", "LEARNING_RATE", "experiment.Experiment.clip_norm"}


@pytest.mark.parametrize(
    ("run", "first_steps"),
    [("finished", [0]), ("extended", [0, LAST_STEP + 1]), ("changed", [LAST_STEP + 1])],
)
def test_text_tells_what_ran_from_which_step_on(board, runs, run, first_steps):
    texts = board.texts(f"{run}/train")
    assert [step for step, _ in texts] == first_steps
    config = (runs.result() / run / "config.gin").read_text()
    shown = texts[-1][1]
    assert [line.strip() for line in shown.splitlines()] == [line.strip() for line in config.splitlines()]
