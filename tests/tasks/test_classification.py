"""Classification: losses, gradients and measures against plain TensorFlow in float64; settings that are refused."""

import functools

import numpy as np
import pytest
import tensorflow as tf
import tiny_experiments

from lmscale.assembly import make_task
from lmscale.data.columns import Column, Lists, PreparedColumns
from lmscale.data.vocab import UNK, UnnamedVocabulary, Vocabulary
from lmscale.evaluation import Evaluator
from lmscale.parameters.activity import Every
from lmscale.parameters.groups import Group
from lmscale.parameters.update_rules import SGD
from lmscale.softmax.full import FullSoftmax
from lmscale.tables.table_config import TableConfig
from lmscale.tasks.classification import Classification
from lmscale.trainer import Trainer

SIZES = {"town": 23, "tags": 31, "label": 17}
NUM_EXAMPLES, BAG, RATE = 60, 4, 0.5


class Table(PreparedColumns):
    """Stands in for a prepared table: the same examples in each split."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self.directory = "here"
        self.columns = {
            "town": Column(type="ids", vocabulary="town"),
            "home": Column(type="ids", vocabulary="town"),
            "tags": Column(type="lists", vocabulary="tags"),
            "age": Column(type="numbers"),
            "label": Column(type="ids", vocabulary="label"),
        }
        lengths = rng.integers(0, BAG + 3, NUM_EXAMPLES)
        self.values = {
            "town": rng.integers(0, SIZES["town"], NUM_EXAMPLES),
            "home": rng.integers(0, SIZES["town"], NUM_EXAMPLES),
            "tags": Lists(
                rng.integers(0, SIZES["tags"], lengths.sum()), np.concatenate([[0], np.cumsum(lengths)])
            ),
            "age": rng.normal(size=[NUM_EXAMPLES, 1]).astype(np.float32),
            "label": rng.integers(0, SIZES["label"], NUM_EXAMPLES),
        }

    @property
    def vocabularies(self):
        return {name: UnnamedVocabulary(size=size) for name, size in SIZES.items()}

    def num_examples(self, split):
        return NUM_EXAMPLES

    def column(self, split, name):
        return self.values[name]


def tables(*, feature_dim=5, bias="none"):
    return {
        "towns": TableConfig(embed_dim=feature_dim, vocabulary="town", bias=bias),
        "tags": TableConfig(embed_dim=5, vocabulary="tags", bias="none"),
        "labels": TableConfig(embed_dim=7, vocabulary="label", bias="zeros"),
    }


def task(**changes):
    settings = {
        "tables": tables(),
        "features": {"town": "towns", "home": "towns", "tags": "tags"},
        "labels": {"label": "labels"},
        "early_labels": {"label": "labels"},
        "numbers": ["age"],
        "head": FullSoftmax,
        "bag_length": BAG,
        "shared_dim": 6,
        "hidden_dims": [9, 8],
    }
    return functools.partial(Classification, **(settings | changes))


def trainer(strategy, *, groups=None, **changes):
    settings = tiny_experiments.experiment(
        task=task(**changes),
        groups=groups or tiny_experiments.one_rule(SGD(learning_rate=RATE)),
        global_batch_size=12,
        eval_batch_size=7,
    )
    run = Trainer(settings, data=Table(), strategy=strategy)
    rng = np.random.default_rng(1)
    for parameter in run.parameters():
        if parameter.path.startswith(("tables/", "layers/")):
            parameter.write(0, rng.normal(size=parameter.shape).astype(np.float32) * 0.5)
    return run


def plain_hidden(values, features, *, bags):
    """{head: [n, dim]} in float64, by dense TensorFlow."""
    parts = []
    for name, table in (("town", "towns"), ("home", "towns"), ("tags", "tags")):
        x = tf.gather(values[f"tables/{table}/embedding"], features[name])
        if name == "tags":
            weights = tf.cast(features["tags_weights"], tf.float64)
            x = tf.reduce_sum(x * weights[..., tf.newaxis], axis=1)
            if bags == "mean":
                x /= tf.maximum(tf.reduce_sum(weights, axis=1, keepdims=True), 1.0)
        parts.append(x @ values["layers/shared/kernel"])
    joined = x = tf.concat([*parts, tf.cast(features["age"], tf.float64)], axis=1)
    for i in range(2):
        x = tf.nn.relu(x @ values[f"layers/hidden_{i}/kernel"] + values[f"layers/hidden_{i}/bias"])
    return {
        "label": x @ values["layers/to_label/kernel"] + values["layers/to_label/bias"],
        "label_early": joined @ values["layers/to_label_early/kernel"] + values["layers/to_label_early/bias"],
    }


def plain_losses(values, features, *, bags):
    """{head: [n]} and {head: logits}."""
    losses, logits = {}, {}
    for head, hidden in plain_hidden(values, features, bags=bags).items():
        logits[head] = hidden @ tf.transpose(values["tables/labels/embedding"]) + values["tables/labels/bias"]
        losses[head] = tf.nn.sparse_softmax_cross_entropy_with_logits(features["label"], logits[head])
    return losses, logits


def float64(run):
    return {
        path: tf.Variable(value.astype(np.float64))
        for path, value in tiny_experiments.values(run.parameters()).items()
        if path.startswith(("tables/", "layers/"))
    }


@pytest.mark.parametrize("num_devices", [1, 2, 3])
@pytest.mark.parametrize("bags", ["mean", "sum"])
def test_a_step_against_plain_tensorflow(mirrored, bags, num_devices):
    run = trainer(mirrored(num_devices), bags=bags)
    values = float64(run)
    features = run.batches.at(0).features
    with tf.GradientTape() as tape:
        losses, _ = plain_losses(values, features, bags=bags)
        loss = tf.add_n([tf.reduce_mean(x) for x in losses.values()])
    gradients = tape.gradient(loss, values)
    metrics = run.train_steps()
    assert float(metrics["loss"][0]) == pytest.approx(float(loss), rel=1e-6)
    after = tiny_experiments.values(run.parameters())
    for path, gradient in gradients.items():
        expected = values[path].numpy() - RATE * tf.convert_to_tensor(gradient).numpy()
        np.testing.assert_allclose(after[path], expected, rtol=1e-5, atol=2e-6, err_msg=path)


@pytest.mark.parametrize("num_devices", [1, 4])
def test_measures_of_every_head(mirrored, num_devices):
    """Of examples that the batches do not divide."""
    strategy = mirrored(num_devices)
    run = trainer(strategy, bags="mean")
    evaluator = Evaluator.of_experiment(run.experiment, run.model, strategy=strategy)
    result = evaluator.evaluate(run.task.evaluation_batches("valid", limit=53))
    features = {name: x[:53] for name, x in run.task.examples("valid").at(np.arange(NUM_EXAMPLES)).items()}
    losses, logits = plain_losses(float64(run), features, bags="mean")
    assert result.heads.keys() == {"label", "label_early"}
    for head, found in result.heads.items():
        own = logits[head].numpy()
        ranks = 1 + np.sum(own > own[np.arange(53), features["label"]][:, None], axis=1)
        assert found["labels"] == 53
        assert found["loss_nats"] == pytest.approx(losses[head].numpy().mean(), rel=1e-6)
        assert found["accuracy@1"] == pytest.approx(np.mean(ranks == 1))
        assert found["accuracy@5"] == pytest.approx(np.mean(ranks <= 5))
        assert found["mrr"] == pytest.approx(np.mean(1 / ranks), rel=1e-6)


def test_the_shared_matrix_moves_at_every_third_step(mirrored):
    groups = [
        Group(pattern="layers/shared/.*", update=SGD(learning_rate=RATE), active=Every(period=3)),
        Group(pattern=".*", update=SGD(learning_rate=RATE)),
    ]
    run = trainer(mirrored(1), groups=groups)
    moved, others = [], []
    before = float64(run)
    for _ in range(6):
        run.train_steps()
        after = float64(run)
        moved.append(bool(np.any(after["layers/shared/kernel"] != before["layers/shared/kernel"])))
        others.append(bool(np.any(after["layers/hidden_0/kernel"] != before["layers/hidden_0/kernel"])))
        before = after
    assert sum(moved) == 2
    assert [i % 3 for i in np.flatnonzero(moved)] == [np.flatnonzero(moved)[0] % 3] * 2
    assert all(others)


def test_an_early_head_trains_the_shared_matrix_directly(mirrored):
    """Where no hidden layer lets anything through, it alone moves the matrix."""
    for early, moves in (({"label": "labels"}, True), (None, False)):
        run = trainer(mirrored(1), early_labels=early)
        for parameter in run.parameters():
            if parameter.path in ("layers/hidden_0/bias", "layers/hidden_1/bias"):
                parameter.write(0, np.full(parameter.shape, -100.0, np.float32))
        before = float64(run)["layers/shared/kernel"].numpy()
        run.train_steps()
        assert bool(np.any(float64(run)["layers/shared/kernel"].numpy() != before)) == moves


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": {"town": "towns", "village": "tags"}}, r"The column 'village' must be there"),
        (
            {"features": {"age": "towns", "tags": "tags"}},
            r"The column 'age' must be there, of ids or lists\. Received: numbers",
        ),
        ({"numbers": ["town"]}, r"The column 'town' must be there, of numbers\. Received: ids"),
        ({"labels": {"tags": "labels"}}, r"The column 'tags' must be there, of ids\. Received: lists"),
        (
            {"labels": {"town": "labels"}, "early_labels": None},
            "The table of a column must have rows of its vocabulary",
        ),
        ({"features": {"town": "towns"}}, r"not used: tags"),
        ({"features": {"town": "towns", "tags": "other"}}, r"missing: other"),
        ({"features": {}}, "not used: tags, towns"),
        ({"tables": tables(feature_dim=4)}, "one matrix multiplies them"),
        ({"tables": tables(bias="zeros")}, "A table that only features read must have no bias"),
        ({"hidden_dims": [3, 0]}, "hidden_dims must be at least 1"),
        ({"measures": ["accuracy"]}, "A measure must be"),
    ],
)
def test_refused(changes, message):
    settings = tiny_experiments.experiment(task=task(**changes))

    def batches():
        return make_task(settings, data=Table(), num_replicas=1).training_batches()

    with pytest.raises(ValueError, match=message):
        batches()


def test_another_kind_of_data():
    of_text = tiny_experiments.language_model(tables={"words": TableConfig(embed_dim=4, vocabulary="town")})
    of_table = task(tables={name: TableConfig(embed_dim=5, bias="none") for name in tables()})
    for wrong, data, message in (
        (of_text, Table(), r"must be a text\. Received: here, examples in columns"),
        (of_table, tiny_experiments.Text(), r"must be examples in columns\."),
    ):
        settings = tiny_experiments.experiment(task=wrong)
        with pytest.raises(ValueError, match=message):
            make_task(settings, data=data, num_replicas=1).training_batches()


def test_words_of_values():
    vocabulary = Vocabulary(tokens=("a", "b"), counts=np.array([2, 1]))
    assert vocabulary.ids == {"a": 0, "b": 1}
    assert Vocabulary(tokens=("a", UNK), counts=np.array([2, 1])).ids["zzz"] == 1
