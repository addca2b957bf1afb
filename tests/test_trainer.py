"""The step itself: bodies of every kind, and what a bad step leaves."""

import functools

import keras
import numpy as np
import pytest
import tiny_experiments
from tiny_experiments import (
    EMBED_DIM,
    VOCAB_SIZE,
    Text,
    assert_same,
    language_model,
    one_rule,
    sampled,
    values,
)

from lmscale.bodies.body import Body, keras_body
from lmscale.bodies.lstm import lstm_body
from lmscale.parameters.activity import Never
from lmscale.parameters.groups import Group
from lmscale.parameters.update_rules import SGD
from lmscale.trainer import Trainer


def trainer(strategy, *, body, tables=None, **changes):
    task = language_model(body=body, head=sampled(), **(tables or {}))
    return Trainer(tiny_experiments.experiment(task=task, **changes), data=Text(), strategy=strategy)


def weights(run):
    """{path: array} of the variables of the layers."""
    return {path: v.numpy() for path, v in run.model.layers.variables.items()}


class Positions(Body):
    """Adds a learned vector of the position: its gradient is sparse. One more variable has none at all."""

    def __init__(self):
        super().__init__({"positions": keras.layers.Embedding(5, EMBED_DIM), "unused": keras.layers.Dense(1)})
        self.layers["unused"].build([None, EMBED_DIM])

    def __call__(self, inputs, state, *, dropout):
        return inputs + self.layers["positions"](np.arange(inputs.shape[1])), state


@pytest.mark.parametrize("num_replicas", [1, 3])
@pytest.mark.parametrize("clip_norm", [None, 1e-3])
def test_sparse_gradients_of_a_body(mirrored, num_replicas, clip_norm):
    run = trainer(mirrored(num_replicas), body=Positions, clip_norm=clip_norm)
    before = weights(run)
    run.train_steps()
    after = weights(run)
    looked_up = "layers/positions/embeddings"
    assert (after[looked_up] != before[looked_up]).any(axis=1).all()
    unused = {f"layers/unused/{name}" for name in ("kernel", "bias")}
    assert unused == before.keys() - {looked_up}
    for path in unused:
        np.testing.assert_array_equal(after[path], before[path])


def test_statistics_of_a_body_are_refused_on_several_devices(mirrored):
    body = functools.partial(keras_body, layer=keras.layers.BatchNormalization)
    with pytest.raises(ValueError, match=r"moving_mean.*LayerNormalization"):
        trainer(mirrored(2), body=body)
    trainer(mirrored(1), body=body).train_steps()


def test_state_that_is_no_list_is_refused(mirrored):
    class Tuple(Positions):
        def initial_state(self, batch_size):
            return (np.zeros([batch_size, 2], np.float32),)

    with pytest.raises(ValueError, match="must be a list"):
        trainer(mirrored(1), body=Tuple)


@pytest.mark.parametrize("pattern", ["tables/.*", "layers/.*"])
def test_negative_learning_rate_is_refused_before_the_first_step(mirrored, pattern):
    falling = keras.optimizers.schedules.PolynomialDecay(-0.1, 10)
    with pytest.raises(ValueError, match=rf"learning rate.*-0.1.*, of the group '{pattern[:-2]}"):
        trainer(
            mirrored(1),
            body=functools.partial(lstm_body, num_layers=1, hidden_dim=4),
            groups=[Group(pattern=pattern, update=SGD(learning_rate=falling)), *one_rule()],
        )


def test_a_bad_first_step_of_an_epoch_still_forgets_the_last_epoch(mirrored):
    run = trainer(mirrored(2), body=functools.partial(lstm_body, num_layers=1, hidden_dim=4))
    while run.step < run.batches.steps_per_epoch:
        run.train_steps()
    assert np.any(values(run.parameters())["state/0"])
    run.model.tables["words"].write_rows("embedding", 0, np.full([VOCAB_SIZE, EMBED_DIM], np.nan, np.float32))
    assert run.batches.at(run.step).starts_epoch
    metrics = run.train_steps()
    assert metrics["is_finite"].numpy().tolist() == [False]
    np.testing.assert_array_equal(values(run.parameters())["state/0"], 0.0)


@pytest.mark.parametrize("num_replicas", [1, 2])
@pytest.mark.parametrize("tables", [None, tiny_experiments.untied(input_dim=5, output_dim=7)])
def test_steps_in_one_call_equal_single_steps_bit_for_bit(mirrored, num_replicas, tables):
    def train(calls, **settings):
        run = trainer(
            mirrored(num_replicas),
            body=functools.partial(lstm_body, num_layers=1, hidden_dim=4),
            tables=tables,
            **settings,
        )
        metrics = [run.train_steps(num_steps) for num_steps in calls]
        assert run.step == 11 > run.batches.steps_per_epoch
        metrics = {name: np.concatenate([m[name].numpy() for m in metrics]) for name in metrics[0]}
        return metrics, values(run.parameters())

    # Over the end of an epoch, and with calls that are not full.
    whole, whole_state = train([5, 1, 5], steps_per_call=5)
    single, single_state = train([1] * 11)
    names = ["inputs", "outputs"] if tables else ["words"]
    assert {n for n in whole if n.startswith("rows_touched/")} == {f"rows_touched/{n}" for n in names}
    for name in names:
        assert whole[f"rows_touched/{name}"].shape == (11, num_replicas)
    assert_same(whole, single)
    assert_same(whole_state, single_state)


@pytest.mark.parametrize("num_steps", [0, 4])
def test_more_steps_than_a_call_has_room_for_are_refused(mirrored, num_steps):
    run = trainer(mirrored(1), body=Positions, steps_per_call=3)
    with pytest.raises(ValueError, match=rf"1 \.\. 3.*Received: num_steps={num_steps}\."):
        run.train_steps(num_steps)
    assert run.step == 0


@pytest.mark.parametrize("num_replicas", [1, 3])
def test_a_table_that_is_frozen_as_a_whole_stays_and_the_others_learn(mirrored, num_replicas):
    groups = [Group(pattern="tables/inputs/.*", active=Never()), *one_rule()]
    run = trainer(
        mirrored(num_replicas),
        body=tiny_experiments.identity,
        tables=tiny_experiments.untied(input_dim=5, output_dim=7),
        groups=groups,
    )
    before = values(run.parameters())
    run.train_steps()
    after = values(run.parameters())
    assert [path for path in before if not np.array_equal(before[path], after[path])] == [
        "tables/outputs/embedding",
        "tables/outputs/bias",
        "layers/projection/kernel",
    ]
    assert set(before) == set(run.model.treatments)
