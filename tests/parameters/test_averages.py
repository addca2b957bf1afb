"""Averages of weights against dense float64 ones: of rows that most steps skip, and of layers."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
import tiny_experiments

from lmscale.bodies.body import keras_body
from lmscale.bodies.lstm import lstm_body
from lmscale.parameters import averages
from lmscale.parameters.activity import Every
from lmscale.parameters.groups import Group
from lmscale.parameters.update_rules import SGD, Adam
from lmscale.trainer import Trainer

DECAY = 0.8
VOCAB_SIZE, NUM_STEPS = 103, 9


def make_trainer(strategy, *, groups):
    ids = np.random.default_rng(0).zipf(1.3, 700) % VOCAB_SIZE
    text = tiny_experiments.Text(vocab_size=VOCAB_SIZE, ids=ids)
    task = tiny_experiments.language_model(
        body=functools.partial(lstm_body, num_layers=1, hidden_dim=7), head=tiny_experiments.sampled()
    )
    experiment = tiny_experiments.experiment(task=task, groups=groups)
    return Trainer(experiment, data=text, strategy=strategy)


def weights(trainer):
    return {p.path: p.read(0, p.shape[0]).astype(np.float64) for p in trainer.parameters() if p.trainable}


def averaged_groups(active=None):
    def averaged(rule):
        return averages.Averaged(update=rule, decay=DECAY)

    return [
        Group(pattern="tables/.*", update=averaged(Adam(learning_rate=0.05, beta_1=0.0))),
        Group(pattern="layers/.*", update=averaged(SGD(learning_rate=0.3)), active=active),
    ]


@pytest.mark.parametrize("num_devices", [1, 3])
def test_averages_equal_dense_ones(mirrored, num_devices):
    trainer = make_trainer(mirrored(num_devices), groups=averaged_groups(Every(period=2, offset=1)))
    dense, num_updates = {}, {}
    for step in range(NUM_STEPS):
        trainer.train_steps()
        for path, value in weights(trainer).items():
            if path.startswith("layers/") and step % 2 == 0:
                continue  # Inactive: the clock stands still.
            dense[path] = DECAY * dense.get(path, 0.0) + (1 - DECAY) * value
            num_updates[path] = num_updates.get(path, 0) + 1
    before = weights(trainer)
    with averages.in_place_of_weights(trainer.model, step=trainer.step):
        found = weights(trainer)
    assert found.keys() == dense.keys()
    for path, value in dense.items():
        np.testing.assert_allclose(
            found[path], value / (1 - DECAY ** num_updates[path]), rtol=2e-5, atol=2e-6
        )
        assert np.any(found[path] != before[path]), path
    # The weights are back, bit for bit, and the averages can be read again.
    for path, value in weights(trainer).items():
        np.testing.assert_array_equal(value, before[path])
    with averages.in_place_of_weights(trainer.model, step=trainer.step):
        for path, value in weights(trainer).items():
            np.testing.assert_allclose(value, found[path], rtol=1e-6, atol=1e-7)


def test_weights_come_back_after_an_error(mirrored):
    trainer = make_trainer(mirrored(1), groups=averaged_groups())
    trainer.train_steps()
    trainer.train_steps()
    before = weights(trainer)
    with (
        pytest.raises(RuntimeError, match="in between"),
        averages.in_place_of_weights(trainer.model, step=trainer.step),
    ):
        raise RuntimeError("in between")
    for path, value in weights(trainer).items():
        np.testing.assert_array_equal(value, before[path])


def test_updates_are_those_of_the_rule_within(mirrored):
    plain = make_trainer(
        mirrored(1),
        groups=[
            Group(pattern="tables/.*", update=Adam(learning_rate=0.05, beta_1=0.0)),
            Group(pattern="layers/.*", update=SGD(learning_rate=0.3)),
        ],
    )
    averaged = make_trainer(mirrored(1), groups=averaged_groups())
    for _ in range(4):
        plain.train_steps()
        averaged.train_steps()
    for path, value in weights(plain).items():
        np.testing.assert_allclose(weights(averaged)[path], value, rtol=1e-6, atol=1e-7)


def test_before_the_first_update_there_is_nothing_to_average(mirrored):
    trainer = make_trainer(mirrored(1), groups=averaged_groups())
    before = weights(trainer)
    with averages.in_place_of_weights(trainer.model, step=0):
        for path, value in weights(trainer).items():
            np.testing.assert_array_equal(value, before[path])


def test_weights_under_a_constraint_are_refused(mirrored):
    def body():
        return keras_body(layer=lambda: keras.layers.Dense(5, kernel_constraint="non_neg"))

    text = tiny_experiments.Text()
    task = tiny_experiments.language_model(body=body)
    experiment = tiny_experiments.experiment(task=task, groups=averaged_groups())
    with pytest.raises(ValueError, match="layers/dense_0/kernel, with NonNeg"):
        Trainer(experiment, data=text, strategy=mirrored(1))


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="decay=1"):
        averages.Averaged(update=SGD(learning_rate=1.0), decay=1)
    with pytest.raises(ValueError, match="not averaged itself"):
        averages.Averaged(update=averages.Averaged(update=SGD(learning_rate=1.0)))


def test_caught_up_is_the_sum_of_the_skipped_steps():
    rule = averages.Averaged(update=SGD(learning_rate=1.0), decay=DECAY)
    weight, average = np.array([[2.0, -1.0], [0.5, 3.0]]), np.array([[0.25, 1.0], [-2.0, 0.0]])
    expected = average.copy()
    for row, skipped in enumerate((5, 0)):
        for _ in range(skipped):
            expected[row] = DECAY * expected[row] + (1 - DECAY) * weight[row]
    found = rule.caught_up(
        tf.constant(weight, tf.float32),
        tf.constant(average, tf.float32),
        tf.constant([2.0, 7.0]),
        num_updates=tf.constant(7),
    )
    np.testing.assert_allclose(found, expected, rtol=1e-6)
