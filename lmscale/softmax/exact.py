"""The exact softmax over a sharded table, its loss and its gradients: linear in vocab_size.

Each shard streams its own rows over the tokens of all replicas (`streamed.py`); here their sums are combined, inside
`strategy.run` and outside any gradient tape. Evaluations take the loss alone. As a training loss it is for small
vocabularies, and to measure what sampling costs.
"""

from typing import NamedTuple

import tensorflow as tf

from lmscale.distribution import collectives
from lmscale.softmax.bands import band_mask
from lmscale.softmax.streamed import check_tokens, checked_block_rows, shard_gradients, shard_logsumexp
from lmscale.softmax.token_blocks import TokenBlocks
from lmscale.tables.int8_rows import gather_rows


class FullSoftmaxGradients(NamedTuple):
    """Loss and gradients of `sum(loss_weights * loss_nats)` over the tokens of all replicas."""

    loss_nats: tf.Tensor
    """[tokens] float32, unweighted, this replica's tokens."""
    d_hidden: tf.Tensor
    """[tokens, embed_dim] float32, this replica's tokens."""
    d_rows: tf.Tensor
    """[shard_rows, embed_dim] float32, this replica's shard; zero on padding rows."""
    d_bias: tf.Tensor | None
    """[shard_rows] float32, or None without a bias."""


def full_softmax_loss(
    hidden, *, labels, rows, bias, num_valid_rows, block_rows=None, compute_dtype=tf.float32
):
    """Exact cross-entropy of each token against the whole vocabulary, its rows sharded over the replicas.

    Row `id` is local row `id // num_replicas` of replica `id % num_replicas`. Every replica brings the same
    number of tokens. The logits are as exact as the device's float32 products: NVIDIA GPUs use TensorFloat-32
    unless `tf.config.experimental.enable_tensor_float_32_execution(False)` was called.

    Args:
      hidden: [tokens, embed_dim] float, this replica's tokens.
      labels: [tokens] integer ids. A label outside the vocabulary gives NaN.
      rows: [shard_rows, embed_dim], this replica's shard: a tensor, or its own component of a variable.
      bias: [shard_rows], or None.
      num_valid_rows: int or scalar int32; rows of this shard from there on are padding.
      block_rows: int, rows read at a time; None for `default_block_rows` of the tokens of all replicas.
      compute_dtype: dtype in which hidden and rows are multiplied; the logits are float32 in any case.

    Returns:
      [tokens] float32, nats, unreduced, of this replica's tokens.

    Raises:
      ValueError: if static shapes are unknown or disagree, or block_rows < 1.

    Communication, with N = num_replicas: all-gather of hidden [tokens, embed_dim] and of labels [tokens], to
      N * tokens; all-gather of the shards' logsumexp [1, N * tokens], to [N, N * tokens]; all-reduce of the
      true logits [N * tokens].
    """
    check_tokens(hidden, labels=labels)
    tokens = hidden.shape[0]
    shard = _Shard(rows, bias, num_valid_rows, block_rows, compute_dtype)
    loss, _, _ = _loss_of_all_tokens(_gather_tokens(hidden), _gather_tokens(labels), shard)
    return _own_tokens(loss, tokens)


def full_softmax_loss_of_neighbours(
    hidden,
    *,
    labels,
    label_rows,
    neighbours,
    rows,
    bias,
    num_valid_rows,
    block_rows=None,
    compute_dtype=tf.float32,
):
    """`full_softmax_loss` of tokens with several labels each: the mean over them, whose logsumexp is the same.

    Args:
      hidden: [tokens, embed_dim] float, this replica's tokens.
      labels: [n] integer ids of whole examples, as `Labels` has them with `neighbours`.
      label_rows: `Rows` of the labels, [n, embed_dim] and [n].
      neighbours: `Neighbours`.
      The others: as for `full_softmax_loss`.

    Returns:
      [tokens] float32, nats; of a token without labels, its logsumexp.

    Communication: that of `full_softmax_loss`.
    """
    window, split = neighbours.window, neighbours.in_examples
    places = split(labels)
    # The logsumexp, by way of the loss of any one label: that at the token's own place.
    own = slice(window, places.shape[1] - window)
    loss = full_softmax_loss(
        hidden,
        labels=tf.reshape(places[:, own], [-1]),
        rows=rows,
        bias=bias,
        num_valid_rows=num_valid_rows,
        block_rows=block_rows,
        compute_dtype=compute_dtype,
    )
    states = split(_rounded(hidden, compute_dtype))
    its_rows = split(_rounded(label_rows.embedding, compute_dtype))
    logits = tf.matmul(states, its_rows, transpose_b=True)
    own_logits = tf.reduce_sum(states * its_rows[:, own], axis=2)
    if label_rows.bias is not None:
        its_bias = split(tf.cast(label_rows.bias, tf.float32))
        logits += its_bias[:, tf.newaxis]
        own_logits += its_bias[:, own]
    mask = band_mask(split(neighbours.before), split(neighbours.after), window=window)
    mean_logits = tf.reduce_sum(tf.where(mask, logits, 0.0), axis=2)
    mean_logits /= tf.maximum(split(neighbours.num_labels()), 1.0)
    return loss + tf.reshape(own_logits - mean_logits, [-1])


def full_softmax_value_and_gradients(
    hidden,
    *,
    labels,
    loss_weights,
    rows,
    bias,
    num_valid_rows,
    block_rows=None,
    block_tokens=None,
    compute_dtype=tf.float32,
):
    """`full_softmax_loss` with the gradients of its weighted sum over the tokens of all replicas.

    The losses are those of `full_softmax_loss` up to the rounding of float32 products, which another program takes.
    No tape is needed, and none may record this. Costs four products of tokens and rows (one for the loss, one
    to recompute the logits, two for the gradients) and one [shard_rows, embed_dim] buffer.

    Args:
      hidden, labels, rows, bias, num_valid_rows, block_rows, compute_dtype: as for `full_softmax_loss`.
      loss_weights: [tokens] float, weight of each token's loss in the sum, e.g. 1 / tokens of all replicas.
      block_tokens: int, tokens of all replicas that are compared with the rows at a time, those of weight 0 last: a
        block of nothing else is left out, and the loss of its tokens is 0. None for all tokens at once.

    Returns:
      FullSoftmaxGradients. d_rows and d_bias are complete: they need no reduction over replicas.

    Raises:
      ValueError: as for `full_softmax_loss`.

    Communication, with N = num_replicas: that of `full_softmax_loss`; all-gather of loss_weights [tokens] to
      N * tokens; all-reduce of d_hidden [N * tokens, embed_dim].
    """
    check_tokens(hidden, labels=labels, loss_weights=loss_weights)
    tokens = hidden.shape[0]
    shard = _Shard(rows, bias, num_valid_rows, block_rows, compute_dtype)
    all_hidden, all_labels = _gather_tokens(hidden), _gather_tokens(labels)
    all_weights = _gather_tokens(tf.cast(loss_weights, tf.float32))
    blocks = None if block_tokens is None else TokenBlocks(all_weights, block_tokens=block_tokens)
    loss, logsumexp, local_labels = _loss_of_all_tokens(
        all_hidden, all_labels, shard, blocks=blocks, fused=True
    )

    def gradients(hidden, local_labels, logsumexp, loss_weights):
        d_hidden, *d_shard = shard_gradients(
            hidden,
            local_labels=local_labels,
            logsumexp=logsumexp,
            loss_weights=loss_weights,
            **shard._asdict(),
        )
        return d_hidden, [d for d in d_shard if d is not None]

    if blocks is None:
        d_hidden, d_shard = gradients(all_hidden, local_labels, logsumexp, all_weights)
    else:
        shapes = [rows.shape] if bias is None else [rows.shape, bias.shape]
        d_hidden, d_shard = blocks.map_and_sum(
            gradients,
            all_hidden,
            local_labels,
            logsumexp,
            weights=all_weights,
            dim=hidden.shape[1],
            sums=[tf.zeros(shape) for shape in shapes],
        )
        loss = tf.where(blocks.is_computed, loss, 0.0)
    d_rows, d_bias = d_shard if len(d_shard) == 2 else (*d_shard, None)
    d_hidden = collectives.all_reduce_sum(d_hidden)
    return FullSoftmaxGradients(_own_tokens(loss, tokens), _own_tokens(d_hidden, tokens), d_rows, d_bias)


class _Shard(NamedTuple):
    """The arguments that describe a shard and how to read it."""

    rows: tf.Tensor | tf.Variable
    bias: tf.Tensor | tf.Variable | None
    num_valid_rows: int | tf.Tensor
    block_rows: int | None
    compute_dtype: tf.DType


def _loss_of_all_tokens(hidden, labels, shard, *, blocks=None, fused=False):
    """Combines the shards: loss, logsumexp and local_labels, each [tokens], of the tokens of all replicas."""
    checked_block_rows(hidden, rows=shard.rows, bias=shard.bias, block_rows=shard.block_rows)
    num_shards, shard_id = collectives.num_replicas(), collectives.replica_id()
    local_labels = tf.where(labels % num_shards == shard_id, labels // num_shards, -1)
    local_labels = tf.cast(local_labels, tf.int32)
    in_vocabulary = (labels >= 0) & (local_labels < shard.num_valid_rows)
    row_ids = tf.where((local_labels >= 0) & in_vocabulary, local_labels, 0)
    true_rows = _rounded(gather_rows(shard.rows, row_ids), shard.compute_dtype)
    true_logits = tf.reduce_sum(_rounded(hidden, shard.compute_dtype) * true_rows, axis=1)
    if shard.bias is not None:
        true_logits += tf.cast(tf.gather(shard.bias, row_ids), tf.float32)
    true_logits = tf.where(local_labels >= 0, true_logits, 0.0)
    true_logits = collectives.all_reduce_sum(tf.where(in_vocabulary, true_logits, float("nan")))
    reference = tf.where(tf.math.is_finite(true_logits), true_logits, 0.0)

    def logsumexp_of(hidden, reference):
        return shard_logsumexp(hidden, reference=reference, fused=fused, **shard._asdict())

    partial = (
        logsumexp_of(hidden, reference) if blocks is None else blocks.map(logsumexp_of, hidden, reference)
    )
    logsumexp = tf.reduce_logsumexp(collectives.all_gather(partial[tf.newaxis], axis=0), axis=0)
    return logsumexp - true_logits, logsumexp, local_labels


def _rounded(x, dtype):
    """float32 values of x rounded to dtype, so that a float32 dot product agrees with the streamed logits."""
    return tf.cast(tf.cast(x, dtype), tf.float32)


def _gather_tokens(x):
    """Concatenates x over replicas along tokens, keeping the static shape that some strategies lose."""
    gathered = collectives.all_gather(x, axis=0)
    return tf.ensure_shape(gathered, [x.shape[0] * collectives.num_replicas(), *x.shape[1:]])


def _own_tokens(x, tokens):
    """This replica's slice of values of the tokens of all replicas."""
    if collectives.num_replicas() == 1:
        return x
    start = collectives.replica_id() * tokens
    return tf.ensure_shape(collectives.block(x, start, tokens), [tokens, *x.shape[1:]])
