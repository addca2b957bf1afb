"""Gradient accumulation: a step of several parts equals that of the undivided batch, up to the rounding of sums."""

import functools

import keras
import numpy as np
import pytest
import tiny_experiments
from tiny_experiments import Text, language_model, one_rule, sampled, values

from lmscale.bodies.body import keras_body
from lmscale.bodies.lstm import lstm_body
from lmscale.parameters.update_rules import Adagrad
from lmscale.softmax.full import FullSoftmax
from lmscale.softmax.sampled import SampledSoftmax
from lmscale.softmax.samplers import InBatchSampler
from lmscale.trainer import Trainer

NUM_STEPS = 8
HEADS = {
    "sampled": sampled(),
    "in_batch": functools.partial(SampledSoftmax, sampler=InBatchSampler),
    "full": FullSoftmax,
}


def penalised_gru():
    """Carries no state; its penalties are of the weights and, over the examples, of the outputs."""
    layer = functools.partial(
        keras.layers.GRU,
        7,
        return_sequences=True,
        kernel_regularizer=keras.regularizers.L2(0.03),
        activity_regularizer=keras.regularizers.L2(0.02),
    )
    return keras_body(layer=layer)


BODIES = {
    # Its dropout depends on the number of the example.
    "lstm": functools.partial(lstm_body, num_layers=2, hidden_dim=7, dropout=0.3),
    "gru": penalised_gru,
}


def make_trainer(strategy, *, body, head, num_parts):
    experiment = tiny_experiments.experiment(
        task=language_model(body=BODIES[body], head=HEADS[head], window=3),
        groups=one_rule(Adagrad(learning_rate=0.05)),
        global_batch_size=18,
        clip_norm=0.5,
        gradient_accumulation_steps=num_parts,
    )
    return Trainer(experiment, data=Text(), strategy=strategy)


def train(strategy, **settings):
    """({metric: [NUM_STEPS, ...]}, {path: array}) of a run, over the end of an epoch."""
    trainer = make_trainer(strategy, **settings)
    assert trainer.batches.steps_per_epoch < NUM_STEPS
    steps = [trainer.train_steps() for _ in range(NUM_STEPS)]
    return (
        {name: np.concatenate([step[name].numpy() for step in steps]) for name in steps[0]},
        values(trainer.parameters()),
    )


@pytest.fixture(scope="module")
def undivided(mirrored):
    """undivided(devices, body, head): what `train` gives without parts."""
    return functools.cache(
        lambda devices, body, head: train(mirrored(devices), body=body, head=head, num_parts=1)
    )


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize(("devices", "num_parts"), [(1, 2), (1, 9), (3, 3)])
def test_equals_the_undivided_batch(mirrored, undivided, devices, num_parts, body, head):
    expected, expected_values = undivided(devices, body, head)
    metrics, found = train(mirrored(devices), body=body, head=head, num_parts=num_parts)
    assert metrics.keys() == expected.keys()
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-6)
    np.testing.assert_allclose(metrics["penalty"], expected["penalty"], rtol=1e-6)
    assert np.all(metrics["penalty"] > 0) == (body == "gru")
    np.testing.assert_allclose(metrics["gradient_norm"], expected["gradient_norm"], rtol=1e-5)
    np.testing.assert_array_equal(metrics["rows_touched/words"], expected["rows_touched/words"])
    assert found.keys() == expected_values.keys()
    assert ("state/0" in found) == (body == "lstm")
    for path, value in expected_values.items():
        np.testing.assert_allclose(found[path], value, rtol=1e-4, atol=1e-6, err_msg=path)


def test_the_runs_move(undivided):
    """Equal losses of runs that stand still would prove nothing."""
    for body in BODIES:
        losses = undivided(1, body, "full")[0]["loss"]
        assert np.ptp(losses) > 1e-3


@pytest.mark.parametrize(("devices", "num_parts", "multiple"), [(1, 4, 4), (3, 4, 12)])
def test_parts_must_divide_the_batch(mirrored, devices, num_parts, multiple):
    words = (
        rf"global_batch_size=18, devices={devices} x {num_parts} gradient_accumulation_steps\. "
        rf"Set GLOBAL_BATCH_SIZE to a multiple of {multiple}\."
    )
    with pytest.raises(ValueError, match=words):
        make_trainer(mirrored(devices), body="gru", head="full", num_parts=num_parts)
