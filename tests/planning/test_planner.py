"""A plan against a run's own variables, closed forms of the losses, and a count of rows one by one."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_experiments import Text, experiment, language_model, one_rule, sampled, tied, untied

from lmscale.bodies.lstm import lstm_body
from lmscale.parameters.update_rules import Adam, RowWiseAdagrad
from lmscale.planning import planner
from lmscale.planning.work import Rates, compare_heads, network_bytes, step_work
from lmscale.trainer import Trainer

ROOT = Path(__file__).parents[2]
VOCAB_SIZE, EMBED_DIM, BATCH_SIZE, WINDOW, NUM_SAMPLED, HIDDEN_DIM = 1009, 16, 12, 10, 64, 20
TOKENS = BATCH_SIZE * WINDOW
RATES = Rates(tflops=10.0, memory_bandwidth_gbps=1000.0, bandwidth_gbps=20.0)


def text(vocab_size=VOCAB_SIZE):
    ids = np.minimum(np.random.default_rng(0).zipf(1.3, 2001) - 1, vocab_size - 1)
    return Text(vocab_size=vocab_size, ids=ids)


def an_experiment(*, tables=None, head=None, rule=None, **changes):
    task = language_model(
        body=functools.partial(lstm_body, num_layers=1, hidden_dim=HIDDEN_DIM),
        head=head or sampled(NUM_SAMPLED),
        window=WINDOW,
        **(tables or tied(embed_dim=EMBED_DIM)),
    )
    settings = {"global_batch_size": BATCH_SIZE, "groups": one_rule(rule or Adam(learning_rate=0.1))}
    return experiment(task=task, **settings | changes)


def make_step(an_experiment, num_devices, *, vocab_size=VOCAB_SIZE):
    return planner.make_step(an_experiment, data=text(vocab_size), num_devices=num_devices)


def allocated(variables, strategy):
    components = [strategy.experimental_local_results(v)[0] for v in variables]
    return sum(x.shape.num_elements() * x.dtype.size for x in components)


@pytest.mark.parametrize(
    ("num_devices", "tables", "rule"),
    [
        (1, tied(embed_dim=EMBED_DIM), Adam(learning_rate=0.1)),
        (3, untied(input_dim=12, output_dim=EMBED_DIM), RowWiseAdagrad(learning_rate=0.1)),
    ],
)
def test_what_lasts_is_what_a_trainer_allocates(mirrored, num_devices, tables, rule):
    changed = an_experiment(tables=tables, rule=rule)
    strategy = mirrored(num_devices)
    trainer = Trainer(changed, data=text(), strategy=strategy)
    model, told = trainer.model, make_step(changed, num_devices).memory.lasting
    rows = [v for table in model.tables.values() for v in table.parameters.values()]
    slots = [v for t in model.tables.values() for of in t.slots.values() for v in of.values()]
    assert told["table_rows"] == allocated(rows, strategy)
    assert told["table_slots"] == allocated(slots, strategy)
    assert told["layers"] == allocated([v.value for v in model.layers.variables.values()], strategy)
    layer_slots = [v for of in model.layer_slots.values() for v in of.values()]
    assert told["layer_slots"] == allocated(layer_slots, strategy)
    assert told["state"] == 2 * 4 * BATCH_SIZE // num_devices * HIDDEN_DIM


def test_logits_of_a_sampled_softmax():
    """Logits and probabilities, float32, of each token and sample."""
    for num_sampled in (256, 512):
        step = make_step(an_experiment(head=sampled(num_sampled)), 1)
        head = step.memory.most_of_part("head")
        assert head == pytest.approx(8 * TOKENS * num_sampled, rel=0.15)


def test_products_of_a_sampled_and_of_a_full_softmax():
    step = make_step(an_experiment(), 3)
    comparison = compare_heads(step, RATES)["next"]
    pairs = TOKENS // 3 * NUM_SAMPLED
    # Logits and two gradients; the gradient of the bias is a product with a vector.
    assert comparison.sampled.product_flops == 3 * 2 * pairs * EMBED_DIM + 2 * pairs
    rows = step.placements["words"].allocated_rows
    # In blocks of 128, the last of which may be fuller than the shard.
    assert comparison.full.product_flops == pytest.approx(4 * 2 * TOKENS * rows * EMBED_DIM, rel=0.2)
    turns_at = 3 * NUM_SAMPLED / 4
    assert comparison.turns_at_by_flops == pytest.approx(turns_at, rel=0.2)


def test_products_of_the_body():
    step = make_step(an_experiment(), 1)
    lstm = TOKENS * 4 * HIDDEN_DIM * (EMBED_DIM + HIDDEN_DIM)
    projection = TOKENS * HIDDEN_DIM * EMBED_DIM
    assert step.training_cost.product_flops["body"] == 3 * 2 * (lstm + projection)
    assert step_work(step).product_flops == sum(step.training_cost.product_flops.values())


def test_parts_of_a_step_take_less_memory_and_do_the_same_work():
    whole, parts = (
        make_step(an_experiment(head=sampled(512), gradient_accumulation_steps=number), 1)
        for number in (1, 4)
    )
    assert parts.memory.most_of_part("head") < 0.3 * whole.memory.most_of_part("head")
    assert step_work(parts).product_flops == step_work(whole).product_flops


def rows_that_travel(ids, shared_ids, num_devices):
    """[rows that each device receives], one by one."""
    received = []
    for device, own in enumerate(ids):
        wanted = set(own.tolist()) | set(shared_ids.tolist())
        received.append(sum(1 for row in wanted if row % num_devices != device))
    return received


def test_traffic_of_a_step():
    assert sum(network_bytes(make_step(an_experiment(), 1)).values()) == 0
    step = make_step(an_experiment(), 3)
    moved = network_bytes(step)
    ids, shared_ids = step.ids["words"]
    assert ids.shape == (3, 2 * TOKENS // 3)
    assert moved["rows"] in [4 * (EMBED_DIM + 1) * n for n in rows_that_travel(ids, shared_ids, 3)]
    values = 4 * HIDDEN_DIM * (EMBED_DIM + HIDDEN_DIM + 1) + HIDDEN_DIM * EMBED_DIM
    assert moved["layers"] == 2 * 2 * 4 * values // 3


def test_the_bottleneck_is_what_takes_longest():
    work = step_work(make_step(an_experiment(), 3))
    fast = {"tflops": 1e9, "memory_bandwidth_gbps": 1e9, "bandwidth_gbps": 1e9}
    for name, resource in (
        ("tflops", "compute"),
        ("memory_bandwidth_gbps", "memory bandwidth"),
        ("bandwidth_gbps", "network"),
    ):
        assert work.bottleneck(Rates(**fast | {name: 1e-3})) == resource


def test_memory_does_not_depend_on_how_much_a_vocabulary_could_allocate():
    """Of 10 million rows: only what lasts grows, and the blocks of an evaluation stay blocks."""
    big = dataclasses.replace(an_experiment(), eval_batch_size=2)
    vocab_size = 10_000_000
    memory = make_step(big, 1, vocab_size=vocab_size).memory
    assert memory.lasting["table_rows"] == 4 * (EMBED_DIM + 1) * (vocab_size + 1)
    assert memory.phase_bytes("evaluate") < 200 * 2**20


def plan(an_experiment, monkeypatch, *, num_devices, gib):
    monkeypatch.setattr(planner, "open_prepared", lambda path: text(100_003))
    return planner.make_plan(an_experiment, num_devices=num_devices, device_memory_gib=gib, rates=RATES)[0]


def test_the_fewest_devices_whose_memory_is_enough(monkeypatch):
    small = dataclasses.replace(an_experiment(), eval_batch_size=1)
    # Traced once for each number of devices, whoever asks.
    make = functools.partial(planner.make_step, small, data=text(100_003))
    step_on = functools.cache(lambda n: make(num_devices=n))
    peaks = {n: step_on(n).memory.peak_bytes / 2**30 for n in (1, 2, 3, 4, 6, 12)}
    monkeypatch.setattr(planner, "make_step", lambda *_, num_devices, **__: step_on(num_devices))
    assert sorted(peaks.values(), reverse=True) == list(peaks.values())
    for n, other in ((1, 2), (3, 1), (4, 4)):
        told = plan(small, monkeypatch, num_devices=other, gib=peaks[n] * 1.0001)
        assert told["fewest_devices"] == n
        assert told["fits"] == (other >= n)
    assert plan(small, monkeypatch, num_devices=1, gib=peaks[12] * 0.5)["fewest_devices"] is None


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "lmscale.plan", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "2", "CUDA_VISIBLE_DEVICES": ""},
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device_memory_gib=1"], "--gin_file is required"),
        (["--gin_file=quickstart.gin"], "--device_memory_gib is required"),
        (
            ["--gin_file=quickstart.gin", "--device_memory_gib=1", "--devices=0"],
            "--devices must be at least 1",
        ),
        (
            ["--gin_file=quickstart.gin", "--device_memory_gib=1", "--tflops=0"],
            "tflops must be finite and at",
        ),
        (["--gin_file=quickstart.gin", "--device_memory_gib=inf"], "must be positive and finite"),
        (["--gin_file=quickstart.gin", "--device_memory_gib=-1"], "device_memory_gib must be positive"),
    ],
)
def test_mistakes_end_with_2(arguments, message):
    result = command(*arguments)
    assert result.returncode == 2
    assert message in result.stderr


def test_the_command_tells_json_and_whether_it_fits(tmp_path):
    sys.path.insert(0, str(ROOT / "tests" / "runs"))
    import tiny_runs

    data_dir = tiny_runs.write_data(tmp_path / "data")
    arguments = ["--gin_file=quickstart.gin", f"--gin_param=DATA_DIR='{data_dir}'", "--devices=2"]
    result = command(*arguments, "--device_memory_gib=4", "--json")
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout)
    assert told["fits"]
    assert told["fewest_devices"] == 1
    # 5,003 rows of 96 and their biases: each shard has half of them and a scratch row.
    assert told["memory_mib"]["lasting"]["table_rows"] == 4 * 97 * 2503 / 2**20
    words = command(*arguments, "--device_memory_gib=0.001")
    assert words.returncode == 0, words.stderr
    assert "Does not fit: 2 device(s) of 0.001 GiB" in words.stdout
    assert "No number of devices of 0.001 GiB is enough" in " ".join(words.stdout.split())
