"""lmscale's side of the comparisons: the trainer as `lmscale.train` runs it, on synthetic text."""

import dataclasses
import functools

import tensorflow as tf

from lmscale.benchmarks.peers.peer import Peer
from lmscale.benchmarks.synthetic import ZipfText
from lmscale.bodies.lstm import lstm_body
from lmscale.distribution.strategies import make_strategy
from lmscale.experiment import Experiment
from lmscale.parameters.groups import Group
from lmscale.parameters.update_rules import Adam
from lmscale.softmax.sampled import SampledSoftmax
from lmscale.softmax.samplers import LogUniformSampler
from lmscale.tables.rows import Rows
from lmscale.tables.table_config import TableConfig
from lmscale.tasks.next_token import NextToken
from lmscale.trainer import Trainer

TABLE = "words"


def sampled_softmax(shape, *, compute_dtype):
    """The head of these sizes, a function (table=, vocab_size=, counts=) as `NextToken` takes it."""
    sampler = functools.partial(LogUniformSampler, num_sampled=shape.num_sampled, replacement=False)
    return functools.partial(SampledSoftmax, sampler=sampler, compute_dtype=compute_dtype)


def make_trainer(
    shape, *, strategy, compute_dtype="float32", row_rule=None, steps_per_call=1, static_shapes=False
):
    """A `Trainer` of these sizes with the shipped configurations' choices, its table named `TABLE`.

    Args:
      shape: `ModelShape`.
      strategy: `tf.distribute.Strategy`.
      compute_dtype: of the products, body and loss.
      row_rule: update rule of the rows; None for the shipped Adam without a first moment.
      steps_per_call: as of `Experiment`.
      static_shapes: as of `Trainer`.
    """
    experiment = Experiment(
        data_dir="",
        task=functools.partial(
            NextToken,
            tables={TABLE: TableConfig(embed_dim=shape.embed_dim)},
            inputs=TABLE,
            outputs=TABLE,
            body=functools.partial(
                lstm_body, num_layers=shape.num_layers, hidden_dim=shape.hidden_dim, dropout=shape.dropout
            ),
            head=sampled_softmax(shape, compute_dtype=compute_dtype),
            window=shape.window,
        ),
        groups=[
            Group(pattern="tables/.*", update=row_rule or Adam(learning_rate=0.001, beta_1=0.0)),
            Group(pattern="layers/.*", update=Adam(learning_rate=0.001)),
        ],
        train_steps=1_000_000,
        global_batch_size=shape.batch_size,
        compute_dtype=compute_dtype,
        steps_per_call=steps_per_call,
        clip_norm=1.0,
        seed=0,
        log_every=1,
        eval_every=1,
        save_every=1,
    )
    return Trainer(
        experiment, data=ZipfText(shape.vocab_size), strategy=strategy, static_shapes=static_shapes
    )


class Lmscale(Peer):
    """The sampled softmax on a table, on the first GPU or the CPU. Reads the batches itself: they are in its time."""

    def __init__(self, shape, *, compute_dtype="float32", two_moments=False, steps_per_call=1):
        self.steps_per_call = steps_per_call
        self._trainer = make_trainer(
            shape,
            strategy=make_strategy(),
            compute_dtype=compute_dtype,
            row_rule=Adam(learning_rate=0.001) if two_moments else None,
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
        task, model = trainer.task, trainer.model
        (role,) = task.lookups(trainer.batches.at(0).features)
        random = tf.random.Generator.from_seed(0)
        inputs = random.normal([shape.batch_size, shape.window, shape.embed_dim])
        d_hidden = random.normal([shape.tokens, shape.embed_dim]) / shape.tokens
        state = task.initial_state(shape.batch_size)

        def replica_step(inputs):
            variables = model.layers.trainable_variables
            with tf.GradientTape() as tape:
                tape.watch(inputs)
                hidden, _ = model.forward({role: Rows(inputs)}, {}, state, dropout=None)
            d_inputs, gradients = tape.gradient(
                list(hidden.values()), (inputs, variables), output_gradients=[d_hidden]
            )
            checksum = tf.reduce_sum(d_inputs)
            model.apply_layer_gradients(
                gradients,
                step=dict.fromkeys(variables, tf.constant(1)),
                learning_rate=dict.fromkeys(variables),
                scale=dict.fromkeys(variables, 1.0),
                keep=dict.fromkeys(variables, tf.math.is_finite(checksum)),
            )
            return checksum

        self._inputs = inputs
        self._step = tf.function(
            lambda inputs: self._strategy.run(replica_step, args=(inputs,)), autograph=False
        )

    def train_step(self, window_ids):
        del window_ids
        return float(self._strategy.experimental_local_results(self._step(self._inputs))[0])
