"""What a step asks of a head: a softmax over a table. To add one, add a file beside this one.

A head is named in the gin file by the task that has it (`NextToken.head`), unevaluated; the task calls it with its
table's name, size and counts.
"""

import abc
import dataclasses
from typing import Literal

import numpy as np
import tensorflow as tf

from lmscale.softmax.exact import full_softmax_loss, full_softmax_loss_of_neighbours
from lmscale.tables.rows import Rows, ShardRows

EXCHANGES = ("auto", "rows", "hidden")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadGradients:
    """A head's loss on one replica's tokens, and the gradients of its weighted sum over them.

    Attributes:
      loss: [tokens] float32 nats, unreduced and unweighted.
      d_hidden: [tokens, dim].
      d_label_rows: `Rows` of [tokens, dim] and [tokens]; None for zero.
      d_candidate_rows: `Rows` of [num_candidates, dim] and [num_candidates]; None for zero.
      d_shard: {parameter: [allocated_rows, ...]} gradients of every row of this replica's shard, complete over all
        replicas; None for a head that touches only the rows it was given.
      d_shard_rows: `ShardRows` of this replica's shard: of its rows among the candidates, where hidden states travel;
        None where rows do.
    """

    loss: tf.Tensor
    d_hidden: tf.Tensor
    d_label_rows: Rows | None = None
    d_candidate_rows: Rows | None = None
    d_shard: dict | None = None
    d_shard_rows: ShardRows | None = None


def candidates_seed(seed, *, head, step):
    """[2] int32: what the candidates of a step depend on; int seed, number of the head in its task, int32 step."""
    return tf.stack([(seed + head) % 2**31, step])


class Head(abc.ABC):
    """Base of the heads.

    Attributes:
      name: word under which its training loss is logged.
      needs_label_rows: whether `value_and_gradients` is given the rows of the labels.
      candidates_are_labels: whether the candidates are the labels of the global batch, in their order: then the rows of
        a replica's labels are taken from those of the candidates, and none is asked for twice.
      communicates: whether `value_and_gradients` uses collectives, for which no loop of TensorFlow has a place, even
        where it is given the rows of the candidates.
      takes_neighbours: whether `value_and_gradients` has the argument `neighbours`: a state may have several labels.
      exchange: what brings tokens and candidates together. "rows": the rows of the candidates go to every replica.
        "hidden": the hidden states of every replica go to the shards, each of which compares them with the candidates
        that it holds. "auto": whichever suits a batch, see `StepTraffic.chosen`.
      table: name of the table that holds the softmax rows.
    """

    name: str
    needs_label_rows = True
    candidates_are_labels = False
    communicates = True
    takes_neighbours = False
    exchange: Literal["auto", "rows", "hidden"] = "rows"

    def __init__(self, *, table: str, vocab_size: int, counts: np.ndarray | None):
        """Args:
        table: name of the table.
        vocab_size: its rows.
        counts: [vocab_size] int, how often each id occurs in the training data; None where only evaluations follow.
        """
        del vocab_size, counts
        self.table = table

    def num_candidates(self, *, global_tokens):
        """How many candidates `candidates` returns for a batch of `global_tokens` labels."""
        del global_tokens
        return 0

    def hidden_bytes_per_token(self, *, embed_dim, num_devices):
        """Bytes that a device receives for each token of each other device where hidden states travel, and their own.

        Args:
          embed_dim: int, values of a row.
          num_devices: int.

        Returns:
          Number; times (num_devices - 1) * tokens of a device it is what `value_and_gradients` moves.
        """
        del embed_dim, num_devices
        return 0

    def candidates(self, *, seed, labels):
        """Chooses the rows that every token is compared with; the same on every replica.

        Args:
          seed: [2] int32 tensor, a fresh one each step.
          labels: [global tokens] int32, those of the global batch, where `candidates_are_labels`; else None.

        Returns:
          An object with the field `sampled_ids` [num_candidates] int32, whatever else the head wants back from it;
          None for a head that needs no candidates.
        """
        del seed, labels

    def exact_loss(self, hidden, *, labels, table, compute_dtype, neighbours=None, label_rows=None):
        """What an evaluation measures of each token: the loss of the full softmax, of several labels their mean.

        Args:
          hidden, labels, table: as of `value_and_gradients`.
          compute_dtype: of the products.
          neighbours, label_rows: likewise, where hidden states have several labels; else None.

        Returns:
          [tokens] float32 nats.

        Communication: that of `full_softmax_loss`.
        """
        shard = {
            "labels": labels,
            "rows": table.local_parameter("embedding"),
            "bias": table.local_parameter("bias"),
            "num_valid_rows": table.num_valid_rows,
            "compute_dtype": compute_dtype,
        }
        if neighbours is None:
            return full_softmax_loss(hidden, **shard)
        return full_softmax_loss_of_neighbours(hidden, neighbours=neighbours, label_rows=label_rows, **shard)

    @abc.abstractmethod
    def value_and_gradients(
        self, hidden, *, labels, loss_weights, label_rows, candidate_rows, candidates, table
    ):
        """Loss and gradients of sum(loss_weights * loss), without a tape through any collective.

        Args:
          hidden: [tokens, dim] float32.
          labels: [tokens] int32.
          loss_weights: [tokens] float32; 0 for padding.
          label_rows: `Rows` of the labels, [tokens, dim] and [tokens]; None if not needed.
          candidate_rows: `Rows` of the candidates, [num_candidates, dim] and [num_candidates]; None without candidates,
            or where they stay on their shards and the hidden states are to travel.
          candidates: as `candidates` returned it.
          table: the `ShardedTable`.

        A head that takes them is also given `neighbours`, `bands.Neighbours`, where hidden states have several labels:
        `labels` and `label_rows` are those of whole examples, and a state's loss is the mean over its labels.

        Returns:
          `HeadGradients`.
        """
