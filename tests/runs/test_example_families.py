"""Tasks of examples in columns, from their shipped configurations: the same on any number of devices, and resumed."""

import dataclasses
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import tiny_families
import tiny_runs

from lmscale import configuration

NUM_STEPS = 4
# {configuration: a measure of its evaluations}.
FAMILIES = {
    "quickstart_classes": "mrr",
    "quickstart_next_item": "mrr",
    "quickstart_last_words": "accuracy@10",
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """(configuration, a measure that it tells, folder)."""
    folder = tmp_path_factory.mktemp(request.param)
    return tiny_families.load(request.param, folder), FAMILIES[request.param], folder


def train(config, workdir, strategy, **changes):
    experiment = dataclasses.replace(config.experiment, **changes)
    tiny_runs.train_here(experiment, workdir=workdir, strategy=strategy, config_text=config.text)
    return workdir


def numbers(workdir):
    """{name: array} of what a run has logged, without times and what shards and devices tell of themselves."""
    found = {}
    for name in ("train", "eval"):
        lines = tiny_runs.metrics(workdir, name)
        kept = {
            tag
            for line in lines
            for tag in line
            if not tag.startswith(("rows_touched", "bytes_received", "memory_mib"))
            and not tag.endswith(("secs", "per_sec", "wall_time"))
        }
        found |= {f"{name}/{tag}": np.array([line[tag] for line in lines if tag in line]) for tag in kept}
    return found


def test_on_any_number_of_devices(family, mirrored):
    """Losses, and exact measures of users and examples that the batches do not divide."""
    config, measure, folder = family
    expected = numbers(train(config, folder / "on_1", mirrored(1)))
    assert any(measure in name for name in expected)
    for n in (2, 3, 4):
        found = numbers(train(config, folder / f"on_{n}", mirrored(n)))
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            np.testing.assert_allclose(found[name], values, rtol=2e-5, err_msg=f"{n}: {name}")


def test_what_goes_on_ends_as_what_nothing_interrupted(family, mirrored):
    config, _, folder = family
    whole = train(config, folder / "whole", mirrored(2))
    train(config, folder / "resumed", mirrored(2), train_steps=2)
    resumed = train(config, folder / "resumed", mirrored(2))
    tiny_runs.assert_same_bits(tiny_runs.tensors(resumed, NUM_STEPS), tiny_runs.tensors(whole, NUM_STEPS))
    names = {path.name for path in Path(resumed).glob("vocab*.txt")}
    assert names == {path.name for path in (folder / "data").glob("vocab*.txt")} != set()


def documented_negatives():
    """[settings] of each command of the docs that swaps the head of the next item."""
    page = (tiny_runs.REPOSITORY / "docs" / "recommendation.md").read_text(encoding="utf-8")
    _, _, section = page.partition("## Negatives: which head\n")
    section, _, _ = section.partition("\n## ")
    commands = re.findall(r"^python -m lmscale\.train (.*)$", section.replace("\\\n", " "), re.MULTILINE)
    flags = [shlex.split(command) for command in commands]
    return [
        [flag.removeprefix("--gin_param=") for flag in of_one if flag.startswith("--gin_param=")]
        for of_one in flags
    ]


@pytest.mark.parametrize(
    ("number", "uses"),
    [(None, "UnigramSampler"), (0, "InBatchSampler"), (1, "NegativeSampling.calibration = 0.75")],
    ids=["unigram", "in_batch", "calibrated"],
)
def test_heads_of_the_next_item_swapped_by_flags(number, uses, mirrored, tmp_path):
    """As shipped, and by each command of the docs: the same losses on 1 and on 3 devices."""
    settings = [] if number is None else documented_negatives()[number]
    sizes = tiny_families.TINY["quickstart_next_item"].settings | {"TRAIN_STEPS": 2, "EVAL_EVERY": 2}
    sizes["DATA_DIR"] = str(tiny_families.histories(tmp_path))
    sizes = {name: value for name, value in sizes.items() if f"{name}=%gin.REQUIRED" not in settings}
    # At most as many negatives as there are other items here.
    settings = [re.sub(r"num_negatives=\d+$", "num_negatives=7", setting) for setting in settings]
    config = configuration.load(
        [str(tiny_runs.REPOSITORY / "configs" / "quickstart_next_item.gin")],
        [*(f"{name} = {value!r}" for name, value in sizes.items()), *settings],
    )
    assert uses in config.text
    expected, found = (numbers(train(config, tmp_path / f"on_{n}", mirrored(n))) for n in (1, 3))
    assert found.keys() == expected.keys()
    assert any(name.endswith("loss_nats") and len(values) == 2 for name, values in expected.items())
    for name, values in expected.items():
        assert np.isfinite(values).all(), name
        np.testing.assert_allclose(found[name], values, rtol=2e-5, err_msg=name)
