"""The sections that train, on a made-up text of a minute's reading."""

import importlib.util
import json
import math
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from lmscale.benchmarks import time_to_quality

REPOSITORY = pathlib.Path(__file__).parents[2]
CONFIG = REPOSITORY / "configs" / "wikitext2_fast.gin"
needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="needs PyTorch: pip install 'lmscale[bench]'"
)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    flags = []
    for split, lines in (("train", 300), ("valid", 60), ("test", 60)):
        words = np.minimum(rng.geometric(0.05, size=[lines, 9]), 60)
        (folder / split).write_text("\n".join(" ".join(f"w{w}" for w in line) for line in words) + "\n")
        flags.append(f"--{split}={folder / split}")
    subprocess.run(
        [sys.executable, "-m", "lmscale.prepare", *flags, f"--output={folder / 'data'}"],
        check=True,
        capture_output=True,
    )
    return folder / "data"


def test_quality_against_samples(data_dir, tmp_path):
    measured = time_to_quality.measure_samples(
        data_dir=data_dir, config=CONFIG, output=tmp_path, nums_sampled=[16, 500], epochs=1, say=print
    )
    few, full = measured["results"]
    assert measured["train_steps"] == (300 * 10 // 32 - 1) // 35
    assert few["num_sampled"] == 16
    assert 55 <= full["num_sampled"] <= 62  # All rows: the words that occur, <unk> and <eos>.
    assert full["over_full"] == 1
    assert few["over_full"] == pytest.approx(few["perplexity"] / full["perplexity"])
    assert 1 < full["perplexity"] < 200
    assert few["train_secs"] > 0


@needs_torch
def test_time_to_the_peers_quality(data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(time_to_quality, "PEER_RECIPE", time_to_quality.PEER_RECIPE | {"dim": 8})
    config = tmp_path / "tiny.gin"
    changes = {
        "TRAIN_STEPS": 4,
        "EVAL_EVERY": 2,
        "LOG_EVERY": 2,
        "NUM_SAMPLED": 16,
        "HIDDEN_DIM": 8,
        "EMBED_DIM": 8,
    }
    config.write_text(
        f"include '{CONFIG}'\n" + "".join(f"{name} = {value}\n" for name, value in changes.items())
    )

    def measure(epochs):
        return time_to_quality.measure(
            data_dir=data_dir, config=config, output=tmp_path / "out", epochs=epochs, say=print
        )

    first = measure(1)
    assert [line["epoch"] for line in first["peer"]] == [1]
    assert len(first["ours"]) == 2
    assert first["startup_secs"] > 0
    assert "tiny.gin" in first["our_recipe"]
    # Again, with another epoch: what is done is not done again.
    second = measure(2)
    assert second["peer"][0] == first["peer"][0]
    assert [line["epoch"] for line in second["peer"]] == [1, 2]
    assert second["ours"] == first["ours"]
    assert second["startup_secs"] == first["startup_secs"]
    for line in second["peer"]:
        assert 0 < math.exp(line["valid_loss_nats"]) < 200
        assert line["steps"] == (300 * 10 // 20 - 1) // 35
    # With another recipe it would be another training.
    recipe = tmp_path / "out" / "pytorch" / "recipe.json"
    recipe.write_text(json.dumps(json.loads(recipe.read_text()) | {"dropout": 0.5}))
    with pytest.raises(time_to_quality.TaskFailedError, match="recipe it started with"):
        measure(3)
