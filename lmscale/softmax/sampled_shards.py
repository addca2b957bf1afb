"""The sampled softmax with the candidates' rows where they are: hidden states travel to the shards instead.

Each shard multiplies the hidden states of all replicas with the rows that it holds of the candidates. With z_k the
logsumexp of its logits and z = logsumexp_k z_k over the shards, the softmax of all candidates is, on shard k,

    p_j = exp(z_k - z) softmax_k(x)_j

so that of the loss only z_k has to come back to the token, and of the gradients d_hidden. All else is as in
`sampled.py`; the label's own row and logit are where the token is. It moves less than the rows where the tokens of all
replicas are fewer than the candidates.

Source: An et al. 2022, "Killing Two Birds with One Stone: Efficient and Robust Training of Face Recognition CNNs by
Partial FC", arXiv:2203.15565 (hidden states to sampled rows of shards); Shoeybi et al. 2019, "Megatron-LM",
arXiv:1909.08053, section 3 (of a cross-entropy over shards, scalars travel, not logits).
"""

from typing import NamedTuple

import tensorflow as tf

from lmscale.distribution import collectives
from lmscale.distribution.all_to_all import exchange_equal_parts, reduce_scatter_sum
from lmscale.softmax.candidates import REMOVED_LOGIT, softmax_over_candidates, true_logits

# The candidates of a shard are padded to a multiple of one in so many of all of them: XLA compiles narrow products for
# each size, and should meet few.
_SIZES = 32


class ShardedCandidatesGradients(NamedTuple):
    """Loss and gradients of `sum(loss_weights * loss_nats)` over the tokens of all replicas."""

    loss_nats: tf.Tensor
    """[tokens] float32, unweighted, this replica's tokens."""
    d_hidden: tf.Tensor
    """[tokens, embed_dim] float32, this replica's tokens."""
    d_true_rows: tf.Tensor
    """[tokens, embed_dim] float32."""
    d_true_bias: tf.Tensor
    """[tokens] float32."""
    local_rows: tf.Tensor
    """[c] int32: rows of this shard, one for each candidate that it holds."""
    d_sampled_rows: tf.Tensor
    """[c, embed_dim] float32, complete."""
    d_sampled_bias: tf.Tensor
    """[c] float32, complete."""


def sharded_candidates_value_and_gradients(
    hidden,
    *,
    true_rows,
    true_bias,
    labels,
    candidates,
    true_log_expected_count,
    loss_weights,
    rows,
    bias,
    placement,
    remove_accidental_hits=True,
):
    """`sampled_softmax_value_and_gradients` over the tokens of all replicas, each shard with its own candidates.

    Args:
      hidden: [tokens, embed_dim] float32 or bfloat16, as many tokens on every replica. They travel, and products are
        taken, in this dtype; logits, softmax and loss are float32.
      true_rows: [tokens, embed_dim], the softmax row of each label, dtype of hidden.
      true_bias: [tokens] float32, or None.
      labels: [tokens] int.
      candidates: `Candidates`, the same on every replica.
      true_log_expected_count: [tokens] float32, of each label.
      loss_weights: [tokens] float32.
      rows: [allocated_rows, embed_dim], this replica's shard: its own component of a variable.
      bias: [allocated_rows], or None.
      placement: `Placement` of the rows.
      remove_accidental_hits: leave out, for each token, the sampled ids that are its label.

    Returns:
      `ShardedCandidatesGradients`.

    Communication, with N = num_replicas: all-gather of hidden [tokens, embed_dim], and of labels [tokens] to find hits;
      an all-to-all of N pieces [tokens] of logsumexps; all-gather of two float32 a token; an all-to-all of N pieces
      [tokens, embed_dim] of gradients, dtype of hidden. Nothing depends on the number of candidates or of rows.
    """
    num_sampled = candidates.sampled_ids.shape[0]
    sampled_ids, sampled_log_expected_count = _own_candidates(candidates, placement)
    count = tf.size(sampled_ids)
    local_rows = placement.local_row(sampled_ids)
    step = -(-num_sampled // _SIZES)
    padding = tf.maximum(-(-count // step), 1) * step - count
    padded_rows = tf.pad(local_rows, [[0, padding]], constant_values=placement.scratch_row)
    sampled_rows = tf.cast(tf.gather(rows, padded_rows), hidden.dtype)
    offset = -sampled_log_expected_count
    if bias is not None:
        offset += tf.gather(bias, local_rows)
    offset = tf.pad(offset, [[0, padding]], constant_values=REMOVED_LOGIT)

    all_hidden = collectives.all_gather(hidden)
    hits = None
    if remove_accidental_hits:
        # int64, because TensorFlow compares int32 on the host of a GPU. No label is the id of a padding candidate.
        all_labels = tf.cast(collectives.all_gather(tf.cast(labels, tf.int32)), tf.int64)
        padded_ids = tf.pad(tf.cast(sampled_ids, tf.int64), [[0, padding]], constant_values=-1)
        hits = all_labels[:, tf.newaxis] == padded_ids[tf.newaxis, :]
    probabilities, shard_logsumexp = softmax_over_candidates(all_hidden, sampled_rows, offset, hits)

    # Where the token is: its loss, and the share of the candidates in its gradient.
    logsumexp = tf.reduce_logsumexp(tf.stack(exchange_equal_parts(shard_logsumexp)), axis=0)
    true_offset = -tf.cast(true_log_expected_count, tf.float32)
    if true_bias is not None:
        true_offset += tf.cast(true_bias, tf.float32)
    margin = logsumexp - true_logits(hidden, true_rows, true_offset)
    share = tf.sigmoid(margin) * tf.cast(loss_weights, tf.float32)

    # And back to the shards.
    all_logsumexp, all_share = tf.unstack(
        collectives.all_gather(tf.stack([logsumexp, share], axis=1)), axis=1
    )
    of_shard = tf.exp(shard_logsumexp - all_logsumexp)
    weight = all_share * of_shard
    narrow = tf.cast(probabilities, hidden.dtype)
    weighted_hidden = tf.cast(weight[:, tf.newaxis] * tf.cast(all_hidden, tf.float32), hidden.dtype)
    d_sampled_rows = tf.matmul(narrow, weighted_hidden, transpose_a=True)
    d_sampled_bias = tf.linalg.matvec(probabilities, weight, transpose_a=True)
    mean_row = of_shard[:, tf.newaxis] * tf.cast(tf.matmul(narrow, sampled_rows), tf.float32)
    mean_row = reduce_scatter_sum(tf.cast(mean_row, hidden.dtype))
    d_hidden = share[:, tf.newaxis] * (mean_row - tf.cast(true_rows, tf.float32))
    return ShardedCandidatesGradients(
        loss_nats=tf.nn.softplus(margin),
        d_hidden=tf.cast(tf.cast(d_hidden, hidden.dtype), tf.float32),
        d_true_rows=-share[:, tf.newaxis] * tf.cast(hidden, tf.float32),
        d_true_bias=-share,
        local_rows=local_rows,
        d_sampled_rows=tf.cast(d_sampled_rows, tf.float32)[:count],
        d_sampled_bias=d_sampled_bias[:count],
    )


def _own_candidates(candidates, placement):
    """(ids [c] int32, log expected counts [c]) of the candidates whose rows this shard holds."""
    owners = placement.owner(candidates.sampled_ids)
    is_own = tf.equal(owners, tf.cast(collectives.replica_id(), tf.int32))
    return tuple(
        tf.boolean_mask(x, is_own) for x in (candidates.sampled_ids, candidates.sampled_log_expected_count)
    )
