"""The whole step compiles for devices that run nothing but XLA; here XLA for the CPU stands in."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from tiny_experiments import Text, experiment, language_model, tied, untied, values
from xla_graphs import devices, with_dynamic_shape, without_kernel

from lmscale.bodies.body import keras_body
from lmscale.bodies.lstm import lstm_body
from lmscale.evaluation import Evaluator
from lmscale.parameters.activity import Every, Never
from lmscale.parameters.groups import Group
from lmscale.parameters.update_rules import SGD, Adam, RowWiseAdagrad
from lmscale.softmax.full import FullSoftmax
from lmscale.softmax.sampled import SampledSoftmax
from lmscale.softmax.samplers import InBatchSampler, LogUniformSampler, UnigramSampler
from lmscale.trainer import Trainer

VOCAB_SIZE, NUM_STEPS, EMBED_DIM = 1003, 4, 12


def log_uniform(*, replacement):
    sampler = functools.partial(LogUniformSampler, num_sampled=31, replacement=replacement)
    return functools.partial(SampledSoftmax, sampler=sampler)


def unigram():
    return functools.partial(SampledSoftmax, sampler=functools.partial(UnigramSampler, num_sampled=31))


def lstm():
    return lstm_body(num_layers=2, hidden_dim=9, dropout=0.2, dropout_over_time=True)


def one_lstm():
    return lstm_body(num_layers=1, hidden_dim=9)


def gru():
    return keras_body(layer=functools.partial(keras.layers.GRU, 9, return_sequences=True))


def convolution():
    def layer():
        return keras.Sequential(
            [
                keras.layers.Conv1D(11, 3, padding="causal", activation="relu"),
                keras.layers.LayerNormalization(),
                keras.layers.Conv1D(9, 2, padding="causal", activation="tanh"),
            ]
        )

    return keras_body(layer=layer)


@keras.saving.register_keras_serializable("test_xla")
class Transformer(keras.layers.Layer):
    """One block of a transformer, which looks back only."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.attention = keras.layers.MultiHeadAttention(num_heads=2, key_dim=5)
        self.norms = [keras.layers.LayerNormalization() for _ in range(2)]
        self.wide = keras.layers.Dense(17, activation="gelu")
        self.narrow = keras.layers.Dense(EMBED_DIM)

    def call(self, inputs):
        x = inputs + self.attention(self.norms[0](inputs), self.norms[0](inputs), use_causal_mask=True)
        return x + self.narrow(self.wide(self.norms[1](x)))


def transformer():
    return keras_body(layer=Transformer)


# Adam divides a gradient by its size, however small: its epsilon keeps rounding from counting as a gradient.
GROUPS = [
    Group(pattern="layers/.*/bias", active=Every(period=2), clip_norm=0.01),
    Group(pattern="tables/.*", update=Adam(learning_rate=0.01, beta_1=0.0, epsilon=1e-3)),
    Group(pattern="layers/.*", update=Adam(learning_rate=0.02, epsilon=1e-3)),
]
FROZEN = [
    Group(pattern="tables/inputs/.*", active=Never()),
    Group(pattern="layers/.*/bias", active=Never()),
    Group(pattern="tables/.*", update=RowWiseAdagrad(learning_rate=0.05)),
    Group(pattern=".*", update=SGD(learning_rate=0.05)),
]
TIED, UNTIED = tied(embed_dim=EMBED_DIM), untied(input_dim=EMBED_DIM, output_dim=10)
# {name: (arguments of `language_model`, arguments of `experiment`)}. Together they try each part that may vary, and
# are as few as that takes: nearly all time goes to XLA.
CASES = {
    "two lstms, dropout, tied, without replacement": (
        {"body": lstm, "head": log_uniform(replacement=False), **TIED},
        {"groups": GROUPS},
    ),
    "lstm, untied, with replacement, accumulated": (
        {"body": one_lstm, "head": log_uniform(replacement=True), **UNTIED},
        {"groups": GROUPS, "gradient_accumulation_steps": 2},
    ),
    "gru, tied, full softmax": ({"body": gru, "head": FullSoftmax, **TIED}, {"groups": GROUPS}),
    "convolution, tied, in-batch": (
        {"body": convolution, "head": functools.partial(SampledSoftmax, sampler=InBatchSampler), **TIED},
        {"groups": GROUPS},
    ),
    "transformer, untied, unigram, accumulated, frozen": (
        {"body": transformer, "head": unigram(), **UNTIED},
        {"groups": FROZEN, "gradient_accumulation_steps": 4},
    ),
    "lstm, tied, bfloat16": (
        {"body": one_lstm, "head": log_uniform(replacement=False), **TIED},
        {"groups": GROUPS, "compute_dtype": "bfloat16"},
    ),
}


# Evaluated as well. The exact loss is computed by the same function whatever was trained.
EVALUATED = ("lstm, untied, with replacement, accumulated", "gru, tied, full softmax")
# Float32 that is summed in another order: measured at most 2.1e-7 on losses, 1.4e-7 on norms of gradients. A number
# next to the middle between two bfloat16s may be rounded to either by products that differ in their last bits.
TOLERANCES = dict.fromkeys(CASES, 1e-6) | {"lstm, tied, bfloat16": 1e-3}


def make_trainer(strategy, case, *, static_shapes):
    task, settings = CASES[case]
    ids = np.random.default_rng(0).integers(0, VOCAB_SIZE, 101)
    return Trainer(
        experiment(
            task=language_model(window=3, eval_window=3, **task),
            global_batch_size=4,
            eval_batch_size=4,
            clip_norm=0.1,
            **settings,
        ),
        data=Text(vocab_size=VOCAB_SIZE, ids=ids),
        strategy=strategy,
        static_shapes=static_shapes,
    )


def step_of(run, *, compiled):
    @functools.partial(tf.function, autograph=False, jit_compile=compiled)
    def step(features, number, starts_epoch):
        return run.strategy.run(run.replica_step, args=(features, number, starts_epoch))

    return step


def arguments(run, number):
    batch = run.batches.at(number)
    return tensors(batch), tf.constant(number), tf.constant(batch.starts_epoch)


def tensors(batch):
    return {name: tf.constant(x) for name, x in batch.features.items()}


def check_operations(concrete):
    """XLA has a kernel for each operation, and shapes do not depend on values."""
    for device in devices():
        assert without_kernel(concrete, device=device) == []
    assert with_dynamic_shape(concrete) == []


def train(strategy, case, *, compiled):
    """(`Trainer`, metrics of each step, {path: value} after the last)."""
    run = make_trainer(strategy, case, static_shapes=compiled)
    step = step_of(run, compiled=compiled)
    if compiled:
        check_operations(step.get_concrete_function(*arguments(run, 0)))
    metrics = []
    for number in range(NUM_STEPS):
        results = step(*arguments(run, number))
        metrics.append({name: value.numpy() for name, value in results.items()})
    return run, metrics, values(run.parameters())


def evaluate(run, *, compiled):
    """[(sum of exact losses, sum of training losses)] of two batches, the state carried between them."""
    evaluator = Evaluator.of_experiment(run.experiment, run.model, strategy=run.strategy)

    @functools.partial(tf.function, autograph=False, jit_compile=compiled)
    def step(state, features, number):
        return evaluator._step(state, features, number, with_training_loss=True)

    batches, state, sums = run.task.evaluation_batches("valid"), evaluator._initial_state(), []
    if compiled:
        number = tf.constant(0)
        check_operations(step.get_concrete_function(state, tensors(batches.at(0)), number))
    for number in range(2):
        of_batch, state = step(state, tensors(batches.at(number)), tf.constant(number))
        sums.append(of_batch.numpy())
    return np.array(sums)


@pytest.mark.parametrize("case", CASES)
def test_compiled_step_equals_the_plain_one(mirrored, case):
    plain_run, plain, plain_values = train(mirrored(1), case, compiled=False)
    compiled_run, compiled, compiled_values = train(mirrored(1), case, compiled=True)
    tolerance = TOLERANCES[case]
    for actual, expected in zip(compiled, plain, strict=True):
        assert actual.keys() == expected.keys()
        assert expected["is_finite"]
        assert expected["gradient_norm"] > 0.1  # It is clipped.
        for name in expected:
            np.testing.assert_allclose(actual[name], expected[name], rtol=tolerance, err_msg=name)
    assert len({float(expected["loss"]) for expected in plain}) == NUM_STEPS
    assert compiled_values.keys() == plain_values.keys()
    for path, value in plain_values.items():
        np.testing.assert_allclose(compiled_values[path], value, rtol=tolerance, atol=tolerance, err_msg=path)
    if case in EVALUATED:
        expected = evaluate(plain_run, compiled=False)
        assert (expected > 1).all()
        np.testing.assert_allclose(evaluate(compiled_run, compiled=True), expected, rtol=tolerance)


def test_what_xla_cannot_compile_is_found():
    """An op without a kernel in the branch of a condition, one whose shape depends on values in the body of a loop."""

    @tf.function(autograph=False)
    def function(ids):
        def count(i, total):
            return i + 1, total + tf.size(tf.unique(ids)[0])

        def draw():
            drawn = tf.random.log_uniform_candidate_sampler(tf.zeros([1, 1], tf.int64), 1, 3, True, 9)
            return tf.cast(drawn[0][0], tf.int32)

        def loop():
            return tf.while_loop(lambda i, _: i < 3, count, [tf.constant(0), tf.constant(0)])[1]

        return tf.cond(tf.reduce_sum(ids) > 0, loop, draw)

    concrete = function.get_concrete_function(tf.TensorSpec([3], tf.int32))
    for device in devices():
        assert without_kernel(concrete, device=device) == ["LogUniformCandidateSampler"]
    assert with_dynamic_shape(concrete) == ["Unique"]

    @tf.function(autograph=False)
    def of_text(words):
        return words == words

    # There is a kernel, and not for these types.
    concrete = of_text.get_concrete_function(tf.TensorSpec([3], tf.string))
    assert without_kernel(concrete) == ["Equal DT_STRING"]


def test_step_for_one_device_has_shapes_that_xla_does_not_know(mirrored):
    """`static_shapes` is what makes the difference."""
    case = "convolution, tied, in-batch"
    run = make_trainer(mirrored(1), case, static_shapes=False)
    concrete = step_of(run, compiled=False).get_concrete_function(*arguments(run, 0))
    assert "Unique" in with_dynamic_shape(concrete)
