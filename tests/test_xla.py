"""The whole step, pull to push, compiles for devices that run nothing but XLA; here XLA for the CPU stands in."""

import keras
import numpy as np
import tensorflow as tf

from lmscale.bodies.dropout import DropoutStream
from lmscale.bodies.encoder import Encoder
from lmscale.bodies.lstm import lstm_body
from lmscale.parameters.update_rules import Adam
from lmscale.softmax.sampled import SampledSoftmax
from lmscale.softmax.samplers import LogUniformSampler
from lmscale.tables.table import RowGradients, ShardedTable

VOCAB_SIZE, EMBED_DIM, BATCH, WINDOW = 1003, 12, 4, 5


def _make_step(*, jit_compile):
    """A step on a table of its own: (table, function of the step number that returns the loss)."""
    keras.utils.set_random_seed(0)
    table = ShardedTable(
        vocab_size=VOCAB_SIZE,
        embed_dim=EMBED_DIM,
        optimizer=Adam(learning_rate=0.01),
        seed=0,
        static_shapes=jit_compile,
    )
    encoder = Encoder(
        lstm_body(num_layers=2, hidden_dim=9, dropout=0.2, dropout_over_time=True),
        embed_dim=EMBED_DIM,
        batch_size=BATCH,
        window=WINDOW,
    )
    loss = SampledSoftmax(
        vocab_size=VOCAB_SIZE,
        counts=None,
        sampler=lambda **kwargs: LogUniformSampler(num_sampled=31, replacement=False, **kwargs),
    )
    ids = tf.constant(np.random.default_rng(0).integers(0, VOCAB_SIZE, [BATCH, WINDOW + 1]), tf.int32)

    @tf.function(jit_compile=jit_compile)
    def step(number):
        candidates = loss.candidates(seed=tf.stack([0, number]), labels=tf.reshape(ids[:, 1:], [-1]))
        window = table.pull(ids, candidates.sampled_ids)
        stream = DropoutStream(seed=0, step=number, first_example=0)
        inputs = window.embedding[:, :-1]
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            hidden, _ = encoder(inputs, encoder.body.initial_state(BATCH), dropout=stream)
            hidden = tf.reshape(hidden, [-1, EMBED_DIM])
        result = loss.value_and_gradients(
            hidden,
            labels=tf.reshape(ids[:, 1:], [-1]),
            loss_weights=tf.fill([BATCH * WINDOW], 1 / (BATCH * WINDOW)),
            pulled=window.labels_of_windows(),
            candidates=candidates,
            table=table,
        )
        gradient = tf.pad(
            tape.gradient(hidden, inputs, output_gradients=result.hidden), [[0, 0], [0, 1], [0, 0]]
        )
        gradient += tf.pad(tf.reshape(result.true_rows, inputs.shape), [[0, 0], [1, 0], [0, 0]])
        gradients = RowGradients(
            embedding=gradient, shared_embedding=result.shared_rows, shared_bias=result.shared_bias
        )
        table.push(window, gradients, step=number)
        return tf.reduce_mean(result.loss)

    return table, step


def test_compiled_step_equals_the_uncompiled():
    compiled_table, compiled = _make_step(jit_compile=True)
    plain_table, plain = _make_step(jit_compile=False)
    for number in range(5):
        np.testing.assert_allclose(compiled(tf.constant(number)), plain(tf.constant(number)), rtol=1e-5)
    rows = compiled_table.read_rows("embedding", 0, VOCAB_SIZE)
    np.testing.assert_allclose(rows, plain_table.read_rows("embedding", 0, VOCAB_SIZE), atol=1e-5)
