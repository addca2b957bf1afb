"""SavedModels, loaded where lmscale cannot be imported, beside what lmscale itself says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tiny_runs

from lmscale import configuration
from lmscale.benchmarks import planted
from lmscale.data.histories import LeaveLastOut, prepare_histories
from lmscale.data.token_files import PreparedData
from lmscale.recommendation import Recommender
from lmscale.restored import RestoredModel
from lmscale.scoring import Scorer
from lmscale.serving.export import ExportSettings, export, open_run
from lmscale.workdir import Workdir

TEXTS = [["word5", "word9", "word2", "word5"], ["word17"], ["nowhere", "word3", "word3"], ["word8", "word4"]]
K = 4


def load(name, folder, **macros):
    macros = {"TRAIN_STEPS": 4, "LOG_EVERY": 4, "EVAL_EVERY": 4, "SAVE_EVERY": 4} | macros
    return configuration.load(
        [str(tiny_runs.REPOSITORY / "configs" / f"{name}.gin")],
        [f"{key} = {value!r}" for key, value in macros.items()],
    )


@pytest.fixture(scope="module")
def language_model(data_dir, mirrored, tmp_path_factory):
    """(configuration, workdir): a tied LSTM with biases."""
    folder = tmp_path_factory.mktemp("language_model")
    macros = tiny_runs.TINY_MACROS | {"DATA_DIR": str(data_dir)}
    config = load("quickstart", folder, **(macros | {"TRAIN_STEPS": 4, "EVAL_EVERY": 4, "SAVE_EVERY": 4}))
    tiny_runs.train_here(
        config.experiment, workdir=folder / "run", strategy=mirrored(1), config_text=config.text
    )
    return config, folder / "run"


@pytest.fixture(scope="module")
def next_item(mirrored, tmp_path_factory):
    folder = tmp_path_factory.mktemp("next_item")
    planted.write_histories(folder / "histories.txt", users=40, items=23, signal=0.8, seed=1)
    prepare_histories([folder / "histories.txt"], output=folder / "data", rule=LeaveLastOut())
    config = load(
        "quickstart_next_item",
        folder,
        DATA_DIR=str(folder / "data"),
        GLOBAL_BATCH_SIZE=12,
        NUM_SAMPLED=11,
        WINDOW=5,
    )
    tiny_runs.train_here(
        config.experiment, workdir=folder / "run", strategy=mirrored(1), config_text=config.text
    )
    return config, folder / "run"


def write(run, output, **settings):
    config, path = run
    with Workdir(path, readonly=True) as workdir:
        return export(
            config.experiment,
            saved=open_run(workdir, "latest"),
            output=output,
            settings=ExportSettings(**{"k": K, "batch_size": 3, **settings}),
        )


def serve(output, calls):
    """Results of the signatures, in a process without lmscale."""
    done = subprocess.run(
        [
            sys.executable,
            str(Path(__file__).with_name("plain_tensorflow.py")),
            str(output),
            json.dumps(calls),
        ],
        env={**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def padded(texts):
    longest = max(map(len, texts))
    return [text + [""] * (longest - len(text)) for text in texts]


def restored(run, strategy, workdir):
    model = RestoredModel(run[0].experiment, workdir=workdir, strategy=strategy)
    model.restore()
    return model


def test_a_language_model(language_model, mirrored, tmp_path):
    """More texts than are computed at a time; one is longer than what is read; a word is unknown."""
    report = write(language_model, tmp_path / "served", length=9)
    assert (report["step"], report["signatures"]) == (4, ["next_words", "score", "embed"])
    assert report["bytes"] == sum(f.stat().st_size for f in (tmp_path / "served").rglob("*") if f.is_file())
    long = [f"word{i % 11}" for i in range(2, 15)]
    behind = [[*text, "word3"] for text in TEXTS]
    served = serve(
        tmp_path / "served",
        [
            ("score", {"words": padded(behind)}),
            ("next_words", {"words": padded([*TEXTS, long])}),
            ("next_words", {"words": padded([*TEXTS, long[:4] + long[-9:]])}),
            ("embed", {"words": ["word7", "nowhere"]}),
        ],
    )
    assert served["signatures"] == ["embed", "next_words", "score"]
    score, best, same, embed = served["results"]
    # Nothing before the last nine words is read.
    assert same == best
    with Workdir(language_model[1], readonly=True) as workdir:
        model = restored(language_model, mirrored(1), workdir)
        words = model.data.vocabulary
        ids = [np.array([words.ids[word] for word in text], np.int32) for text in behind]
        expected = [line.log_probs for line in Scorer(model, batch_size=4).score_lines(ids)]
        every = [np.concatenate([ids[1][:1], [row]]).astype(np.int32) for row in range(len(words))]
        of_second = [line.log_probs[1] for line in Scorer(model, batch_size=64).score_lines(every)]
        rows = model.model.tables["words"].read_rows("embedding", 0, len(words))
    for line, log_probs in zip(score["log_probs"], expected, strict=True):
        np.testing.assert_allclose(line[: len(log_probs)], log_probs, rtol=1e-5)
        assert line[len(log_probs) :] == [0] * (len(line) - len(log_probs))
    order = sorted(range(len(words)), key=lambda row: (-of_second[row], row))[:K]
    assert best["words"][1] == [words.tokens[row] for row in order]
    np.testing.assert_allclose(best["log_probs"][1], [of_second[row] for row in order], rtol=1e-5)
    np.testing.assert_allclose(embed["rows"], rows[[words.ids["word7"], words.unk_id]], rtol=1e-6)


def test_int8_rows(language_model, tmp_path):
    """A byte a number: what is said changes little, and the files are as small as that makes them."""
    whole = write(language_model, tmp_path / "whole", signatures=("score",), length=9)
    small = write(language_model, tmp_path / "small", signatures=("score",), length=9, int8=True)
    texts = [[f"word{i * j % 97 + 2}" for i in range(1, 9)] for j in range(1, 30)]
    losses = [
        -np.mean(serve(tmp_path / name, [("score", {"words": texts})])["results"][0]["log_probs"])
        for name in ("whole", "small")
    ]
    assert losses[0] != losses[1]
    assert abs(np.exp(losses[1] - losses[0]) - 1) < 0.005
    # Of each row, three of four bytes go, and a scale comes.
    num_rows, dim = tiny_runs.VOCAB_SIZE, tiny_runs.TINY_MACROS["EMBED_DIM"]
    sizes = [
        sum(path.stat().st_size for path in (tmp_path / name / "variables").glob("*.data-*"))
        for name in ("whole", "small")
    ]
    # The names of what is saved are there, too.
    assert sizes[0] - sizes[1] == pytest.approx(num_rows * (3 * dim - 4), abs=500)
    assert small["bytes"] < whole["bytes"]


def test_a_next_item_model(next_item, mirrored, tmp_path):
    """Histories longer than the window, a repeated item, one that nobody knows."""
    assert write(next_item, tmp_path / "served")["signatures"] == ["recommend", "embed"]
    histories = [["item3"], ["item4", "item9", "item4"], [f"item{i}" for i in range(8)], ["item1", "item0"]]
    asked = [*histories[:3], ["item1", "unheard", "item0"], ["unheard"], []]
    served = serve(tmp_path / "served", [("recommend", {"items": padded(asked)})])
    (found,) = served["results"]
    with Workdir(next_item[1], readonly=True) as workdir:
        recommender = Recommender(restored(next_item, mirrored(1), workdir))
        ids = [recommender.ids(history, place="here") for history in histories]
        expected = list(recommender.best(ids, k=K, exclude_seen=True))
        tokens = recommender.vocabulary.tokens
    # Nothing is known of the last two.
    assert (found["items"][4:], found["log_probs"][4:]) == ([[""] * K] * 2, [[-np.inf] * K] * 2)
    for items, log_probs, (best, its_log_probs) in zip(
        found["items"][:4], found["log_probs"][:4], expected, strict=True
    ):
        assert items == [tokens[row] for row in best]
        np.testing.assert_allclose(log_probs, its_log_probs, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"signatures": ("recommend",)},
            "A signature must be one that the task NextToken has: next_words, score",
        ),
        ({"table": "items"}, r"The table must be one of the run's, words\. Received: items"),
    ],
)
def test_refused(language_model, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        write(language_model, tmp_path / "served", **settings)
    assert not (tmp_path / "served").exists()


def test_a_table_whose_rows_have_no_words(language_model, tmp_path, monkeypatch):
    """As one of values that are hashed into buckets."""
    monkeypatch.setattr(PreparedData, "vocabulary_files", {})
    with pytest.raises(
        ValueError, match=r"embed reads must have words\. Received: words, whose rows are num"
    ):
        write(language_model, tmp_path / "served", signatures=("embed",))
    assert not (tmp_path / "served").exists()


def test_a_folder_appears_when_it_is_whole(language_model, tmp_path, monkeypatch):
    """An export that is stopped leaves nothing behind, and takes away what a killed one has left."""
    output, seen = tmp_path / "1", []
    (tmp_path / ".1.partial").mkdir()
    (tmp_path / ".1.partial" / "left").touch()
    save = tf.saved_model.save

    def stopped(*args, **kwargs):
        save(*args, **kwargs)
        seen.append(output.exists())
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tf.saved_model, "save", stopped)
        with pytest.raises(KeyboardInterrupt):
            write(language_model, output, signatures=("embed",))
    assert (seen, list(tmp_path.iterdir())) == ([False], [])
    output.mkdir()
    write(language_model, output, signatures=("embed",))
    assert [path.name for path in tmp_path.iterdir()] == ["1"]
    assert (output / "saved_model.pb").exists()


def test_a_folder_that_holds_something(language_model, tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(ValueError, match=r"--output must be new or empty"):
        write(language_model, tmp_path)
