"""The whole step compiles for devices that run nothing but XLA; here XLA for the CPU stands in."""

import functools

import numpy as np
import pytest
import tensorflow as tf
from tiny_experiments import Text, experiment, language_model, tied, untied, values

from lmscale.bodies.lstm import lstm_body
from lmscale.parameters.activity import Every
from lmscale.parameters.groups import Group
from lmscale.parameters.update_rules import Adam
from lmscale.softmax.sampled import SampledSoftmax
from lmscale.softmax.samplers import LogUniformSampler
from lmscale.trainer import Trainer

VOCAB_SIZE, NUM_STEPS = 1003, 5
TABLES = {"tied": tied(embed_dim=12), "untied": untied(input_dim=7, output_dim=10)}


def train(strategy, tables, *, compiled):
    """(metrics of each step, {path: value} after the last), through `Trainer.replica_step`."""
    task = language_model(
        body=functools.partial(lstm_body, num_layers=2, hidden_dim=9, dropout=0.2, dropout_over_time=True),
        head=functools.partial(
            SampledSoftmax, sampler=functools.partial(LogUniformSampler, num_sampled=31, replacement=False)
        ),
        **tables,
    )
    # Adam divides a gradient by its size, however small: its epsilon keeps rounding from counting as a gradient.
    groups = [
        Group(pattern="layers/lstm_0/.*", active=Every(period=2), clip_norm=0.01),
        Group(pattern="tables/.*", update=Adam(learning_rate=0.01, beta_1=0.0, epsilon=1e-3)),
        Group(pattern="layers/.*", update=Adam(learning_rate=0.02, epsilon=1e-3)),
    ]
    ids = np.random.default_rng(0).integers(0, VOCAB_SIZE, 101)
    run = Trainer(
        experiment(task=task, groups=groups, global_batch_size=4, clip_norm=0.1),
        data=Text(vocab_size=VOCAB_SIZE, ids=ids),
        strategy=strategy,
        static_shapes=compiled,
    )

    @functools.partial(tf.function, autograph=False, jit_compile=compiled)
    def step(features, number, starts_epoch):
        return strategy.run(run.replica_step, args=(features, number, starts_epoch))

    metrics = []
    for number in range(NUM_STEPS):
        batch = run.batches.at(number)
        features = {name: tf.constant(x) for name, x in batch.features.items()}
        results = step(features, tf.constant(number), tf.constant(batch.starts_epoch))
        metrics.append({name: value.numpy() for name, value in results.items()})
    return metrics, values(run.parameters())


@pytest.mark.parametrize("tables", TABLES)
def test_compiled_step_equals_the_plain_one(mirrored, tables):
    plain, plain_values = train(mirrored(1), TABLES[tables], compiled=False)
    compiled, compiled_values = train(mirrored(1), TABLES[tables], compiled=True)
    for actual, expected in zip(compiled, plain, strict=True):
        assert actual.keys() == expected.keys()
        assert expected["is_finite"]
        assert expected["gradient_norm"] > 0.1  # It is clipped.
        for name in expected:
            np.testing.assert_allclose(actual[name], expected[name], rtol=1e-5, err_msg=name)
    assert compiled_values.keys() == plain_values.keys()
    for path, value in plain_values.items():
        np.testing.assert_allclose(compiled_values[path], value, rtol=1e-5, atol=1e-6, err_msg=path)
