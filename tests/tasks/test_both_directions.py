"""Two directions: what each may see, by gradients; what it predicts; the exact loss of each, against numpy."""

import functools
import math

import keras
import numpy as np
import pytest
import tensorflow as tf
from references import log_softmax, lstm, lstm_weights
from tiny_experiments import EMBED_DIM, VOCAB_SIZE, Text, experiment, one_rule, tied

from lmscale.assembly import make_task
from lmscale.bodies.body import keras_body
from lmscale.bodies.lstm import lstm_body
from lmscale.evaluation import Evaluator
from lmscale.model import Model
from lmscale.softmax.full import FullSoftmax
from lmscale.tables.rows import Rows
from lmscale.tasks.both_directions import BothDirections

EOS_ID, WINDOW = 2, 5
TOKENS = np.random.default_rng(1).integers(0, VOCAB_SIZE, 43)
HEADS = ("next", "previous")


def settings(*, eval_batch_size=3, eval_window=WINDOW, body=None):
    task = functools.partial(
        BothDirections,
        body=body or functools.partial(lstm_body, num_layers=1, hidden_dim=EMBED_DIM, dropout=0.5),
        head=FullSoftmax,
        window=WINDOW,
        eval_window=eval_window,
        **tied(),
    )
    return experiment(task=task, global_batch_size=4, eval_batch_size=eval_batch_size)


def build(strategy, chosen, *, training=False):
    data = Text(ids=TOKENS, eos_id=EOS_ID)
    with strategy.scope():
        return make_task(chosen, data=data, num_replicas=strategy.num_replicas_in_sync, training=training)


@pytest.fixture(scope="module")
def task(mirrored):
    return build(mirrored(1), settings(), training=True)


def test_no_forward_loss_depends_on_the_future_and_no_backward_one_on_the_past(task):
    """By gradients: hidden states, which losses are made of, with respect to the row of each token of the window."""
    rows = tf.constant(np.random.default_rng(0).normal(size=[2, WINDOW + 2, EMBED_DIM]), tf.float32)
    # A loss of an untrained head, say: any function of the hidden state that no entry of it drops out of.
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(rows)
        hidden, _ = task.forward({"tokens": Rows(rows)}, {}, [], dropout=None)
        losses = {
            name: tf.reshape(tf.reduce_sum(tf.sin(3 * h), axis=-1), [2, WINDOW]) for name, h in hidden.items()
        }
    labels = task.labels({"ids": tf.tile(tf.range(WINDOW + 2)[tf.newaxis], [2, 1])})
    for name, loss in losses.items():
        # The example that a loss is of, its label's place, and what it depends on: [2, WINDOW, 2, WINDOW + 2].
        depends = np.any(tape.jacobian(loss, rows, experimental_use_pfor=False) != 0, axis=-1)
        places = labels[name].ids.numpy().reshape(2, WINDOW)
        tokens = np.arange(WINDOW + 2)
        for example in range(2):
            for t, place in enumerate(places[example]):
                allowed = tokens < place if name == "next" else tokens > place
                np.testing.assert_array_equal(depends[example, t, example], allowed)
                assert not depends[example, t, 1 - example].any()


def test_both_predict_the_same_tokens(task):
    for batch in (task.training_batches().at(3), task.evaluation_batches("valid").at(2)):
        features = {name: tf.constant(x) for name, x in batch.features.items()}
        labels = task.labels(features)
        shape = [-1, WINDOW]
        for of_next, of_previous in (
            (labels["next"].ids, labels["previous"].ids),
            (labels["next"].weights, labels["previous"].weights),
        ):
            turned = tf.reshape(of_previous, shape)[:, ::-1]
            np.testing.assert_array_equal(tf.reshape(of_next, shape), turned)
        np.testing.assert_array_equal(tf.reshape(labels["next"].ids, shape), features["ids"][:, 1:-1])


@pytest.mark.parametrize("num_replicas", [1, 3])
def test_exact_loss_of_each_head_against_numpy(mirrored, num_replicas):
    batch_size, window = 3, 4
    strategy = mirrored(num_replicas)
    chosen = settings(eval_batch_size=batch_size, eval_window=window)
    task = build(strategy, chosen)
    rng = np.random.default_rng(4)
    with strategy.scope():
        model = Model(task, groups=one_rule(), seed=3, training=False)
    table = rng.normal(size=[VOCAB_SIZE, EMBED_DIM]).astype(np.float32)
    bias = rng.normal(size=[VOCAB_SIZE]).astype(np.float32)
    model.tables["words"].write_rows("embedding", 0, table)
    model.tables["words"].write_rows("bias", 0, bias)
    result = Evaluator.of_experiment(chosen, model, strategy=strategy).evaluate(
        task.evaluation_batches("valid")
    )

    # Of each direction, windows of each lane; each window starts from nothing.
    around = np.concatenate([[EOS_ID], TOKENS, [EOS_ID]])
    length = -(-len(TOKENS) // batch_size)
    losses = {name: [] for name in HEADS}
    for lane in range(0, len(TOKENS), length):
        stop = min(lane + length, len(TOKENS))
        for start in range(lane, stop, window):
            ids = around[start : min(start + window, stop) + 2]
            # What fills the last window of a lane stands, for the backward direction, before all else.
            padding = [EOS_ID] * (start + window - min(start + window, stop))
            for name, context, wanted in (
                ("next", ids[:-2], ids[1:-1]),
                ("previous", np.concatenate([padding, ids[2:][::-1]]).astype(int), ids[1:-1][::-1]),
            ):
                (layer,) = task.encoders[name].body.layers.values()
                zeros = np.zeros([1, EMBED_DIM])
                x = table[context][np.newaxis].astype(np.float64)
                hidden, _, _ = lstm(x, **lstm_weights(layer), h=zeros, c=zeros)
                logits = hidden[0, -len(wanted) :] @ table.T.astype(np.float64) + bias
                losses[name] += list(-log_softmax(logits)[np.arange(len(wanted)), wanted])
    assert result.tokens == len(TOKENS)
    for name in HEADS:
        assert len(losses[name]) == len(TOKENS)
        assert result.heads[name]["loss_nats"] == pytest.approx(np.mean(losses[name]), rel=2e-6)
    of_heads = [of_head["loss_nats"] for of_head in result.heads.values()]
    assert not math.isclose(*of_heads, rel_tol=1e-3)
    assert result.loss_nats == pytest.approx(sum(of_heads), rel=1e-6)


def test_layers_of_the_directions_have_names_of_their_own(task):
    assert list(task.layers) == ["forward/lstm_0", "backward/lstm_0"]
    first, second = (layer.cell.kernel.numpy() for layer in task.layers.values())
    assert np.any(first != second)


def test_a_body_that_looks_ahead_is_refused(mirrored):
    layer = functools.partial(keras.layers.Conv1D, EMBED_DIM, 3, padding="same")
    body = functools.partial(keras_body, layer=layer, causal=False)
    with pytest.raises(ValueError, match="KerasBody, whose causal is False"):
        build(mirrored(1), settings(body=body))
