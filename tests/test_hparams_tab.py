import math
import shutil
import socket

import pytest
from boards import LOADERS, Board
from tensorboard.backend.event_processing import event_accumulator

from lmscale import hparams_tab
from lmscale.event_files import SESSION, event_files
from lmscale.metrics import MetricsWriter
from lmscale.workdir import Workdir


def start(path, *, settings, resume_step=-1, steps=(10, 20), finish=False, loss=1.0):
    """What a start of a run writes: it logs and evaluates at each of the steps."""
    with Workdir(path) as workdir:
        hparams_tab.list_run(workdir, settings=settings)
        with (
            MetricsWriter(workdir.train_dir, resume_step=resume_step) as train,
            MetricsWriter(workdir.eval_dir, resume_step=resume_step) as evaluation,
        ):
            for step in steps:
                train.scalars(step, {"sampled_loss_nats": loss + step})
                evaluation.scalars(step, {"valid/exact_loss_nats": loss - step})
        if finish:
            hparams_tab.mark_finished(workdir)


def trials(board):
    """The table without the names of the trials, in their order."""
    return [trial for _, trial in sorted(board.hparams().items())]


@pytest.mark.parametrize("loader", LOADERS)
def test_a_run_is_one_row_with_training_and_validation_metrics(tmp_path, loader):
    start(tmp_path / "runs" / "a", settings={"SEED": 1})
    for logdir, prefix in ((tmp_path / "runs" / "a", ""), (tmp_path / "runs", "a/"), (tmp_path, "runs/a/")):
        (trial,) = trials(Board(logdir, loader=loader))
        assert trial == {
            "runs": [f"{prefix}eval", f"{prefix}train"],
            "statuses": ["unknown", "unknown"],
            "hparams": {"SEED": 1},
            "metrics": {"sampled_loss_nats": 21.0, "valid/exact_loss_nats": -19.0},
        }


@pytest.mark.parametrize("loader", LOADERS)
def test_each_work_directory_is_a_trial(tmp_path, loader):
    """With equal settings too, and with equal names in different places."""
    start(tmp_path / "x" / "run", settings={"SEED": 1, "clip_norm": 1.0}, loss=1.0)
    start(tmp_path / "y" / "run", settings={"SEED": 1, "clip_norm": 0.25}, loss=2.0)
    start(tmp_path / "z", settings={"SEED": 1, "clip_norm": 0.25}, loss=3.0)
    board = Board(tmp_path, loader=loader)
    shown = [(trial["hparams"], trial["metrics"]["sampled_loss_nats"]) for trial in trials(board)]
    assert shown == [
        ({"SEED": 1, "clip_norm": 1.0}, 21.0),
        ({"SEED": 1, "clip_norm": 0.25}, 22.0),
        ({"SEED": 1, "clip_norm": 0.25}, 23.0),
    ]
    assert board.differing_hparams() == {"clip_norm"}


@pytest.mark.parametrize("loader", LOADERS)
def test_a_resumed_run_shows_what_runs_now(tmp_path, loader):
    """Killed, finished, extended: the row stays one, its trial the same, its status never ahead of the run."""
    path = tmp_path / "run"
    names = []

    def row():
        ((name, trial),) = Board(tmp_path, loader=loader).hparams().items()
        names.append(name)
        return trial["hparams"], set(trial["statuses"]), trial["metrics"]["valid/exact_loss_nats"]

    start(path, settings={"TRAIN_STEPS": 20, "ONLY_ONCE": 1})
    assert row() == ({"TRAIN_STEPS": 20, "ONLY_ONCE": 1}, {"unknown"}, -19.0)
    start(path, settings={"TRAIN_STEPS": 30}, resume_step=10, steps=(20, 30), finish=True)
    assert row() == ({"TRAIN_STEPS": 30}, {"success"}, -29.0)
    start(path, settings={"TRAIN_STEPS": 40}, resume_step=30, steps=(40,))
    assert row() == ({"TRAIN_STEPS": 40}, {"unknown"}, -39.0)
    start(path, settings={"TRAIN_STEPS": 40}, resume_step=40, steps=(), finish=True)
    assert row() == ({"TRAIN_STEPS": 40}, {"success"}, -39.0)
    assert len(set(names)) == 1
    assert names[0] == f"run ({socket.gethostname()}:{path})"
    # Of the sessions, that of the last start is left, and that it finished.
    assert [len(event_files(path / name, ending=SESSION)) for name in ("train", "eval")] == [2, 2]


@pytest.mark.parametrize("loader", LOADERS)
def test_a_running_tensorboard_shows_all_points_and_the_first_settings(tmp_path, loader):
    """Files that it has read are removed under its hands: what comes later is read all the same."""
    path = tmp_path / "run"
    start(path, settings={"TRAIN_STEPS": 20}, finish=True)
    board = Board(tmp_path, loader=loader)
    for last_step in (30, 40):
        board.reload()
        start(
            path,
            settings={"TRAIN_STEPS": last_step},
            resume_step=last_step - 10,
            steps=(last_step,),
            finish=True,
        )
    expected = [(step, 1.0 - step) for step in (10, 20, 30, 40)]
    board.reload_until(lambda: board.scalars("run/eval", "valid/exact_loss_nats") == expected)
    assert board.scalars("run/eval", "valid/exact_loss_nats") == expected
    (trial,) = trials(board)
    assert (trial["hparams"], trial["metrics"]["valid/exact_loss_nats"]) == ({"TRAIN_STEPS": 20}, -39.0)


def test_goes_on_where_the_start_before_was_killed_between_two_files(tmp_path):
    """Its session was there beside the one of an earlier start, or in `train/` alone."""
    path = tmp_path / "run"
    start(path, settings={"A": 1})
    kept = tmp_path / "kept"
    shutil.copytree(path, kept)
    start(path, settings={"A": 2})
    for file in event_files(kept / "train", ending=SESSION):
        shutil.copy(file, path / "train")
    for file in event_files(path / "eval", ending=SESSION):
        file.unlink()
    shutil.rmtree(kept)
    start(path, settings={"A": 3})
    assert [trial["hparams"] for trial in trials(Board(tmp_path))] == [{"A": 3}]


def test_the_session_is_no_start_of_the_metrics(tmp_path):
    """The first START of a directory hides nothing, so it must be there before the first restart."""
    start(tmp_path, settings={"A": 1}, resume_step=None, steps=(10, 20, 30))
    start(tmp_path, settings={"A": 1}, resume_step=10, steps=(20,))
    scripts = event_accumulator.EventAccumulator(str(tmp_path / "train")).Reload()
    assert [event.step for event in scripts.Scalars("sampled_loss_nats")] == [10, 20]
    assert Board(tmp_path).scalars("train", "sampled_loss_nats") == [(10, 11.0), (20, 21.0)]


def test_values_keep_their_kind(tmp_path):
    settings = {
        "VOCAB_SIZE": 1003,
        "RATE": 0.5,
        "BODY": "lstm",
        "TIED": True,
        "CLIP": None,
        "SIZES": (1, 2),
        "NAN": math.nan,
        "INFINITE": -math.inf,
        "EXACT": 2**53,
        "TOO_LARGE_FOR_FLOAT64": 2**53 + 1,
        "HUGE": 10**400,
        "EMPTY": "",
    }
    start(tmp_path, settings=settings)
    (trial,) = trials(Board(tmp_path))
    assert trial["hparams"] == {
        "VOCAB_SIZE": 1003,
        "RATE": 0.5,
        "BODY": "lstm",
        "TIED": True,
        "CLIP": "None",
        "SIZES": "(1, 2)",
        "NAN": "nan",
        "INFINITE": "-inf",
        "EXACT": 2**53,
        "TOO_LARGE_FOR_FLOAT64": str(2**53 + 1),
        "HUGE": str(10**400),
        "EMPTY": "",
    }
    assert trial["hparams"]["TIED"] is True


@pytest.mark.parametrize("loader", LOADERS)
def test_a_loss_that_is_not_a_number_leaves_the_tab_working(tmp_path, loader):
    start(tmp_path / "a", settings={"A": 1}, loss=math.nan)
    start(tmp_path / "b", settings={"A": 2})
    losses = [trial["metrics"]["valid/exact_loss_nats"] for trial in trials(Board(tmp_path, loader=loader))]
    assert math.isnan(losses[0])
    assert losses[1] == -19.0
