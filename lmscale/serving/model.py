"""A run's rows and layers without devices to share them: as plain variables, for what a SavedModel computes."""

import numpy as np
import tensorflow as tf

from lmscale.parameters.layers import Layers
from lmscale.softmax.exact import full_softmax_loss
from lmscale.softmax.top_k import top_k
from lmscale.tables.int8_rows import Int8Rows, gather_rows, quantize
from lmscale.tables.rows import Rows


class ServedModel(tf.Module):
    """Tables, in float32 or int8, and layers of a task, from a checkpoint.

    Attributes:
      task: the `Task`.
    """

    def __init__(self, task, saved, *, tables, int8):
        """Reads the parameters.

        Args:
          task: `Task`, made for one device and no training.
          saved: `SavedCheckpoint`.
          tables: names of the tables that are served.
          int8: whether their rows are held in int8, with a scale a row; biases stay float32.

        Raises:
          ValueError: if the checkpoint lacks a parameter, or has it in another shape.

        Memory: the tables that are served, and a block of rows.
        """
        super().__init__()
        self.task = task
        self._layers = Layers(task.layers, num_replicas=1)
        for path, variable in self._layers.variables.items():
            _check(saved, path, tuple(variable.shape))
            variable.assign(saved.read(path))
        # For TensorFlow, which finds what it saves by attributes.
        self.layer_variables = [variable.value for variable in self._layers.variables.values()]
        self.rows, self.biases = {}, {}
        for name in tables:
            config = task.tables[name]
            path = f"tables/{name}/embedding"
            _check(saved, path, (task.num_rows(name), config.embed_dim))
            if int8:
                self.rows[name] = _read_int8(saved, path)
            else:
                self.rows[name] = tf.Variable(saved.tensor(path), trainable=False, name=f"{name}_rows")
            if config.bias != "none":
                self.biases[name] = tf.Variable(
                    saved.tensor(f"tables/{name}/bias"), trainable=False, name=f"{name}_bias"
                )

    def embed(self, table, ids):
        """[*ids.shape, dim] float32: rows of a table."""
        return gather_rows(self.rows[table], ids)

    def hidden(self, features, *, batch_size):
        """{head: hidden states} of features of so many examples, each without what came before."""
        rows = {
            role: Rows(self.embed(lookup.table, lookup.ids))
            for role, lookup in self.task.lookups(features).items()
        }
        state = self.task.initial_state(batch_size)
        found, _ = self._layers.call(
            lambda: self.task.forward(rows, features, state, dropout=None),
            {role: r.embedding for role, r in rows.items()},
            training=False,
        )
        return found

    def best(self, hidden, *, head, k, excluded=None):
        """(ids [n, k], log-probabilities [n, k]) of the best rows of a head's table, as `top_k` orders them."""
        found = top_k(hidden, k=k, excluded=excluded, with_logsumexp=True, **self._of_head(head))
        return found.ids, found.scores - found.logsumexp[:, tf.newaxis]

    def losses(self, hidden, *, head, labels):
        """[n] float32 nats: the exact losses of hidden states."""
        return full_softmax_loss(hidden, labels=labels, **self._of_head(head))

    def _of_head(self, head):
        table = self.task.heads[head].table
        return {
            "rows": self.rows[table],
            "bias": self.biases.get(table),
            "num_valid_rows": self.task.num_rows(table),
        }


def _read_int8(saved, path):
    (rows, dim), _ = saved.tensors[path]
    values, scales = np.empty([rows, dim], np.int8), np.empty([rows], np.float32)
    for start, stop in saved.blocks(path):
        values[start:stop], scales[start:stop] = quantize(saved.read(path, start, stop))
    return Int8Rows(values, scales)


def _check(saved, path, shape):
    found = saved.tensors.get(path)
    if found is None or found[0] != shape:
        raise ValueError(
            f"The checkpoint {saved.directory} must hold {path} of {shape}, as the configuration says. Received: "
            f"{'none' if found is None else found[0]}. Pass the run's own data and settings."
        )
