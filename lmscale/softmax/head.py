"""What the trainer asks of a loss. To add one, add a file beside this one with a class that answers these two methods.

A loss is named in the gin file as `Experiment.loss`, unevaluated; the trainer calls it with the vocabulary's size and
counts.
"""

import abc
import dataclasses

import tensorflow as tf


@dataclasses.dataclass(frozen=True)
class HeadGradients:
    """A loss on one replica's tokens, and the gradients of its weighted sum over them.

    Attributes:
      loss: [tokens] float32 nats, unreduced.
      hidden: [tokens, embed_dim].
      true_rows, true_bias: [tokens, embed_dim], [tokens]: rows of the labels; None for zero.
      shared_rows, shared_bias: [num_shared, embed_dim], [num_shared]; None for zero.
      shard: {parameter: [allocated_rows, ...]} gradients of every row of this replica's shard, complete over all
        replicas; None for a loss that touches only the rows it pulled.
    """

    loss: tf.Tensor
    hidden: tf.Tensor
    true_rows: tf.Tensor | None = None
    true_bias: tf.Tensor | None = None
    shared_rows: tf.Tensor | None = None
    shared_bias: tf.Tensor | None = None
    shard: dict | None = None


class Head(abc.ABC):
    """Base of the losses that train the table.

    Attributes:
      name: word under which the loss is logged.
    """

    name: str

    def num_shared_rows(self, *, global_tokens):
        """How many candidates `candidates` returns for a batch of `global_tokens` labels."""
        del global_tokens
        return 0

    @abc.abstractmethod
    def candidates(self, *, seed, labels):
        """Chooses the rows that every token is compared with; the same on every replica.

        Args:
          seed: [2] int32 tensor, a fresh one each step.
          labels: [global tokens] int32, those of the global batch.

        Returns:
          An object with the field `sampled_ids` [num_sampled] int32, whatever else the loss wants back from it;
          None for a loss that needs no shared rows.
        """

    @abc.abstractmethod
    def value_and_gradients(self, hidden, *, labels, loss_weights, pulled, candidates, table):
        """Loss and gradients of sum(loss_weights * loss), without a tape through any collective.

        Args:
          hidden: [tokens, embed_dim].
          labels: [tokens] int32.
          loss_weights: [tokens] float32.
          pulled: `PulledRows` whose ids are the labels and whose shared ids are the candidates.
          candidates: as `candidates` returned it.
          table: the `ShardedTable`.

        Returns:
          `HeadGradients`.
        """
