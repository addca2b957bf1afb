"""`lmscale.recommend`: the items that a plain full sort of all scores puts first, on any number of devices."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import tiny_runs

from lmscale import configuration
from lmscale.benchmarks import planted
from lmscale.data.histories import LeaveLastOut, prepare_histories
from lmscale.recommendation import Recommender
from lmscale.restored import RestoredModel
from lmscale.workdir import Workdir

NUM_ITEMS, WINDOW = 23, 5


@pytest.fixture(scope="module")
def run(mirrored, tmp_path_factory):
    """(configuration, workdir of a run of four steps)."""
    folder = tmp_path_factory.mktemp("recommend")
    planted.write_histories(folder / "histories.txt", users=40, items=NUM_ITEMS, signal=0.8, seed=1)
    prepare_histories([folder / "histories.txt"], output=folder / "data", rule=LeaveLastOut())
    macros = {"LOG_EVERY": 1, "EVAL_EVERY": 4, "SAVE_EVERY": 4, "TRAIN_STEPS": 4, "GLOBAL_BATCH_SIZE": 12}
    macros |= {"NUM_SAMPLED": 11, "WINDOW": WINDOW, "DATA_DIR": str(folder / "data")}
    config = configuration.load(
        [str(tiny_runs.REPOSITORY / "configs" / "quickstart_next_item.gin")],
        [f"{name} = {value!r}" for name, value in macros.items()],
    )
    tiny_runs.train_here(
        config.experiment, workdir=folder / "run", strategy=mirrored(1), config_text=config.text
    )
    return config, folder / "run"


def histories():
    rng = np.random.default_rng(0)
    return [rng.integers(0, NUM_ITEMS, length).tolist() for length in [1, 2, 5, 6, 13] * 14]


def lstm(tensors, ids):
    """The last hidden state of one LSTM layer over some rows, projected as the run has it, in float64."""
    weights = [
        tensors[f"layers/lstm_0/{name}"].astype(np.float64) for name in ("kernel", "recurrent_kernel", "bias")
    ]
    kernel, recurrent, bias = weights
    h = c = np.zeros(recurrent.shape[0])
    for x in tensors["tables/items/embedding"][ids].astype(np.float64):
        i, f, g, o = np.split(x @ kernel + h @ recurrent + bias, 4)
        i, f, o = (1 / (1 + np.exp(-v)) for v in (i, f, o))
        c = f * c + i * np.tanh(g)
        h = o * np.tanh(c)
    return h


@pytest.mark.parametrize("exclude_seen", [True, False])
def test_against_sorting(run, mirrored, exclude_seen):
    config, path = run
    tensors = tiny_runs.tensors(path, 4)
    for num_devices in (1, 2, 3):
        with Workdir(path, readonly=True) as workdir:
            restored = RestoredModel(config.experiment, workdir=workdir, strategy=mirrored(num_devices))
            restored.restore()
            found = list(Recommender(restored).best(histories(), k=7, exclude_seen=exclude_seen))
        for ids, (items, log_probs) in zip(histories(), found, strict=True):
            scores = tensors["tables/items/embedding"].astype(np.float64) @ lstm(tensors, ids[-WINDOW:])
            expected = scores - np.log(np.exp(scores).sum())
            allowed = [i for i in range(NUM_ITEMS) if not (exclude_seen and i in ids)]
            best = sorted(allowed, key=lambda i: (-expected[i], i))[:7]
            assert items.tolist() == best
            np.testing.assert_allclose(log_probs, expected[best], rtol=1e-5)


@pytest.mark.parametrize("item", [slice(None), slice(4, 5)])
def test_a_model_gone_wrong(run, mirrored, item):
    """NaN is no JSON, and no log-probability: with one row of NaN the sum over all rows is."""
    config, path = run
    with Workdir(path, readonly=True) as workdir:
        restored = RestoredModel(config.experiment, workdir=workdir, strategy=mirrored(1))
        restored.restore()
        table = restored.model.tables["items"]
        rows = table.read_rows("embedding", 0, NUM_ITEMS).copy()
        rows[item] = np.nan
        table.write_rows("embedding", 0, rows)
        with pytest.raises(ValueError, match=r"must be finite to rank items by\. Received: NaN"):
            list(Recommender(restored).best([[1, 2], [3]], k=3, exclude_seen=True))


def recommend(path, *flags, text):
    return subprocess.run(
        [sys.executable, "-m", "lmscale.recommend", f"--workdir={path}", *flags],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(tiny_runs.REPOSITORY)},
        input=text,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("by_file", [True, False])
def test_a_byte_order_mark_is_no_part_of_an_item(run, tmp_path, by_file):
    """As editors on Windows write it."""
    path = tmp_path / "histories.txt"
    path.write_bytes(b"\xef\xbb\xbfitem3 item4\r\nitem5\r\n")
    flags, text = ([f"--input={path}"], "") if by_file else ([], path.read_bytes().decode())
    done = recommend(run[1], "--k=2", *flags, text=text)
    assert done.returncode == 0, done.stderr
    histories = [json.loads(line)["history"] for line in done.stdout.splitlines()]
    assert histories == [["item3", "item4"], ["item5"]]


def test_a_file_that_is_not_utf_8(run, tmp_path):
    path = tmp_path / "histories.txt"
    path.write_bytes(b"item3\nitem\xff\n")
    done = recommend(run[1], f"--input={path}", text="")
    assert (done.returncode, done.stdout) == (2, "")
    assert f"{path}, line 2: must be UTF-8. Received: byte 0xff" in done.stderr


def test_the_command(run):
    _, path = run
    done = recommend(path, "--k=2", "--cpu_devices=2", text="item3 item4\nitem5\n")
    assert done.returncode == 0, done.stderr
    first, second = map(json.loads, done.stdout.splitlines())
    assert (first["history"], second["history"]) == (["item3", "item4"], ["item5"])
    assert len(first["items"]) == 2
    assert not {entry["item"] for entry in first["items"]} & {"item3", "item4"}
    assert first["items"][0]["log_prob"] >= first["items"][1]["log_prob"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "A history is needed. Received: none"),
        ("item3\n\n", "Line 2: a history must have an item"),
        (
            "item3 itm4\n",
            "Line 1: each item must be in the catalogue, of 23. Received: 'itm4' (did you mean item4",
        ),
    ],
)
def test_mistakes(run, text, message):
    done = recommend(run[1], text=text)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stdout == ""
