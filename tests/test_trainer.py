"""The step itself: bodies of every kind, and what a bad step leaves."""

import functools

import keras
import numpy as np
import pytest

from lmscale.bodies.body import Body, keras_body
from lmscale.bodies.lstm import lstm_body
from lmscale.experiment import Experiment
from lmscale.parameters.update_rules import SGD
from lmscale.softmax.sampled import SampledSoftmax
from lmscale.softmax.samplers import LogUniformSampler
from lmscale.trainer import Trainer

VOCAB_SIZE, EMBED_DIM = 53, 6


class Text:
    vocab_size, eos_id = VOCAB_SIZE, 0
    ids = np.random.default_rng(0).integers(0, VOCAB_SIZE, 301)
    counts = np.bincount(ids, minlength=VOCAB_SIZE)

    def split(self, name):
        del name
        return self.ids


def trainer(strategy, *, body, **changes):
    settings = {
        "data_dir": "",
        "train_steps": 100,
        "global_batch_size": 6,
        "window": 5,
        "eval_window": 5,
        "embed_dim": EMBED_DIM,
        "body": body,
        "loss": functools.partial(
            SampledSoftmax, sampler=functools.partial(LogUniformSampler, num_sampled=11)
        ),
        "row_optimizer": SGD(learning_rate=0.1),
        "body_optimizer": SGD(learning_rate=0.1),
        "seed": 3,
        "log_every": 1,
        "eval_every": 1,
        "save_every": 1,
    }
    return Trainer(Experiment(**(settings | changes)), data=Text(), strategy=strategy)


class Positions(Body):
    """Adds a learned vector of the position: its gradient is sparse. One more variable has none at all."""

    def __init__(self):
        super().__init__([keras.layers.Embedding(5, EMBED_DIM), keras.layers.Dense(1)])
        self.layers[1].build([None, EMBED_DIM])

    def __call__(self, inputs, state, *, dropout):
        return inputs + self.layers[0](np.arange(inputs.shape[1])), state


@pytest.mark.parametrize("num_replicas", [1, 3])
@pytest.mark.parametrize("clip_norm", [None, 1e-3])
def test_sparse_gradients_of_a_body(mirrored, num_replicas, clip_norm):
    run = trainer(mirrored(num_replicas), body=Positions, clip_norm=clip_norm)
    before = {name: v.numpy() for name, v in run.model.encoder.variables.items()}
    run.train_steps()
    after = {name: v.numpy() for name, v in run.model.encoder.variables.items()}
    (looked_up,) = [name for name in before if "embeddings" in name]
    assert (after[looked_up] != before[looked_up]).any(axis=1).all()
    for name in before.keys() - {looked_up}:
        np.testing.assert_array_equal(after[name], before[name])


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


def test_negative_learning_rate_is_refused_before_the_first_step(mirrored):
    falling = keras.optimizers.schedules.PolynomialDecay(-0.1, 10)
    with pytest.raises(ValueError, match=r"learning rate of row_optimizer.*-0.1"):
        trainer(
            mirrored(1),
            body=functools.partial(lstm_body, num_layers=1, hidden_dim=4),
            row_optimizer=SGD(learning_rate=falling),
        )


def test_a_bad_first_step_of_an_epoch_still_forgets_the_last_epoch(mirrored):
    run = trainer(mirrored(2), body=functools.partial(lstm_body, num_layers=1, hidden_dim=4))
    while run.step < run.batches.steps_per_epoch:
        run.train_steps()
    assert np.any(run._read_state(0))
    run.model.table.write_rows("embedding", 0, np.full([VOCAB_SIZE, EMBED_DIM], np.nan, np.float32))
    assert run.batches.at(run.step).starts_epoch
    metrics = run.train_steps()
    assert metrics["is_finite"].numpy().tolist() == [False]
    np.testing.assert_array_equal(run._read_state(0), 0.0)


@pytest.mark.parametrize("num_replicas", [1, 2])
def test_steps_in_one_call_equal_single_steps_bit_for_bit(mirrored, num_replicas):
    def train(calls, **settings):
        run = trainer(
            mirrored(num_replicas), body=functools.partial(lstm_body, num_layers=1, hidden_dim=4), **settings
        )
        metrics = [run.train_steps(num_steps) for num_steps in calls]
        assert run.step == 11 > run.batches.steps_per_epoch
        metrics = {name: np.concatenate([m[name].numpy() for m in metrics]) for name in metrics[0]}
        return metrics, {
            item.path: item.read(0, item.shape[0] if item.shape else 1) for item in run.checkpoint_items()
        }

    # Over the end of an epoch, and with calls that are not full.
    whole, whole_state = train([5, 1, 5], steps_per_call=5)
    single, single_state = train([1] * 11)
    assert whole["rows_touched"].shape == (11, num_replicas)
    for name in single:
        np.testing.assert_array_equal(whole[name], single[name])
    for name in single_state:
        np.testing.assert_array_equal(whole_state[name], single_state[name])


@pytest.mark.parametrize("num_steps", [0, 4])
def test_more_steps_than_a_call_has_room_for_are_refused(mirrored, num_steps):
    run = trainer(mirrored(1), body=Positions, steps_per_call=3)
    with pytest.raises(ValueError, match=rf"1 \.\. 3.*Received: num_steps={num_steps}\."):
        run.train_steps(num_steps)
    assert run.step == 0
