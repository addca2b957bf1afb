"""The models that are compiled by XLA, or traced for it: small, and together of every part that may vary."""

import functools

import keras
import numpy as np
import tensorflow as tf
from tiny_experiments import Text, experiment, language_model, tied, untied

from lmscale.bodies.body import keras_body
from lmscale.bodies.lstm import lstm_body
from lmscale.parameters.activity import Every, Never
from lmscale.parameters.groups import Group
from lmscale.parameters.update_rules import SGD, Adam, RowWiseAdagrad
from lmscale.softmax.full import FullSoftmax
from lmscale.softmax.sampled import SampledSoftmax
from lmscale.softmax.samplers import InBatchSampler, LogUniformSampler, UnigramSampler
from lmscale.trainer import Trainer

VOCAB_SIZE, EMBED_DIM = 1003, 12


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


@keras.saving.register_keras_serializable("xla_cases")
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
    "lstm, untied, with replacement": (
        {"body": one_lstm, "head": log_uniform(replacement=True), **UNTIED},
        {"groups": GROUPS},
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


def make_trainer(strategy, case, *, static_shapes, global_batch_size=4):
    task, settings = CASES[case]
    ids = np.random.default_rng(0).integers(0, VOCAB_SIZE, 101)
    return Trainer(
        experiment(
            task=language_model(window=3, eval_window=3, **task),
            global_batch_size=global_batch_size,
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
