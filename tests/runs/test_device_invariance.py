"""The number of devices changes where things are computed, and nothing else: real runs on 1, 2, 3, 4 and 8."""

import numpy as np
import pytest
import tiny_runs

from lmscale.parameters.update_rules import Adam
from lmscale.tables.placement import Placement
from lmscale.tables.table import ShardedTable

DEVICES = (1, 2, 3, 4, 8)
# Only the order of float32 sums differs. Measured: 3e-7.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def runs(reference_run):
    """{devices: work directory}."""
    futures = {n: reference_run(n) for n in DEVICES}
    return {n: future.result() for n, future in futures.items()}


@pytest.mark.parametrize("devices", DEVICES[1:])
def test_training_losses_are_equal(runs, devices):
    expected, actual = tiny_runs.metrics(runs[1]), tiny_runs.metrics(runs[devices])
    assert [line["step"] for line in actual] == list(range(1, tiny_runs.TINY_MACROS["TRAIN_STEPS"] + 1))
    for tag in (
        "sampled_loss_nats",
        "gradient_norm",
        "learning_rate/tables",
        "learning_rate/layers",
        "epoch",
    ):
        np.testing.assert_allclose(
            [line[tag] for line in actual], [line[tag] for line in expected], rtol=TOLERANCE, err_msg=tag
        )


def test_the_runs_learn_something(runs):
    """Equal losses of runs that stand still would prove nothing."""
    losses = [line["valid/exact_loss_nats"] for line in tiny_runs.metrics(runs[1], "eval")]
    assert losses[-1] < np.log(tiny_runs.VOCAB_SIZE) - 1


@pytest.mark.parametrize("devices", DEVICES[1:])
def test_evaluations_within_the_run_are_equal(runs, devices):
    expected, actual = tiny_runs.metrics(runs[1], "eval"), tiny_runs.metrics(runs[devices], "eval")
    assert [line["step"] for line in actual] == [line["step"] for line in expected] == [100, 200]
    tags = [tag for tag in expected[0] if tag.endswith(("_nats", "_perplexity"))]
    # Two of the split, four of the probe; ten deciles and the unknown words.
    assert len(tags) == 6 + 11
    for tag in tags:
        np.testing.assert_allclose(
            [line[tag] for line in actual], [line[tag] for line in expected], rtol=TOLERANCE, err_msg=tag
        )


@pytest.mark.parametrize("devices", DEVICES)
def test_rows_touched_add_up_to_those_of_one_device(runs, devices):
    def rows(line):
        by_shard = [value for tag, value in line.items() if tag.startswith("rows_touched/words/shard_")]
        return len(by_shard), sum(by_shard)

    lines = zip(tiny_runs.metrics(runs[devices]), tiny_runs.metrics(runs[1]), strict=True)
    assert all(rows(line) == (devices, rows(line_of_one)[1]) for line, line_of_one in lines)


@pytest.mark.parametrize("devices", DEVICES[1:])
def test_checkpoints_have_the_same_tensors(runs, devices):
    expected, actual = tiny_runs.tensors(runs[1], 200), tiny_runs.tensors(runs[devices], 200)
    shapes = {name: (value.shape, value.dtype) for name, value in expected.items()}
    assert {name: (value.shape, value.dtype) for name, value in actual.items()} == shapes
    assert shapes["tables/words/embedding"][0] == (tiny_runs.VOCAB_SIZE, tiny_runs.TINY_MACROS["EMBED_DIM"])
    # Rows that a step touched, and when, do not depend on rounding.
    last_steps = "slots/tables/words/embedding/last_step"
    np.testing.assert_array_equal(actual[last_steps], expected[last_steps])


def test_evaluate_agrees_with_the_run_on_other_numbers_of_devices(runs, in_background, tmp_path):
    """Runs on 3 devices and on 1, evaluated on 2 and on 4, also by split and step."""
    cases = {
        "valid": (runs[3], "--split=valid", "--cpu_devices=2"),
        "test": (runs[3], "--split=test", "--cpu_devices=4"),
        "test_of_one": (runs[1], "--split=test", "--checkpoint=best"),
        "early": (runs[1], "--split=valid", "--checkpoint=100", "--cpu_devices=3"),
    }
    futures = {
        name: in_background(tiny_runs.evaluate, *arguments, log=tmp_path / name)
        for name, arguments in cases.items()
    }
    reports = {name: future.result() for name, future in futures.items()}
    early, late = (line["valid/exact_loss_nats"] for line in tiny_runs.metrics(runs[1], "eval"))
    for name, loss_nats in {
        "valid": late,
        "early": early,
        "test": reports["test_of_one"]["loss_nats"],
    }.items():
        assert reports[name]["loss_nats"] == pytest.approx(loss_nats, rel=TOLERANCE), name
    for name, report in reports.items():
        split = "test" if name.startswith("test") else "valid"
        assert report["split"] == split
        assert report["tokens"] == tiny_runs.SPLIT_TOKENS[split]
        assert report["vocab_size"] == tiny_runs.VOCAB_SIZE
        assert report["step"] == (100 if name == "early" else 200)
        assert report["num_devices"] == {"valid": 2, "test": 4, "test_of_one": 1, "early": 3}[name]
        assert report["perplexity"] == pytest.approx(np.exp(report["loss_nats"]), rel=1e-12)
        assert report["seconds"] > 0


@pytest.mark.parametrize("devices", DEVICES)
def test_a_device_holds_its_share_of_the_table(mirrored, devices):
    """What each device allocates, in fact and by `bytes_per_shard`, is within 1% of 1/N of rows and slots."""
    vocab_size, embed_dim = tiny_runs.VOCAB_SIZE, 8
    strategy = mirrored(devices)
    with strategy.scope():
        table = ShardedTable(
            vocab_size=vocab_size, embed_dim=embed_dim, update_rule=Adam(learning_rate=0.1), bias=True
        )
    # Weight and two moments for embedding and bias; last step and number of updates of each row for both.
    bytes_in_all = vocab_size * (3 * (embed_dim + 1) + 4) * 4
    components = [strategy.experimental_local_results(variable) for variable in table.variables().values()]
    for device in range(devices):
        allocated = [component[device] for component in components]
        held = sum(value.numpy().nbytes for value in allocated)
        assert held == sum(table.bytes_per_shard().values())
        assert held == pytest.approx(bytes_in_all / devices, rel=0.01)
        assert {value.device.rpartition("/")[2] for value in allocated} == {f"device:CPU:{device}"}
    # The padding: a scratch row a device, and at most one row of rounding up.
    placement = Placement(vocab_size=vocab_size, num_shards=devices)
    assert 0 <= devices * placement.allocated_rows - vocab_size <= 2 * devices
