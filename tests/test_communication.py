"""A step moves what must move, counted in its graph and from its ids alone; and whatever moves, it learns alike."""

import functools

import numpy as np
import pytest
import tensorflow as tf
import tiny_experiments
from tiny_experiments import Text, language_model, one_rule, tied, untied, values

from lmscale.bodies.lstm import lstm_body
from lmscale.communication import StepTraffic, as_table, row_bytes_received
from lmscale.distribution import collectives, ledger
from lmscale.parameters.report import as_text
from lmscale.parameters.update_rules import Adagrad
from lmscale.softmax.full import FullSoftmax
from lmscale.softmax.sampled import SampledSoftmax
from lmscale.softmax.samplers import InBatchSampler, LogUniformSampler, UniformSampler, UnigramSampler
from lmscale.tables.all_to_all import AllToAllExchange
from lmscale.tables.exchange import StaticExchange
from lmscale.tables.placement import Placement
from lmscale.tables.rows import Lookup
from lmscale.tasks.task import Labels
from lmscale.trainer import Trainer

NUM_STEPS, WINDOW = 6, 5
SAMPLERS = {
    "uniform": functools.partial(UniformSampler, num_sampled=11),
    "log_uniform": functools.partial(LogUniformSampler, num_sampled=13),
    "stratified": functools.partial(UnigramSampler, num_sampled=17, replacement=False),
    "unigram": functools.partial(UnigramSampler, num_sampled=17),
    "in_batch": InBatchSampler,
    # On most shards there is none.
    "one": functools.partial(UniformSampler, num_sampled=1),
    # All but the whole vocabulary: every shard holds many, and nearly every label is a hit.
    "nearly_all": functools.partial(LogUniformSampler, num_sampled=52, replacement=False),
}


def make_trainer(
    strategy,
    *,
    sampler="log_uniform",
    tables=None,
    batch_size=12,
    num_parts=1,
    static_shapes=False,
    **of_head,
):
    task = language_model(
        body=functools.partial(lstm_body, num_layers=1, hidden_dim=7, dropout=0.3),
        head=functools.partial(SampledSoftmax, sampler=SAMPLERS[sampler], **of_head),
        window=WINDOW,
        **(tables or tied(embed_dim=6, bias="log_frequency")),
    )
    experiment = tiny_experiments.experiment(
        task=task,
        groups=one_rule(Adagrad(learning_rate=0.05)),
        clip_norm=0.04,
        global_batch_size=batch_size,
        gradient_accumulation_steps=num_parts,
    )
    return Trainer(experiment, data=Text(), strategy=strategy, static_shapes=static_shapes)


def train(trainer):
    """({metric: [NUM_STEPS, ...]}, {path: array})"""
    steps = [trainer.train_steps() for _ in range(NUM_STEPS)]
    return (
        {name: np.concatenate([step[name].numpy() for step in steps]) for name in steps[0]},
        values(trainer.parameters()),
    )


def assert_equal_runs(actual, expected, *, rtol=1e-6):
    """That runs whose exchange differs have learned the same, to rounding."""
    (metrics, found), (expected_metrics, expected_values) = actual, expected
    np.testing.assert_allclose(metrics["loss"], expected_metrics["loss"], rtol=rtol)
    np.testing.assert_allclose(metrics["gradient_norm"], expected_metrics["gradient_norm"], rtol=10 * rtol)
    assert np.any(expected_metrics["gradient_norm"] > 0.04)  # It is clipped.
    for name in (name for name in expected_metrics if name.startswith("rows_touched/")):
        np.testing.assert_array_equal(metrics[name], expected_metrics[name])
    assert found.keys() == expected_values.keys()
    for path, value in expected_values.items():
        np.testing.assert_allclose(found[path], value, rtol=100 * rtol, atol=rtol, err_msg=path)


@pytest.mark.parametrize(
    ("num_replicas", "sampler"),
    [
        (1, "log_uniform"),
        (2, "uniform"),
        (2, "stratified"),
        (3, "log_uniform"),
        (3, "unigram"),
        (3, "in_batch"),
        (4, "one"),
        (4, "nearly_all"),
    ],
)
def test_hidden_states_that_travel_learn_what_rows_do(mirrored, num_replicas, sampler):
    runs = {}
    for exchange in ("rows", "hidden"):
        trainer = make_trainer(mirrored(num_replicas), sampler=sampler, exchange=exchange)
        assert trainer.model.communicates == (exchange == "hidden" and num_replicas > 1)
        runs[exchange] = train(trainer)
    assert_equal_runs(runs["hidden"], runs["rows"])
    if num_replicas > 1:
        assert np.all(runs["hidden"][0]["bytes_received/hidden_states"] > 0)
        assert not np.any(runs["rows"][0]["bytes_received/hidden_states"])


@pytest.mark.parametrize("num_replicas", [1, 3])
@pytest.mark.parametrize(
    "settings",
    [
        {"num_parts": 2},
        {"tables": untied(input_dim=5, output_dim=7)},
        {"tables": untied(input_dim=5, output_dim=7, bias="none")},
        {"remove_accidental_hits": False},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_hidden_states_travel_with_other_settings(mirrored, num_replicas, settings):
    runs = {
        exchange: train(make_trainer(mirrored(num_replicas), exchange=exchange, **settings))
        for exchange in ("rows", "hidden")
    }
    assert_equal_runs(runs["hidden"], runs["rows"])


def test_bfloat16_products(mirrored):
    """Products are narrow on both ways: they agree better with one another than with float32."""
    losses = {
        (exchange, dtype): train(make_trainer(mirrored(3), exchange=exchange, compute_dtype=dtype))[0]["loss"]
        for exchange in ("rows", "hidden")
        for dtype in ("float32", "bfloat16")
    }
    np.testing.assert_allclose(losses["hidden", "bfloat16"], losses["rows", "bfloat16"], rtol=1e-3)
    # In the first step, before gradients that were rounded otherwise, the rounded hidden states and rows are the same.
    np.testing.assert_allclose(losses["hidden", "bfloat16"][0], losses["rows", "bfloat16"][0], rtol=1e-6)
    assert abs(losses["rows", "bfloat16"][0] / losses["rows", "float32"][0] - 1) > 3e-6


@pytest.mark.parametrize("num_replicas", [2, 3, 4])
@pytest.mark.parametrize("exchange", ["rows", "hidden"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"sampler": "in_batch"},
        {"num_parts": 3, "batch_size": 36, "compute_dtype": "bfloat16"},
        {"tables": untied(input_dim=5, output_dim=7), "remove_accidental_hits": False},
    ],
    ids=["plain", "in_batch", "parts", "untied"],
)
def test_a_step_moves_what_its_ids_say(mirrored, num_replicas, exchange, settings):
    trainer = make_trainer(mirrored(num_replicas), exchange=exchange, **settings)
    trainer.train_steps()
    metrics = trainer.train_steps()
    traffic = StepTraffic(
        trainer.task,
        trainer.batches.at(1).features,
        num_devices=num_replicas,
        seed=trainer.experiment.seed,
        step=1,
    )
    expected = traffic.bytes_received(trainer.model.exchanges)
    for part in ("ids", "rows", "row_gradients", "hidden_states", "others"):
        assert metrics[f"bytes_received/{part}"] == expected[part][0], part
    # Beside the gradients of layers, a few scalars.
    num_values = sum(v.numpy().size for v in trainer.model.layers.trainable_variables.values())
    of_layers = traffic.bytes_received(trainer.model.exchanges, layer_values=num_values)["layers"][0]
    assert 0 < metrics["bytes_received/layers"] - of_layers < 100
    assert of_layers == pytest.approx(8 * num_values * (num_replicas - 1) / num_replicas, abs=1)


def test_full_softmax_moves_what_it_says(mirrored):
    experiment = tiny_experiments.experiment(task=language_model(head=FullSoftmax))
    trainer = Trainer(experiment, data=Text(), strategy=mirrored(3))
    metrics = trainer.train_steps()
    expected = trainer.traffic.bytes_received(trainer.traffic.chosen())
    for part in ("ids", "rows", "row_gradients", "hidden_states"):
        assert metrics[f"bytes_received/{part}"] == expected[part][0] > 0, part
    # One way, so nothing to choose.
    assert "chosen" not in as_text(as_table(trainer.traffic, trainer.traffic.chosen(), layer_values=0))


def test_static_shapes_learn_what_others_do(mirrored):
    """Everything to everyone, the plain reference, and all-to-all."""
    runs = []
    for static_shapes in (False, True):
        trainer = make_trainer(mirrored(3), static_shapes=static_shapes, exchange="rows")
        runs.append(train(trainer))
    assert_equal_runs(*runs)
    moved = [run[0]["bytes_received/rows"] for run in runs]
    assert np.all(moved[0] < moved[1])


def plain_row_bytes(ids, shared_ids, *, num_devices, row_bytes):
    """`row_bytes_received` with sets."""
    wanted = [{int(i) for i in own} | {int(i) for i in shared_ids} for own in ids]
    received = {"ids": [0] * num_devices, "rows": [0] * num_devices, "row_gradients": [0] * num_devices}
    for device, of_device in enumerate(wanted):
        for i in of_device:
            if i % num_devices != device:
                received["rows"][device] += row_bytes
                received["ids"][i % num_devices] += 4
                received["row_gradients"][i % num_devices] += row_bytes
    return received


@pytest.mark.parametrize("num_devices", [1, 2, 3, 8])
def test_rows_that_must_move_against_sets(num_devices):
    rng = np.random.default_rng(0)
    ids, shared_ids = rng.integers(0, 101, [num_devices, 40]), rng.integers(0, 101, 30)
    found = row_bytes_received(
        ids, shared_ids, placement=Placement(vocab_size=101, num_shards=num_devices), row_bytes=28
    )
    expected = plain_row_bytes(ids, shared_ids, num_devices=num_devices, row_bytes=28)
    assert {part: list(values) for part, values in found.items()} == expected
    assert (sum(expected["rows"]) > 0) == (num_devices > 1)


@pytest.mark.parametrize(("batch_size", "chosen"), [(2, "hidden"), (24, "rows")])
def test_auto_takes_what_moves_less(mirrored, batch_size, chosen):
    """Hidden states of few tokens, rows for many."""
    trainer = make_trainer(mirrored(2), sampler="nearly_all", batch_size=batch_size, exchange="auto")
    moved = {}
    for exchange in ("rows", "hidden"):
        other = make_trainer(mirrored(2), sampler="nearly_all", batch_size=batch_size, exchange=exchange)
        metrics = other.train_steps()
        moved[exchange] = sum(int(x[0]) for name, x in metrics.items() if name.startswith("bytes_received/"))
    assert trainer.model.exchanges == {"next": chosen}
    assert min(moved, key=moved.get) == chosen
    told = as_text(as_table(trainer.traffic, trainer.traffic.chosen(), layer_values=0))
    assert f"{chosen} travel, chosen" in told
    assert told.count("chosen") == 1


def test_hidden_states_do_not_travel_in_static_shapes(mirrored):
    settings = {
        "task": language_model(head=functools.partial(SampledSoftmax, sampler=SAMPLERS["nearly_all"]))
    }
    experiment = tiny_experiments.experiment(global_batch_size=2, **settings)
    trainer = Trainer(experiment, data=Text(), strategy=mirrored(2), static_shapes=True)
    assert trainer.model.exchanges == {"next": "rows"}
    head = functools.partial(SampledSoftmax, sampler=SAMPLERS["uniform"], exchange="hidden")
    with pytest.raises(ValueError, match=r"'rows' in a step of static shapes"):
        Trainer(
            tiny_experiments.experiment(task=language_model(head=head)),
            data=Text(),
            strategy=mirrored(2),
            static_shapes=True,
        )


def test_an_unknown_exchange_is_refused(mirrored):
    with pytest.raises(ValueError, match=r"exchange must be one of .*Received: exchange='columns'"):
        make_trainer(mirrored(1), exchange="columns")


NUM_IDS, NUM_SHARED = 600, 400
LAWS = {
    "uniform": lambda rng, size, vocab_size: rng.integers(0, vocab_size, size),
    "zipf": lambda rng, size, vocab_size: (
        np.exp(rng.random(size) * np.log(vocab_size + 1)).astype(np.int64) - 1
    ),
}


def draw(law, vocab_size, num_devices):
    """(ids [num_devices, NUM_IDS], shared_ids [NUM_SHARED])"""
    rng = np.random.default_rng(0)
    sizes = ([num_devices, NUM_IDS], [NUM_SHARED])
    return tuple(LAWS[law](rng, size, vocab_size).astype(np.int32) for size in sizes)


def moved_by(exchange, strategy, ids, shared_ids, *, vocab_size):
    """[num_devices] bytes that each device receives for rows of one number, and their gradients."""
    placement = Placement(vocab_size=vocab_size, num_shards=len(ids))

    def replica_step():
        with ledger.recording() as moved:
            route = exchange.route(
                tf.constant(ids)[collectives.replica_id()], tf.constant(shared_ids), placement
            )
            (rows,) = exchange.fetch(route, [tf.zeros([placement.allocated_rows, 1])])
            exchange.collect(route, [rows])
        return tf.cast(sum(moved.received().values()), tf.int64)

    received = tf.function(lambda: strategy.run(replica_step), autograph=False)()
    return np.array([int(x) for x in strategy.experimental_local_results(received)])


@pytest.mark.parametrize("num_devices", [2, 4, 8])
@pytest.mark.parametrize("vocab_size", [10**4, 10**5, 10**6, 10**7])
@pytest.mark.parametrize("law", LAWS)
def test_what_moves_is_near_to_what_must(mirrored, num_devices, vocab_size, law):
    ids, shared_ids = draw(law, vocab_size, num_devices)
    least = plain_row_bytes(ids, shared_ids, num_devices=num_devices, row_bytes=4)
    least = np.sum(list(least.values()), axis=0)
    moved = moved_by(AllToAllExchange(), mirrored(num_devices), ids, shared_ids, vocab_size=vocab_size)
    assert np.all(moved >= least)
    assert np.all(moved <= 1.5 * least)
    # Whatever vocabulary and devices: each distinct id there, its row here and the gradient back.
    assert np.all(moved <= 3 * 4 * 1.2 * (NUM_IDS + NUM_SHARED))


def test_what_moves_grows_neither_with_the_vocabulary_nor_with_devices(mirrored):
    def moved(exchange, num_devices, vocab_size):
        ids, shared_ids = draw("uniform", vocab_size, num_devices)
        return moved_by(exchange, mirrored(num_devices), ids, shared_ids, vocab_size=vocab_size).mean()

    # Nearly all ids are distinct in either vocabulary.
    small, large = (moved(AllToAllExchange(), 4, vocab_size) for vocab_size in (10**5, 10**7))
    assert large == pytest.approx(small, rel=0.02)
    # Of what a device needs, it has 1 / N itself.
    few, many = (moved(AllToAllExchange(), n, 10**6) / (1 - 1 / n) for n in (2, 8))
    assert many == pytest.approx(few, rel=0.02)
    # As everything to everyone does.
    few, many = (moved(StaticExchange(), n, 10**6) for n in (2, 8))
    assert many > 3 * few


@pytest.mark.parametrize("batch_size", [2, 4, 6, 8, 10, 12, 16, 24])
def test_auto_has_rows_travel_where_little_is_won(mirrored, batch_size):
    strategy = mirrored(2)
    with strategy.scope():
        head = SampledSoftmax(
            table="words", vocab_size=53, counts=None, sampler=SAMPLERS["nearly_all"], exchange="auto"
        )
    task = FakeTask(head)
    ids = Text().ids[: batch_size * (WINDOW + 1)].reshape(batch_size, WINDOW + 1)
    traffic = StepTraffic(task, {"ids": ids}, num_devices=2, seed=1)
    rows, hidden = (
        sum(traffic.of_busiest_device({"next": exchange}).values()) for exchange in ("rows", "hidden")
    )
    assert traffic.chosen() == {"next": "hidden" if hidden < 0.8 * rows else "rows"}


class FakeTask:
    """The ids of a language model, without its layers."""

    tables = tied(embed_dim=6)["tables"]

    def __init__(self, head):
        self.heads = {"next": head}

    def num_rows(self, table):
        assert table == "words"
        return 53

    def lookups(self, features):
        return {"inputs": Lookup("words", features["ids"][:, :-1])}

    def labels(self, features):
        return {"next": Labels(features["ids"][:, 1:].reshape(-1), None)}
