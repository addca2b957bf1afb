"""What a Keras layer is told counts in training, or is refused: regularisers, constraints, frozen layers, dropout."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from test_trainer import EMBED_DIM, trainer, weights

from lmscale.bodies.body import Body, keras_body
from lmscale.evaluation import Evaluator
from lmscale.parameters.groups import Group
from lmscale.parameters.update_rules import SGD, Adam

LEARNING_RATE = 0.1  # That of the trainer's groups.
REPLICAS = [1, 2, 3]


def train(strategy, layer, *, num_steps=1, **changes):
    """(weights before, weights after, metrics of the steps) of a run with `layer` as its body."""
    run = trainer(
        strategy,
        body=functools.partial(keras_body, layer=layer) if not isinstance(layer, type) else layer,
        **changes,
    )
    before = weights(run)
    metrics = [{name: m[0].numpy() for name, m in run.train_steps().items()} for _ in range(num_steps)]
    return before, weights(run), metrics


def inputs_of_first_step(run):
    """[examples, window, embed_dim] float64: the rows that a run of no steps reads next."""
    rows = run.model.tables["words"].read_rows("embedding", 0, run.data.vocab_size).astype(np.float64)
    return rows[run.batches.at(0).features["ids"][:, :-1]]


def gru(**settings):
    return functools.partial(keras.layers.GRU, EMBED_DIM, return_sequences=True, name="gru", **settings)


@pytest.mark.parametrize("num_replicas", REPLICAS)
def test_penalty_of_weights_counts_in_loss_gradient_and_norm(mirrored, num_replicas):
    """Against the run without it, whose gradient is known from its update."""
    strength = 0.03
    before, plain, (plain_metrics,) = train(mirrored(num_replicas), gru())
    same, penalised, (metrics,) = train(
        mirrored(num_replicas), gru(kernel_regularizer=keras.regularizers.L2(strength))
    )
    kernel = "layers/gru_0/kernel"
    np.testing.assert_array_equal(same[kernel], before[kernel])
    weights = before[kernel].astype(np.float64)
    penalty = strength * np.sum(weights**2)
    assert metrics["penalty"] == pytest.approx(penalty, rel=1e-6)
    assert plain_metrics["penalty"] == 0
    assert metrics["loss"] - plain_metrics["loss"] == pytest.approx(penalty, rel=1e-5)
    gradients = {name: (before[name].astype(np.float64) - plain[name]) / LEARNING_RATE for name in before}
    for name, gradient in gradients.items():
        expected = gradient + (2 * strength * weights if name == kernel else 0)
        actual = (before[name].astype(np.float64) - penalised[name]) / LEARNING_RATE
        np.testing.assert_allclose(actual, expected, atol=2e-6)
    squared = plain_metrics["gradient_norm"].astype(np.float64) ** 2 - np.sum(gradients[kernel] ** 2)
    squared += np.sum((gradients[kernel] + 2 * strength * weights) ** 2)
    assert metrics["gradient_norm"] == pytest.approx(np.sqrt(squared), rel=1e-5)


class AddsLosses(keras.layers.Layer):
    """y = x * scale; adds strength * mean(y ** 2) over the examples of a call, by add_loss."""

    def build(self, shape):
        self.scale = self.add_weight(shape=[shape[-1]], initializer="ones", name="scale")

    def call(self, x):
        y = x * self.scale
        self.add_loss(0.5 * tf.reduce_mean(y**2))
        return y


class CalledTwice(Body):
    """One layer, called twice: both losses count."""

    def __init__(self):
        super().__init__({"adds_losses": AddsLosses()})

    def __call__(self, inputs, state, *, dropout):
        return self.layers["adds_losses"](self.layers["adds_losses"](inputs)), state


@pytest.mark.parametrize("num_replicas", REPLICAS)
def test_losses_that_layers_add_count(mirrored, num_replicas):
    run = trainer(mirrored(num_replicas), body=CalledTwice)
    x = inputs_of_first_step(run)
    scale = "layers/adds_losses/scale"
    before = weights(run)[scale]
    metrics = {name: m[0].numpy() for name, m in run.train_steps().items()}
    # With scale = 1 either call's loss is 0.5 mean(x ** 2).
    assert metrics["penalty"] == pytest.approx(np.mean(x**2), rel=1e-5)
    # d/d scale_j of 0.5 mean(x^2 s^2) + 0.5 mean(x^2 s^4), beside the gradient of the run's own loss.
    expected = 3 * np.sum(x**2, axis=(0, 1)) / x.size
    other = trainer(mirrored(num_replicas), body=functools.partial(Silent, CalledTwice))
    other.train_steps()
    after, plain = (weights(r)[scale].astype(np.float64) for r in (run, other))
    np.testing.assert_allclose((plain - after) / LEARNING_RATE, expected, rtol=1e-3, atol=1e-6)
    assert not np.array_equal(after, before)


class Silent(Body):
    """A body whose layers' losses are forgotten."""

    def __init__(self, make):
        self.inner = make()
        super().__init__(self.inner.layers)

    def __call__(self, inputs, state, *, dropout):
        outputs = self.inner(inputs, state, dropout=dropout)
        self.layers["adds_losses"]._clear_losses()
        return outputs


@pytest.mark.parametrize("num_replicas", [1, 3])
def test_penalty_of_activities_counts(mirrored, num_replicas):
    strength = 0.02

    def dense(**settings):
        return functools.partial(keras.layers.Dense, EMBED_DIM, use_bias=False, name="dense", **settings)

    run = trainer(
        mirrored(num_replicas),
        body=functools.partial(keras_body, layer=dense(activity_regularizer=keras.regularizers.L1(strength))),
    )
    x = inputs_of_first_step(run)
    y = x @ weights(run)["layers/dense_0/kernel"].astype(np.float64)
    metrics = run.train_steps()
    # Keras divides the penalty by the number of examples.
    assert metrics["penalty"][0].numpy() == pytest.approx(strength * np.abs(y).sum() / len(y), rel=1e-5)


@pytest.mark.parametrize("num_replicas", [1, 3])
@pytest.mark.parametrize("rule", [SGD(learning_rate=1.0), Adam(learning_rate=0.1)], ids=["SGD", "Adam"])
def test_constraints_hold_after_every_update(mirrored, num_replicas, rule):
    layer = gru(kernel_constraint="non_neg", recurrent_constraint=keras.constraints.UnitNorm(axis=0))
    run = trainer(
        mirrored(num_replicas),
        body=functools.partial(keras_body, layer=layer),
        groups=[Group(pattern=".*", update=rule)],
    )
    assert weights(run)["layers/gru_0/kernel"].min() < 0
    for _ in range(3):
        run.train_steps()
        after = weights(run)
        assert after["layers/gru_0/kernel"].min() == 0 < after["layers/gru_0/kernel"].max()
        np.testing.assert_allclose(np.sum(after["layers/gru_0/recurrent_kernel"] ** 2, axis=0), 1, rtol=1e-5)


@pytest.mark.parametrize("num_replicas", [1, 2])
@pytest.mark.parametrize("where", ["layer", "stack", "inner"])
def test_frozen_layers_keep_their_weights(mirrored, num_replicas, where):
    """`trainable=False` at a layer, at the sequence around it, and at one of two layers in it."""

    def layer():
        if where == "layer":
            return gru(trainable=False)()
        inner = [
            keras.layers.Dense(4, name="frozen", trainable=where != "inner"),
            keras.layers.Dense(EMBED_DIM, name="other"),
        ]
        return keras.Sequential(inner, trainable=where != "stack", name="stack")

    before, after, _ = train(mirrored(num_replicas), layer, num_steps=2)
    moved = {path for path in before if np.any(before[path] != after[path])}
    other = {f"layers/stack/other/{name}" for name in ("kernel", "bias")}
    assert moved == (other if where == "inner" else set())


class Undecided(Body):
    """Calls Keras's Dropout without saying whether it trains."""

    def __init__(self):
        super().__init__({"dropout": keras.layers.Dropout(0.5, seed=3)})

    def __call__(self, inputs, state, *, dropout):
        return self.layers["dropout"](inputs), state


def test_keras_dropout_drops_in_training_only(mirrored):
    run = trainer(mirrored(1), body=Undecided)
    plain = trainer(mirrored(1), body=functools.partial(keras_body, layer=keras.layers.Identity))
    assert run.train_steps()["loss"][0] != plain.train_steps()["loss"][0]
    losses = []
    for r in (run, plain):  # Back to the rows that both began with.
        table = r.model.tables["words"]
        table.write_rows("embedding", 0, np.ones([r.data.vocab_size, EMBED_DIM], np.float32) * 0.1)
        table.write_rows("bias", 0, np.arange(r.data.vocab_size, dtype=np.float32))
        evaluator = Evaluator.of_experiment(r.experiment, r.model, strategy=r.strategy)
        losses.append(evaluator.evaluate(r.task.evaluation_batches("valid")).loss_nats)
    assert losses[0] == losses[1]


def test_dropout_of_a_recurrent_layer_draws_anew_at_each_step(mirrored):
    """With rates of 0 for learning, nothing but the masks changes between steps of the same windows."""
    run = trainer(
        mirrored(1),
        body=functools.partial(keras_body, layer=gru(dropout=0.5, recurrent_dropout=0.3, seed=1)),
        groups=[Group(pattern=".*", update=SGD(learning_rate=1e-30))],
    )
    losses = []
    for _ in range(3):
        run.step = 0
        losses.append(float(run.train_steps()["loss"][0]))
    assert len(set(losses)) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stateful": True}, r"state of its own.*'gru' \(GRU\) with stateful=True"),
        ({"dtype": "bfloat16"}, r"must be float32.*'gru.*dtype='bfloat16'.*mixed_bfloat16"),
        ({"dtype": "float64"}, r"must be float32.*'gru.*dtype='float64'"),
        ({"dtype": "mixed_float16"}, r"vanish in float16.*'gru.*dtype='mixed_float16'"),
        ({"return_state": True}, r"must return \(hidden, new state\).*'gru' \(GRU\).*return_state"),
    ],
    ids=lambda value: (
        "" if isinstance(value, str) else next(iter(value)) + "_" + str(next(iter(value.values())))
    ),
)
def test_settings_without_effect_are_refused(mirrored, settings, message):
    with pytest.raises(ValueError, match=message):
        train(mirrored(1), gru(**settings))


def test_products_in_bfloat16_leave_weights_in_float32(mirrored):
    _, after, (metrics,) = train(mirrored(2), gru(dtype="mixed_bfloat16"))
    _, _, (plain_metrics,) = train(mirrored(2), gru())
    assert {value.dtype for name, value in after.items() if "seed" not in name} == {np.dtype(np.float32)}
    assert 0 < abs(metrics["gradient_norm"] / plain_metrics["gradient_norm"] - 1) < 1e-2


def test_masks_are_refused(mirrored):
    def masked():
        return keras.Sequential([keras.layers.Masking(), gru()()], name="masked")

    with pytest.raises(ValueError, match=r"must not mask.*'masked' \(Sequential\)"):
        train(mirrored(1), masked)


class Unlisted(Body):
    """Forgets one of its layers."""

    def __init__(self):
        super().__init__({"listed": keras.layers.Dense(4, name="listed")})
        self.other = keras.layers.Dense(EMBED_DIM, name="unlisted")

    def __call__(self, inputs, state, *, dropout):
        return self.other(self.layers["listed"](inputs)), state


@pytest.mark.parametrize("num_replicas", [1, 2])
def test_layers_that_are_not_listed_are_refused(mirrored, num_replicas):
    with pytest.raises(
        ValueError, match=r"must be listed in `layers`.*Unlisted, which reads unlisted/kernel"
    ):
        trainer(mirrored(num_replicas), body=Unlisted)


class UnlistedInTraining(Unlisted):
    """Uses the layer that it forgot in training only."""

    def __call__(self, inputs, state, *, dropout):
        hidden = inputs if dropout is None else self.other(inputs)
        return self.layers["listed"](hidden), state


def test_layers_that_are_not_listed_and_used_in_training_only_are_refused(mirrored):
    run = trainer(mirrored(2), body=UnlistedInTraining)
    with pytest.raises(
        ValueError, match=r"must be listed in `layers`.*NextToken, which reads unlisted/kernel"
    ):
        run.train_steps()


class AddsVector(keras.layers.Layer):
    """Adds a loss that is no scalar, which Keras would sum."""

    def call(self, x):
        self.add_loss(tf.reduce_mean(x**2, axis=[0, 1]))
        return x


def test_a_loss_that_is_no_scalar_is_summed(mirrored):
    run = trainer(mirrored(2), body=functools.partial(keras_body, layer=AddsVector))
    x = inputs_of_first_step(run)
    expected = np.sum(np.mean(x**2, axis=(0, 1)))
    assert run.train_steps()["penalty"][0].numpy() == pytest.approx(expected, rel=1e-5)


class NotANumberAtTheSecondStep(keras.layers.Layer):
    """Counts its calls in training, and returns NaN in the second one."""

    def build(self, shape):
        self.calls = self.add_weight(shape=[], dtype="int32", initializer="zeros", trainable=False)

    def call(self, x, training=False):
        if training:
            self.calls.assign_add(1)
            x = tf.where(self.calls.value == 2, np.float32("nan"), x)
        return x


def test_statistics_of_a_skipped_step_are_taken_back(mirrored):
    def layer():
        normalization = keras.layers.BatchNormalization(name="normalization")
        return keras.Sequential([NotANumberAtTheSecondStep(), normalization])

    run = trainer(mirrored(1), body=functools.partial(keras_body, layer=layer), on_bad_step="skip")
    means = []
    for finite in (True, False, True):
        assert run.train_steps()["is_finite"].numpy() == [finite]
        (path,) = [path for path in run.model.layers.statistics if path.endswith("/moving_mean")]
        means.append(run.model.layers.statistics[path].numpy())
    assert np.isfinite(means).all()
    np.testing.assert_array_equal(means[1], means[0])
    assert np.any(means[2] != means[1])
