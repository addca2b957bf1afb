"""lmscale's side of the comparisons: the trainer as `lmscale.train` runs it, on synthetic text."""

import dataclasses
import functools

import tensorflow as tf

from lmscale.benchmarks.peers.peer import Peer
from lmscale.benchmarks.synthetic import ZipfText
from lmscale.bodies.lstm import lstm_body
from lmscale.distribution.strategies import make_strategy
from lmscale.experiment import Experiment
from lmscale.parameters.update_rules import Adam
from lmscale.softmax.sampled import SampledSoftmax
from lmscale.softmax.samplers import LogUniformSampler
from lmscale.trainer import Trainer


def sampled_softmax(shape, *, compute_dtype):
    """The loss of these sizes, a function (vocab_size=, counts=) as `Experiment` takes it."""
    sampler = functools.partial(LogUniformSampler, num_sampled=shape.num_sampled, replacement=False)
    return functools.partial(SampledSoftmax, sampler=sampler, compute_dtype=compute_dtype)


def make_trainer(shape, *, strategy, compute_dtype="float32", row_optimizer=None, steps_per_call=1):
    """A `Trainer` of these sizes with the shipped configurations' choices.

    Args:
      shape: `ModelShape`.
      strategy: `tf.distribute.Strategy`.
      compute_dtype: of the products, body and loss.
      row_optimizer: rule for the rows; None for the shipped Adam without a first moment.
      steps_per_call: as of `Experiment`.
    """
    experiment = Experiment(
        data_dir="",
        train_steps=1_000_000,
        global_batch_size=shape.batch_size,
        window=shape.window,
        embed_dim=shape.embed_dim,
        body=functools.partial(
            lstm_body, num_layers=shape.num_layers, hidden_dim=shape.hidden_dim, dropout=shape.dropout
        ),
        loss=sampled_softmax(shape, compute_dtype=compute_dtype),
        row_optimizer=row_optimizer or Adam(learning_rate=0.001, beta_1=0.0),
        body_optimizer=Adam(learning_rate=0.001),
        compute_dtype=compute_dtype,
        steps_per_call=steps_per_call,
        clip_norm=1.0,
        seed=0,
        log_every=1,
        eval_every=1,
        save_every=1,
    )
    return Trainer(experiment, data=ZipfText(shape.vocab_size), strategy=strategy)


class Lmscale(Peer):
    """The sampled softmax on a table, on the first GPU or the CPU. Reads the batches itself: they are in its time."""

    def __init__(self, shape, *, compute_dtype="float32", two_moments=False, steps_per_call=1):
        self.steps_per_call = steps_per_call
        self._trainer = make_trainer(
            shape,
            strategy=make_strategy(),
            compute_dtype=compute_dtype,
            row_optimizer=Adam(learning_rate=0.001) if two_moments else None,
            steps_per_call=steps_per_call,
        )

    def train_step(self, window_ids):
        del window_ids
        return float(self._trainer.train_steps(self.steps_per_call)["loss"][-1])


class LmscaleBody(Peer):
    """What is left of lmscale's step without a vocabulary: body, its gradient and its update."""

    def __init__(self, shape, *, compute_dtype="float32"):
        # The least table there can be, which the step does not touch.
        self._strategy = make_strategy()
        trainer = make_trainer(
            dataclasses.replace(shape, vocab_size=shape.num_sampled),
            strategy=self._strategy,
            compute_dtype=compute_dtype,
        )
        model = trainer.model
        random = tf.random.Generator.from_seed(0)
        inputs = random.normal([shape.batch_size, shape.window, shape.embed_dim])
        d_hidden = random.normal([shape.tokens, shape.embed_dim]) / shape.tokens
        state = model.encoder.body.initial_state(shape.batch_size)

        def replica_step(inputs):
            variables = model.encoder.trainable_variables
            with tf.GradientTape() as tape:
                tape.watch(inputs)
                hidden, _ = model.encoder(inputs, state, dropout=None)
                hidden = tf.reshape(tf.cast(hidden, tf.float32), d_hidden.shape)
            d_inputs, gradients = tape.gradient(hidden, (inputs, variables), output_gradients=d_hidden)
            model.apply_body_gradients(
                gradients, step=tf.constant(1), scale=1.0, keep=tf.math.is_finite(tf.reduce_sum(d_inputs))
            )
            return tf.reduce_sum(d_inputs)

        self._inputs = inputs
        self._step = tf.function(
            lambda inputs: self._strategy.run(replica_step, args=(inputs,)), autograph=False
        )

    def train_step(self, window_ids):
        del window_ids
        return float(self._strategy.experimental_local_results(self._step(self._inputs))[0])
