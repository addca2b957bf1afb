"""The model's own parts: the body's updates, and what is saved of it on other numbers of devices."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from lmscale.bodies.lstm import lstm_body
from lmscale.experiment import Experiment
from lmscale.model import LanguageModel
from lmscale.parameters.tree import Parameter
from lmscale.parameters.update_rules import SGD, Adagrad, Adam, RowWiseAdagrad

VOCAB_SIZE, EMBED_DIM = 103, 6


def experiment(**changes):
    settings = {
        "data_dir": "",
        "train_steps": 1,
        "global_batch_size": 6,
        "window": 3,
        "embed_dim": EMBED_DIM,
        "body": lambda: lstm_body(num_layers=2, hidden_dim=5),
        "loss": None,
        "row_optimizer": RowWiseAdagrad(learning_rate=0.1),
        "body_optimizer": Adam(learning_rate=0.01),
        "seed": 3,
        "log_every": 1,
        "eval_every": 1,
        "save_every": 1,
    }
    return Experiment(**(settings | changes))


def build(strategy, *, trainable=True, **changes):
    with strategy.scope():
        return LanguageModel(experiment(**changes), vocab_size=VOCAB_SIZE, trainable=trainable)


def values(model):
    """{name: array} of everything saved, read in two blocks."""
    whole = {}
    for item in model.checkpoint_items():
        assert isinstance(item, Parameter)
        if item.shape:
            middle = item.shape[0] // 2
            whole[item.path] = np.concatenate([item.read(0, middle), item.read(middle, item.shape[0])])
        else:
            whole[item.path] = np.asarray(item.read(0, 1))
        assert whole[item.path].shape == tuple(item.shape), item.path
        assert whole[item.path].dtype == item.dtype, item.path
    return whole


@pytest.mark.parametrize("num_devices", [1, 3])
def test_initial_bias_is_the_log_frequency(mirrored, num_devices):
    counts = np.random.default_rng(0).integers(0, 1000, VOCAB_SIZE)
    counts[7] = 0
    strategy = mirrored(num_devices)
    with strategy.scope():
        model = LanguageModel(
            experiment(initial_bias="log_frequency", global_batch_size=6),
            vocab_size=VOCAB_SIZE,
            counts=counts,
        )
    bias = model.table.read_rows("bias", 0, VOCAB_SIZE).astype(np.float64)
    # A softmax of it alone is the distribution of the words, nearly, and never zero.
    assert np.exp(bias).sum() == pytest.approx(1, rel=1e-5)
    np.testing.assert_allclose(np.exp(bias) * (counts.sum() + VOCAB_SIZE), counts + 1, rtol=1e-5)
    # Nothing else of the model depends on it.
    plain = values(build(strategy))
    for name, value in values(model).items():
        assert (value == plain[name]).all() == (name != "table/bias"), name


def step_body(model, strategy, gradients, *, step, scale=1.0, keep=True):
    @tf.function
    def update():
        strategy.run(
            lambda: model.apply_body_gradients(
                {name: tf.constant(g) for name, g in gradients.items()},
                step=tf.constant(step),
                scale=tf.constant(scale),
                keep=tf.constant(keep),
            )
        )

    update()


def random_gradients(model, rng):
    variables = model.encoder.trainable_variables
    return {name: rng.normal(size=v.shape).astype(np.float32) for name, v in variables.items()}


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
def test_body_updates_against_keras(mirrored, num_replicas, rule, peer):
    strategy = mirrored(num_replicas)
    model = build(strategy, body_optimizer=rule)
    start = {name: v.numpy() for name, v in model.encoder.trainable_variables.items()}
    expected = {name: keras.Variable(value) for name, value in start.items()}
    optimizer = peer()
    rng = np.random.default_rng(0)
    for step in range(4):
        gradients = random_gradients(model, rng)
        step_body(model, strategy, gradients, step=step, scale=0.5)
        names = sorted(expected)
        optimizer.apply([0.5 * gradients[name] for name in names], [expected[name] for name in names])
    for name, variable in model.encoder.trainable_variables.items():
        for copy in strategy.experimental_local_results(variable.value):
            np.testing.assert_allclose(copy.numpy(), expected[name].numpy(), rtol=2e-5, atol=2e-6)
        assert np.abs(variable.numpy() - start[name]).max() > 1e-2


def test_an_update_that_is_not_kept_changes_nothing(mirrored):
    strategy = mirrored(2)
    model = build(strategy)
    rng = np.random.default_rng(0)
    step_body(model, strategy, random_gradients(model, rng), step=0)
    before = values(model)
    bad = {name: np.full_like(g, np.nan) for name, g in random_gradients(model, rng).items()}
    step_body(model, strategy, bad, step=1, keep=False)
    after = values(model)
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value, err_msg=name)


def test_items_are_logical_tensors_that_any_number_of_devices_reads_back(mirrored):
    strategy, rng = mirrored(3), np.random.default_rng(0)
    source = build(strategy)
    step_body(source, strategy, random_gradients(source, rng), step=0)
    source.table.write_rows("embedding", 5, rng.normal(size=[90, EMBED_DIM]).astype(np.float32))
    saved = values(source)
    assert saved["table/embedding"].shape == (VOCAB_SIZE, EMBED_DIM)
    assert saved["table/bias"].shape == (VOCAB_SIZE,)
    for num_replicas in (1, 2, 8):
        target = build(mirrored(num_replicas), seed=4)
        assert any(np.any(values(target)[name] != saved[name]) for name in saved)
        for item in target.checkpoint_items():
            value = saved[item.path]
            if item.shape:
                cut = item.shape[0] // 3
                item.write(0, value[:cut])
                item.write(cut, value[cut:])
            else:
                item.write(0, value)
        read = values(target)
        assert read.keys() == saved.keys()
        for name, value in saved.items():
            np.testing.assert_array_equal(read[name], value, err_msg=name)


def test_initial_values_do_not_depend_on_the_devices_or_on_earlier_models(mirrored):
    first, second = values(build(mirrored(1))), values(build(mirrored(3)))
    assert first.keys() == second.keys()
    for name, value in first.items():
        np.testing.assert_array_equal(second[name], value, err_msg=name)
    other = values(build(mirrored(1), seed=4))
    for name in ("table/embedding", "body/0/lstm_cell/kernel", "body/1/lstm_cell/recurrent_kernel"):
        assert np.any(other[name] != first[name]), name


def test_evaluation_holds_no_slots(mirrored):
    names = {item.path for item in build(mirrored(2), trainable=False).checkpoint_items()}
    trained = {item.path for item in build(mirrored(2)).checkpoint_items()}
    assert names < trained
    assert {name.split("/")[0] for name in names} == {"table", "body"}
    assert {"table/embedding", "table/bias"} == {name for name in names if name.startswith("table/")}


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
    for name, value in expected.items():
        np.testing.assert_array_equal(actual[name], value, err_msg=name)
