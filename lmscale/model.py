"""The trained state of a run: vocabulary table, body, their optimizer slots; and how it is saved."""

import numpy as np
import tensorflow as tf

from lmscale import keras_settings
from lmscale.bodies.encoder import Encoder
from lmscale.distribution import collectives
from lmscale.parameters.tree import Parameter
from lmscale.tables.table import ShardedTable


class LanguageModel:
    """A tied table and the encoder between its two uses. Build it inside `strategy.scope()`.

    Attributes:
      table: `ShardedTable`, sharded.
      encoder: `Encoder`, replicated.
      body_slots: {variable: {slot: variable [1, ...]}}, replicated.
    """

    def __init__(self, experiment, *, vocab_size, counts=None, trainable=True):
        """Args:
        experiment: `Experiment`.
        vocab_size: rows of the table.
        counts: [vocab_size] int, how often each row occurs in the training data; None for a model whose values will
          be restored.
        trainable: whether to make the optimizer slots.
        """
        keras_settings.reset(seed=experiment.seed, compute_dtype=experiment.compute_dtype)
        self._body_optimizer = experiment.body_optimizer
        self.table = ShardedTable(
            vocab_size=vocab_size,
            embed_dim=experiment.embed_dim,
            optimizer=experiment.row_optimizer if trainable else None,
            bias=experiment.softmax_bias,
            seed=experiment.seed,
        )
        if experiment.initial_bias == "log_frequency" and counts is not None:
            self.table.write_rows("bias", 0, _log_frequency(counts))
        self.encoder = make_encoder(
            experiment,
            num_replicas=tf.distribute.get_strategy().num_replicas_in_sync,
            trainable=trainable,
        )
        self.body_slots = {
            name: {
                slot_name: tf.Variable(
                    tf.fill(
                        [1, *variable.shape] if slot.per_element else [1],
                        tf.cast(slot.initial_value, slot.dtype),
                    ),
                    trainable=False,
                )
                for slot_name, slot in experiment.body_optimizer.slots.items()
            }
            for name, variable in self.encoder.trainable_variables.items()
            if trainable
        }

    def apply_body_gradients(self, gradients, *, step, scale, keep):
        """Updates this replica's copy of the body; every replica is given the same gradients. In `strategy.run`.

        Args:
          gradients: {name: gradient}, already summed over the replicas.
          step, scale, keep: as for `ShardedTable.apply`.
        """
        for name, variable in self.encoder.trainable_variables.items():
            weights = collectives.local_value(variable.value)
            slots = {slot: collectives.local_value(v) for slot, v in self.body_slots[name].items()}
            # A body variable is one row: it moves at every step.
            new_weights, new_slots = self._body_optimizer.update_rows(
                weights=weights[tf.newaxis],
                gradients=tf.where(keep, gradients[name] * scale, 0.0)[tf.newaxis],
                slots={slot: v.read_value() for slot, v in slots.items()},
                step=step,
            )
            new_weights = new_weights[0]
            if variable.constraint is not None:
                new_weights = variable.constraint(new_weights)
            weights.assign(tf.where(keep, new_weights, weights))
            for slot, value in new_slots.items():
                slots[slot].assign(tf.where(keep, value, slots[slot]))

    def checkpoint_items(self):
        """`Parameter`s of everything here, as logical tensors that do not show the number of devices."""
        items = []
        for name, variable in self.table.variables().items():
            items.append(
                Parameter(
                    path=f"table/{name}",
                    shape=(self.table.vocab_size, *variable.shape[1:]),
                    dtype=variable.dtype.as_numpy_dtype,
                    sharded=True,
                    trainable=name in self.table.parameters,
                    read=lambda start, stop, name=name: self.table.read_rows(name, start, stop),
                    write=lambda start, values, name=name: self.table.write_rows(name, start, values),
                    scatter=lambda ids, values, name=name: self.table.write_ids(name, ids, values),
                )
            )
        replicated = {f"body/{name}": variable.value for name, variable in self.encoder.variables.items()}
        for name, slots in self.body_slots.items():
            replicated.update({f"body_slots/{name}/{slot}": variable for slot, variable in slots.items()})
        trainable = {f"body/{name}" for name in self.encoder.trainable_variables}
        return items + [
            _replicated_parameter(path, variable, trainable=path in trainable)
            for path, variable in replicated.items()
        ]


def make_encoder(experiment, *, num_replicas, trainable=True):
    """The encoder of an experiment on so many devices, built for the steps of training or of evaluations alone.

    Either way it is probed by inputs of the shape on which perplexities are measured.
    """
    evaluated = -(-experiment.eval_batch_size // num_replicas), experiment.eval_window
    trained = -(-experiment.global_batch_size // num_replicas), experiment.window
    batch_size, window = trained if trainable else evaluated
    return Encoder(
        experiment.body(),
        embed_dim=experiment.embed_dim,
        batch_size=batch_size,
        window=window,
        probe_shape=evaluated,
        num_replicas=num_replicas,
    )


def _log_frequency(counts):
    """log((count + 1) / total): one more than seen, for those never seen."""
    counts = np.asarray(counts, np.float64) + 1
    return np.log(counts / counts.sum()).astype(np.float32)


def _replicated_parameter(path, variable, *, trainable):
    def scatter(rows, values):
        current = variable.numpy()
        current[rows] = values
        variable.assign(current)

    def write(start, values):
        if variable.shape.rank == 0:
            variable.assign(values)
        else:
            scatter(np.arange(start, start + len(values)), values)

    def read(start, stop):
        return variable.numpy() if variable.shape.rank == 0 else variable.numpy()[start:stop]

    return Parameter(
        path=path,
        shape=tuple(variable.shape),
        dtype=variable.dtype.as_numpy_dtype,
        sharded=False,
        trainable=trainable,
        read=read,
        write=write,
        scatter=scatter,
    )
