"""Shipped configurations at tiny sizes: bodies, tasks, an untied model, and a run that starts from another's layers."""

import shutil

import numpy as np
import pytest
import tiny_runs

from lmscale import configuration
from lmscale.data.token_files import PreparedData
from lmscale.start import start_from_elsewhere
from lmscale.trainer import Trainer

CONFIGS = tiny_runs.REPOSITORY / "configs"
DEVICES = (1, 2, 3)
NUM_STEPS = 2
# Only the order of float32 sums differs.
TOLERANCE = 1e-5


def load(name, *, data_dir, **macros):
    """The configuration `name`, with tiny sizes and `NUM_STEPS` steps; `macros` of None leave a setting as it is."""
    settings = tiny_runs.TINY_MACROS | {"DATA_DIR": str(data_dir), "TRAIN_STEPS": NUM_STEPS}
    settings |= {"EVAL_EVERY": NUM_STEPS, "SAVE_EVERY": 1} | macros
    settings = {key: value for key, value in settings.items() if value is not None}
    return configuration.load(
        [str(CONFIGS / f"{name}.gin")], [f"{key} = {value!r}" for key, value in settings.items()]
    )


def train(config, *, workdir, strategy):
    tiny_runs.train_here(
        config.experiment,
        workdir=workdir,
        strategy=strategy,
        config_text=config.text,
        hparams=config.settings,
    )
    return workdir


def assert_same_losses(workdirs, *, train_tags=("sampled_loss_nats",), eval_tags=()):
    """Runs on 1 and on more devices have logged the same losses, of training and of evaluation."""
    first, *others = workdirs
    for name, tags in (
        ("train", (*train_tags, "gradient_norm")),
        (
            "eval",
            ("valid/exact_loss_nats", "probe/exact_loss_nats", "probe/sampled_loss_nats", *eval_tags),
        ),
    ):
        expected = tiny_runs.metrics(first, name)
        assert len(expected) == {"train": NUM_STEPS, "eval": 1}[name]
        for other in others:
            for tag in tags:
                values = [
                    [line[tag] for line in lines] for lines in (tiny_runs.metrics(other, name), expected)
                ]
                np.testing.assert_allclose(*values, rtol=TOLERANCE, err_msg=f"{other.name}: {tag}")


TRANSFORMER = {"HIDDEN_DIM": tiny_runs.TINY_MACROS["EMBED_DIM"], "NUM_HEADS": 2}
# {configuration: (other macros, tags of training losses, further ones of evaluations)}.
BODIES_AND_TASKS = {
    "quickstart_gru": ({}, ("sampled_loss_nats",), ()),
    "quickstart_lstmp": ({}, ("sampled_loss_nats",), ()),
    "quickstart_transformer": (TRANSFORMER, ("sampled_loss_nats",), ()),
    "quickstart_both_directions": (
        {"next_token.NextToken.eval_window": None, "both_directions.BothDirections.eval_window": 19},
        ("loss_nats", "next/sampled_loss_nats", "previous/sampled_loss_nats"),
        ("valid/next/exact_loss_nats", "valid/previous/exact_loss_nats"),
    ),
}


@pytest.mark.parametrize("name", BODIES_AND_TASKS)
def test_bodies_and_tasks(data_dir, mirrored, tmp_path, name):
    """Equal losses on any number of devices, dropout included; and what goes on ends as what nothing interrupted."""
    macros, train_tags, eval_tags = BODIES_AND_TASKS[name]
    config = load(name, data_dir=data_dir, **macros)
    workdirs = [train(config, workdir=tmp_path / f"on_{n}", strategy=mirrored(n)) for n in (1, 2, 3, 4)]
    assert_same_losses(workdirs, train_tags=train_tags, eval_tags=eval_tags)
    resumed = tiny_runs.go_back(workdirs[1], tmp_path / "resumed", step=1)
    train(config, workdir=resumed, strategy=mirrored(2))
    tiny_runs.assert_same_bits(
        tiny_runs.tensors(resumed, NUM_STEPS), tiny_runs.tensors(workdirs[1], NUM_STEPS)
    )


def test_untied(data_dir, mirrored, tmp_path):
    config = load("quickstart_untied", data_dir=data_dir)
    workdirs = [train(config, workdir=tmp_path / f"on_{n}", strategy=mirrored(n)) for n in DEVICES]
    assert_same_losses(workdirs)
    for n, workdir in zip(DEVICES, workdirs, strict=True):
        line = tiny_runs.metrics(workdir)[-1]
        tables = ("words_in", "words_out")
        rows = {f"rows_touched/{table}/shard_{i}" for table in tables for i in range(n)}
        assert {tag for tag in line if tag.startswith("rows_touched/")} == rows
    tensors = tiny_runs.tensors(workdirs[0], NUM_STEPS)
    shapes = {path: value.shape for path, value in tensors.items() if path.startswith("tables/")}
    assert shapes == {
        "tables/words_in/embedding": (tiny_runs.VOCAB_SIZE, 64),
        "tables/words_out/embedding": (tiny_runs.VOCAB_SIZE, tiny_runs.TINY_MACROS["EMBED_DIM"]),
        "tables/words_out/bias": (tiny_runs.VOCAB_SIZE,),
    }
    # By its own initialiser, and by its own rule.
    assert np.std(tensors["tables/words_in/embedding"]) == pytest.approx(0.1, rel=0.02)
    assert "slots/tables/words_in/embedding/accumulator" in tensors
    assert "slots/tables/words_out/embedding/second_moment" in tensors


# ------------------------------------------------------------------------------------------------------- A warm start


@pytest.fixture(scope="module")
def source(mirrored, tmp_path_factory):
    """The work directory of a run on other data, with another vocabulary."""
    directory = tmp_path_factory.mktemp("source")
    data = tiny_runs.write_data(directory / "data", vocab_size=499, seed=3)
    return train(load("quickstart", data_dir=data), workdir=directory / "run", strategy=mirrored(2))


@pytest.fixture(scope="module")
def warm_runs(data_dir, mirrored, source, tmp_path_factory):
    """{devices: work directory} of runs that started from `source`, which is where it was no more."""
    directory = tmp_path_factory.mktemp("warm")
    copy = shutil.copytree(source, directory / "source")
    config = load("book_from_wikitext2", data_dir=data_dir, SOURCE=str(copy))
    workdirs = {n: train(config, workdir=directory / f"on_{n}", strategy=mirrored(n)) for n in DEVICES}
    shutil.rmtree(copy)
    return workdirs


@pytest.fixture(scope="module")
def cold_run(data_dir, mirrored, tmp_path_factory):
    """The work directory of a run that starts from nothing else, where an earlier start left reports."""
    workdir = tmp_path_factory.mktemp("cold")
    for name in ("warm_start.txt", "pretrained_words.txt", "mine.txt"):
        (workdir / name).write_text("of an earlier start\n")
    return train(load("quickstart", data_dir=data_dir), workdir=workdir, strategy=mirrored(1))


def test_warm_started_on_any_number_of_devices(warm_runs, cold_run):
    assert_same_losses(list(warm_runs.values()))
    losses = [
        line["sampled_loss_nats"] for w in (cold_run, warm_runs[1]) for line in tiny_runs.metrics(w)[:1]
    ]
    assert losses[0] != losses[1]


def test_no_report_of_an_earlier_start_is_left(cold_run):
    assert sorted(path.name for path in cold_run.glob("*.txt")) == ["mine.txt", "vocab.txt"]


def test_layers_start_from_the_source_and_nothing_else_does(data_dir, mirrored, source):
    config = load("book_from_wikitext2", data_dir=data_dir, SOURCE=str(source))

    def parameters(*, start):
        trainer = Trainer(config.experiment, data=PreparedData.open(data_dir), strategy=mirrored(3))
        if start:
            reports = start_from_elsewhere(config.experiment, trainer)
            assert reports.keys() == {"warm_start"}
        return {p.path: p.read(0, p.shape[0]) for p in trainer.parameters() if p.shape}

    warm, cold = parameters(start=True), parameters(start=False)
    loaded = {f"layers/lstm_{i}/{name}" for i in range(2) for name in ("kernel", "recurrent_kernel", "bias")}
    saved = tiny_runs.tensors(source, NUM_STEPS)
    tiny_runs.assert_same_bits({p: warm[p] for p in loaded}, {p: saved[p] for p in loaded})
    rest = cold.keys() - loaded
    assert {"tables/words/embedding", "layers/projection/kernel"} <= rest
    tiny_runs.assert_same_bits({p: warm[p] for p in rest}, {p: cold[p] for p in rest})
    assert all(np.any(warm[p] != cold[p]) for p in loaded)


def test_the_report_is_kept(warm_runs):
    for workdir in warm_runs.values():
        report = (workdir / "warm_start.txt").read_text()
        assert f"step {NUM_STEPS}" in report
        assert "6 loaded" in report
        for path in ("layers/lstm_0/kernel", "layers/lstm_1/bias"):
            assert f"{path}  " in report
        assert (workdir / "vocab.txt").exists()


@pytest.mark.parametrize("devices", [1, 3])
def test_a_resume_does_not_read_the_source(data_dir, mirrored, warm_runs, tmp_path, devices):
    """It is gone; what goes on ends as what nothing interrupted, and keeps the report."""
    workdir = tiny_runs.go_back(warm_runs[devices], tmp_path / "resumed", step=1)
    config = configuration.load([str(workdir / "config.gin")])
    assert not (warm_runs[devices].parent / "source").exists()
    train(config, workdir=workdir, strategy=mirrored(devices))
    tiny_runs.assert_same_bits(
        tiny_runs.tensors(workdir, NUM_STEPS), tiny_runs.tensors(warm_runs[devices], NUM_STEPS)
    )
    assert (workdir / "warm_start.txt").read_bytes() == (warm_runs[devices] / "warm_start.txt").read_bytes()


def test_a_new_run_needs_the_source(data_dir, mirrored, tmp_path):
    config = load("book_from_wikitext2", data_dir=data_dir, SOURCE=str(tmp_path / "gone"))
    with pytest.raises(ValueError, match=str(tmp_path / "gone")):
        train(config, workdir=tmp_path / "run", strategy=mirrored(1))
