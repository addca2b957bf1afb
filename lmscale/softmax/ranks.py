"""The place of each label among all rows of a sharded table, streamed over blocks of rows."""

import tensorflow as tf

from lmscale.distribution import collectives
from lmscale.softmax.products import float32_product
from lmscale.softmax.streamed import check_tokens, checked_block_rows, read_block, with_bias


def label_ranks(
    hidden,
    *,
    labels,
    rows,
    bias,
    num_valid_rows,
    excluded=None,
    block_rows=None,
    compute_dtype=tf.float32,
):
    """How many rows come before each label by their logits, and one more; of equal logits, the smaller id is first.

    A logit that is NaN counts as -inf: it is above and below none, so that a model gone wrong would have perfect ranks.
    Logits are compared as one and the same product rounds them. It is taken twice: for the logits of labels and
    excluded rows, then to count. The [tokens, vocab_size] logits never exist.

    Args:
      hidden: [tokens, embed_dim] float, this replica's tokens; every replica brings as many.
      labels: [tokens] int32 ids.
      rows, bias, num_valid_rows, block_rows, compute_dtype: as for `full_softmax_loss`.
      excluded: [tokens, m] int32 ids that do not compete, in any order, repeated or not; negative for none. A label
        competes even where it is among them. None for none at all.

    Returns:
      [tokens] int32, 1 for the first place.

    Raises:
      ValueError: if static shapes are unknown or disagree, or block_rows < 1.

    Communication, with N = num_replicas: all-gather of hidden [tokens, embed_dim] and of labels and excluded
      [tokens, 1 + m]; all-reduces of their logits [N * tokens, 1 + m] and of counts [N * tokens].
    """
    check_tokens(hidden, labels=labels)
    tokens = hidden.shape[0]
    num_shards, shard_id = collectives.num_replicas(), collectives.replica_id()
    named = tf.cast(labels, tf.int32)[:, tf.newaxis]
    if excluded is not None:
        named = tf.concat([named, tf.cast(excluded, tf.int32)], axis=1)
    named = collectives.all_gather(named, axis=0)
    named = tf.ensure_shape(named, [tokens * num_shards, 1 if excluded is None else 1 + excluded.shape[1]])
    hidden = tf.cast(collectives.all_gather(hidden, axis=0), compute_dtype)
    hidden = tf.ensure_shape(hidden, [tokens * num_shards, hidden.shape[1]])
    block_rows = checked_block_rows(hidden, rows=rows, bias=bias, block_rows=block_rows)
    num_blocks = -(-rows.shape[0] // block_rows)
    is_here = (named >= 0) & (named % num_shards == shard_id)
    local = tf.where(is_here, named // num_shards, -1)

    def over_blocks(add_block, initial):
        def body(block, running):
            block_of_rows, block_of_bias, local_ids, valid = read_block(
                rows, bias, block, block_rows, num_valid_rows
            )
            logits = float32_product(hidden, tf.cast(block_of_rows, compute_dtype), transpose_b=True)
            logits = with_bias(logits, block_of_bias, valid)
            logits = tf.where(tf.math.is_nan(logits), -float("inf"), logits)
            return block + 1, add_block(running, logits, local_ids)

        _, running = tf.while_loop(
            lambda block, _: block < num_blocks, body, [tf.constant(0), initial], parallel_iterations=1
        )
        return running

    def add_named(running, logits, local_ids):
        position = local - local_ids[0]
        is_in_block = (local >= 0) & (position >= 0) & (position < block_rows)
        found = tf.gather(logits, tf.where(is_in_block, position, 0), axis=1, batch_dims=1)
        return tf.where(is_in_block, found, running)

    named_logits = collectives.all_reduce_sum(over_blocks(add_named, tf.zeros(named.shape)))
    true_logits, true_ids = named_logits[:, :1], named[:, :1]

    def is_before(logits, ids):
        return (logits > true_logits) | ((logits == true_logits) & (ids < true_ids))

    def add_before(running, logits, local_ids):
        before = is_before(logits, local_ids * num_shards + shard_id)
        return running + tf.reduce_sum(tf.cast(before, tf.int32), axis=1)

    before = collectives.all_reduce_sum(over_blocks(add_before, tf.zeros([named.shape[0]], tf.int32)))
    if excluded is not None:
        others = named[:, 1:]
        does_not_compete = is_before(named_logits[:, 1:], others) & (others >= 0) & _is_first(others)
        before -= tf.reduce_sum(tf.cast(does_not_compete, tf.int32), axis=1)
    start = shard_id * tokens
    return 1 + tf.ensure_shape(collectives.block(before, start, tokens), [tokens])


def _is_first(ids):
    """[n, m] bool: whether no earlier one of its row of [n, m] ids is equal."""
    order = tf.argsort(ids, axis=1, stable=True)
    in_order = tf.gather(ids, order, axis=1, batch_dims=1)
    is_new = tf.concat([tf.ones_like(in_order[:, :1], tf.bool), in_order[:, 1:] != in_order[:, :-1]], axis=1)
    return tf.gather(is_new, tf.argsort(order, axis=1), axis=1, batch_dims=1)
