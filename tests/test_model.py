"""The model's own parts: the updates of layers, and what is saved of it on other numbers of devices."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
import tiny_experiments
from tiny_experiments import Text, assert_same, language_model, restore, tied

from lmscale.assembly import make_task
from lmscale.bodies.lstm import lstm_body
from lmscale.model import Model
from lmscale.parameters.groups import Group
from lmscale.parameters.tree import Parameter
from lmscale.parameters.update_rules import SGD, Adagrad, Adam, RowWiseAdagrad

VOCAB_SIZE, EMBED_DIM = 103, 6
COUNTS = np.random.default_rng(0).integers(0, 1000, VOCAB_SIZE)
COUNTS[7] = 0


def build(strategy, *, training=True, layer_rule=None, seed=3, bias="zeros", **tables):
    groups = [
        Group(pattern="tables/.*", update=RowWiseAdagrad(learning_rate=0.1)),
        Group(pattern="layers/.*", update=layer_rule or Adam(learning_rate=0.01)),
    ]
    experiment = tiny_experiments.experiment(
        task=language_model(
            body=functools.partial(lstm_body, num_layers=2, hidden_dim=5),
            window=3,
            **(tables or tied(bias=bias)),
        ),
        groups=groups,
        seed=seed,
        global_batch_size=24,  # A multiple of each number of devices here.
    )
    with strategy.scope():
        task = make_task(
            experiment,
            data=Text(vocab_size=VOCAB_SIZE, counts=COUNTS),
            num_replicas=strategy.num_replicas_in_sync,
            training=training,
        )
        return Model(
            task,
            groups=groups,
            seed=seed,
            training=training,
        )


def values(model):
    """{path: array} of everything saved."""
    parameters = model.parameters()
    assert all(isinstance(parameter, Parameter) for parameter in parameters)
    return tiny_experiments.values(parameters)


@pytest.mark.parametrize("num_devices", [1, 3])
def test_initial_bias_is_the_log_frequency(mirrored, num_devices):
    strategy = mirrored(num_devices)
    model = build(strategy, bias="log_frequency")
    bias = model.tables["words"].read_rows("bias", 0, VOCAB_SIZE).astype(np.float64)
    # A softmax of it alone is the distribution of the words, nearly, and never zero.
    assert np.exp(bias).sum() == pytest.approx(1, rel=1e-5)
    np.testing.assert_allclose(np.exp(bias) * (COUNTS.sum() + VOCAB_SIZE), COUNTS + 1, rtol=1e-5)
    # Nothing else of the model depends on it.
    plain = values(build(strategy))
    for name, value in values(model).items():
        assert (value == plain[name]).all() == (name != "tables/words/bias"), name


def test_a_table_without_bias_has_none_and_starts_like_one_with(mirrored):
    plain, without = values(build(mirrored(2))), values(build(mirrored(2), bias="none"))
    gone = {"tables/words/bias", "slots/tables/words/bias/accumulator"}
    assert_same(without, {path: value for path, value in plain.items() if path not in gone})


def step_layers(model, strategy, gradients, *, step, scale=1.0, keep=True):
    """One update of the layers, by gradients {path: array}."""
    rates = {path: t.update.learning_rate_at(tf.constant(step)) for path, t in model.treatments.items()}

    @tf.function
    def update():
        strategy.run(
            lambda: model.apply_layer_gradients(
                {path: tf.constant(g) for path, g in gradients.items()},
                step=dict.fromkeys(gradients, tf.constant(step)),
                learning_rate=rates,
                scale=dict.fromkeys(gradients, tf.constant(scale)),
                keep=dict.fromkeys(gradients, tf.constant(keep)),
            )
        )

    update()


def random_gradients(model, rng):
    variables = model.layers.trainable_variables
    return {path: rng.normal(size=v.shape).astype(np.float32) for path, v in variables.items()}


@pytest.mark.parametrize("num_replicas", [1, 3])
@pytest.mark.parametrize(
    ("rule", "peer"),
    [
        (SGD(learning_rate=0.3), lambda: keras.optimizers.SGD(0.3)),
        (
            Adagrad(learning_rate=0.3),
            lambda: keras.optimizers.Adagrad(0.3, initial_accumulator_value=0.1, epsilon=1e-14),
        ),
        (Adam(learning_rate=0.03), lambda: keras.optimizers.Adam(0.03, epsilon=1e-14)),
    ],
    ids=["SGD", "Adagrad", "Adam"],
)
def test_updates_of_layers_against_keras(mirrored, num_replicas, rule, peer):
    strategy = mirrored(num_replicas)
    model = build(strategy, layer_rule=rule)
    start = {path: v.numpy() for path, v in model.layers.trainable_variables.items()}
    expected = {path: keras.Variable(value) for path, value in start.items()}
    optimizer = peer()
    rng = np.random.default_rng(0)
    for step in range(4):
        gradients = random_gradients(model, rng)
        step_layers(model, strategy, gradients, step=step, scale=0.5)
        paths = sorted(expected)
        optimizer.apply([0.5 * gradients[path] for path in paths], [expected[path] for path in paths])
    for path, variable in model.layers.trainable_variables.items():
        for copy in strategy.experimental_local_results(variable.value):
            np.testing.assert_allclose(copy.numpy(), expected[path].numpy(), rtol=2e-5, atol=2e-6)
        assert np.abs(variable.numpy() - start[path]).max() > 1e-2


def test_scale_and_keep_are_those_of_each_parameter(mirrored):
    strategy = mirrored(2)
    model = build(strategy, layer_rule=SGD(learning_rate=0.5))
    before = {path: v.numpy() for path, v in model.layers.trainable_variables.items()}
    gradients = random_gradients(model, np.random.default_rng(0))
    scales = {path: tf.constant(0.1 * i) for i, path in enumerate(gradients)}
    keeps = {path: tf.constant(i != 2) for i, path in enumerate(gradients)}
    rates = {path: tf.constant(0.5 + i) for i, path in enumerate(gradients)}
    strategy.run(
        lambda: model.apply_layer_gradients(
            {path: tf.constant(g) for path, g in gradients.items()},
            step=dict.fromkeys(gradients, tf.constant(0)),
            learning_rate=rates,
            scale=scales,
            keep=keeps,
        )
    )
    for i, (path, variable) in enumerate(model.layers.trainable_variables.items()):
        moved = 0 if i == 2 else (0.5 + i) * 0.1 * i * gradients[path].astype(np.float64)
        np.testing.assert_allclose(variable.numpy(), before[path] - moved, rtol=1e-5, atol=1e-6, err_msg=path)


def test_an_update_that_is_not_kept_changes_nothing(mirrored):
    strategy = mirrored(2)
    model = build(strategy)
    rng = np.random.default_rng(0)
    step_layers(model, strategy, random_gradients(model, rng), step=0)
    before = values(model)
    bad = {path: np.full_like(g, np.nan) for path, g in random_gradients(model, rng).items()}
    step_layers(model, strategy, bad, step=1, keep=False)
    assert_same(values(model), before)


def test_parameters_are_logical_tensors_that_any_number_of_devices_reads_back(mirrored):
    strategy, rng = mirrored(3), np.random.default_rng(0)
    tables = tiny_experiments.untied(input_dim=4, output_dim=7)
    source = build(strategy, **tables)
    step_layers(source, strategy, random_gradients(source, rng), step=0)
    source.tables["inputs"].write_rows("embedding", 5, rng.normal(size=[90, 4]).astype(np.float32))
    source.tables["outputs"].write_rows("bias", 1, rng.normal(size=[91]).astype(np.float32))
    saved = values(source)
    assert saved["tables/inputs/embedding"].shape == (VOCAB_SIZE, 4)
    assert saved["tables/outputs/embedding"].shape == (VOCAB_SIZE, 7)
    assert saved["tables/outputs/bias"].shape == (VOCAB_SIZE,)
    assert "tables/inputs/bias" not in saved
    for num_replicas in (1, 2, 8):
        target = build(mirrored(num_replicas), seed=4, **tables)
        assert any(np.any(values(target)[path] != saved[path]) for path in saved)
        restore(target.parameters(), saved)
        assert_same(values(target), saved)


def test_rows_are_scattered_to_their_ids(mirrored):
    """What a warm start writes, of sharded tensors and of those with a copy on each device."""
    rng = np.random.default_rng(0)
    for num_replicas in (1, 3):
        model = build(mirrored(num_replicas))
        before = values(model)
        for parameter in model.parameters():
            if parameter.shape:
                ids = rng.permutation(parameter.shape[0])[: -(-parameter.shape[0] // 2)]
                new = rng.normal(size=[len(ids), *parameter.shape[1:]]).astype(parameter.dtype)
                parameter.scatter(ids, new)
                before[parameter.path][ids] = new
        assert_same(values(model), before)


def test_initial_values_do_not_depend_on_the_devices_or_on_earlier_models(mirrored):
    first, second = values(build(mirrored(1))), values(build(mirrored(3)))
    assert_same(second, first)
    other = values(build(mirrored(1), seed=4))
    for path in ("tables/words/embedding", "layers/lstm_0/kernel", "layers/lstm_1/recurrent_kernel"):
        assert np.any(other[path] != first[path]), path


def test_evaluation_holds_no_slots(mirrored):
    paths = {parameter.path for parameter in build(mirrored(2), training=False).parameters()}
    trained = {parameter.path for parameter in build(mirrored(2)).parameters()}
    assert paths < trained
    assert {path.split("/")[0] for path in paths} == {"tables", "layers"}
    assert {path.split("/")[0] for path in trained - paths} == {"slots"}
    assert {"tables/words/embedding", "tables/words/bias"} == {p for p in paths if p.startswith("tables/")}


def test_keras_settings_of_the_user_change_nothing(mirrored):
    expected = values(build(mirrored(1)))
    keras.config.set_floatx("float16")
    keras.config.set_epsilon(0.1)
    try:
        actual = values(build(mirrored(1)))
        assert keras.config.floatx() == "float32"
    finally:
        keras.config.set_floatx("float32")
        keras.config.set_epsilon(1e-7)
    assert {name: value.dtype for name, value in actual.items()} == {
        name: value.dtype for name, value in expected.items()
    }
    assert_same(actual, expected)
