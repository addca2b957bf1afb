"""The k best rows of a sharded table for each token: exact, streamed over blocks of rows.

Each shard streams its own rows over the tokens of all replicas and keeps its k best; those of all shards are gathered
and merged. The [tokens, vocab_size] scores never exist. For use inside `strategy.run`; no tape may record it.
"""

from typing import NamedTuple

import tensorflow as tf

from lmscale.distribution import collectives
from lmscale.softmax.products import float32_product
from lmscale.softmax.streamed import add_to_logsumexp, check_tokens, checked_block_rows, read_block, with_bias


class TopK(NamedTuple):
    """The best rows of each of a replica's tokens, the best first."""

    scores: tf.Tensor
    """[n, k] float32: logits, or cosines. -inf behind the last row, where there are fewer than k."""
    ids: tf.Tensor
    """[n, k] int32; -1 where the score is -inf."""
    logsumexp: tf.Tensor | None
    """[n] float32, of the logits of all rows, excluded ones too; None unless asked for."""
    allowed_logsumexp: tf.Tensor | None
    """[n] float32, of logits / temperature of the rows that are not excluded; None unless asked for."""


def top_k(
    hidden,
    *,
    k,
    rows,
    bias,
    num_valid_rows,
    excluded=None,
    temperature=None,
    noise=None,
    with_logsumexp=False,
    with_allowed_logsumexp=False,
    cosine=False,
    block_rows=None,
    compute_dtype=tf.float32,
):
    """The rows with the highest hidden . row + bias, of a vocabulary sharded over the replicas.

    Row `id` is local row `id // num_replicas` of replica `id % num_replicas`. Of equal scores the smaller id comes
    first. A score that is NaN counts as -inf. Every replica brings the same number of tokens, and the same arguments
    else.

    Args:
      hidden: [n, embed_dim] float, this replica's tokens.
      k: int, 1 to any number; above the number of rows, the rest is filled up.
      rows: [shard_rows, embed_dim], this replica's shard: a tensor, or its own component of a variable.
      bias: [shard_rows], or None.
      num_valid_rows: int or scalar int32; rows of this shard from there on are padding.
      excluded: [n, m] int ids that must not be among the best, -1 for none, in any order, repeated or not; or None.
      temperature: float32 scalar above 0 by which logits are divided where noise is added, and for allowed_logsumexp.
      noise: function (ids [block_rows] int32) -> [tokens of all replicas, block_rows] float32, in the order of the
        replicas: the rows are then those with the highest score / temperature + noise, in that order, and scores
        remain without it. None for none.
      with_logsumexp, with_allowed_logsumexp: whether to take them, in the same pass.
      cosine: take the cosine of hidden and row for a score. A row of zeros has the cosine 0. Without bias.
      block_rows: int, rows read at a time; None for `default_block_rows` of the tokens of all replicas.
      compute_dtype: dtype in which hidden and rows are multiplied; scores are float32 in any case.

    Returns:
      `TopK`.

    Raises:
      ValueError: if static shapes are unknown or disagree; for k or block_rows below 1, a bias beside `cosine`, and a
        temperature that is needed and not given.

    Communication, with N = num_replicas and b = min(k, shard_rows): all-gather of hidden [n, embed_dim] and of excluded
      [n, m], to N * n; all-gathers of each shard's best scores and ids (and their ranks, with noise) [N * n, b], to
      [N * n, N * b]; and of each logsumexp [1, N * n], to [N, N * n].
    """
    check_tokens(hidden)
    if k < 1:
        raise ValueError(f"k must be at least 1. Received: k={k}. Ask for one row at least.")
    if cosine and bias is not None:
        raise ValueError("A cosine has no bias. Received: cosine=True and a bias. Pass bias=None.")
    if temperature is None and (noise is not None or with_allowed_logsumexp):
        raise ValueError(
            "noise and with_allowed_logsumexp need a temperature. Received: none. Pass 1.0 for that of the softmax."
        )
    if excluded is not None and (excluded.shape.rank != 2 or excluded.shape[0] != hidden.shape[0]):
        raise ValueError(
            f"excluded must be [{hidden.shape[0]}, m], ids for each token of hidden {hidden.shape}. Received: "
            f"{excluded.shape}."
        )
    n = hidden.shape[0]
    hidden = collectives.all_gather(_normalized(hidden) if cosine else hidden)
    block_rows = checked_block_rows(hidden, rows=rows, bias=bias, block_rows=block_rows)
    best = _best_of_shard(
        tf.cast(hidden, compute_dtype),
        k=min(k, rows.shape[0]),
        rows=rows,
        bias=bias,
        num_valid_rows=tf.convert_to_tensor(num_valid_rows, tf.int32),
        excluded=None if excluded is None else collectives.all_gather(tf.cast(excluded, tf.int32)),
        temperature=temperature,
        noise=noise,
        with_logsumexp=with_logsumexp,
        with_allowed_logsumexp=with_allowed_logsumexp,
        cosine=cosine,
        block_rows=block_rows,
    )
    first = collectives.replica_id() * n
    found = {
        name: collectives.block(collectives.all_gather(x, axis=1), first, n) for name, x in best.rows.items()
    }
    scores, ids = _merged(found, k=k)
    sums = [
        None
        if x is None
        else tf.reduce_logsumexp(
            collectives.block(collectives.all_gather(x[:, tf.newaxis], axis=1), first, n), axis=1
        )
        for x in (best.logsumexp, best.allowed_logsumexp)
    ]
    return TopK(scores, ids, *sums)


class _Best(NamedTuple):
    """Of one shard: {"ranks", "ids", perhaps "scores": [tokens, k]}, and logsumexps [tokens] or None."""

    rows: dict[str, tf.Tensor]
    logsumexp: tf.Tensor | None
    allowed_logsumexp: tf.Tensor | None


def _best_of_shard(
    hidden,
    *,
    k,
    rows,
    bias,
    num_valid_rows,
    excluded,
    temperature,
    noise,
    with_logsumexp,
    with_allowed_logsumexp,
    cosine,
    block_rows,
):
    num_shards, shard_id = collectives.num_replicas(), collectives.replica_id()
    tokens, num_blocks = hidden.shape[0], -(-rows.shape[0] // block_rows)
    if excluded is not None:
        excluded_rows = tf.where(
            (excluded >= 0) & (excluded % num_shards == shard_id), excluded // num_shards, -1
        )
    sums = {"all": with_logsumexp, "allowed": with_allowed_logsumexp}

    def body(block, best, running):
        block_of_rows, block_of_bias, local_ids, valid = read_block(
            rows, bias, block, block_rows, num_valid_rows
        )
        if cosine:
            block_of_rows = _normalized(block_of_rows)
        products = float32_product(hidden, tf.cast(block_of_rows, hidden.dtype), transpose_b=True)
        scores = with_bias(products, block_of_bias, valid)
        running = dict(running)
        if "all" in running:
            running["all"] = add_to_logsumexp(*running["all"], scores)
        scores = tf.where(tf.math.is_nan(scores), -float("inf"), scores)
        if excluded is not None:
            scores = _without(scores, excluded_rows - block * block_rows)
        if "allowed" in running:
            running["allowed"] = add_to_logsumexp(*running["allowed"], scores / temperature)
        ids = local_ids * num_shards + shard_id
        ranks = scores if noise is None else scores / temperature + noise(ids)
        ranks, places = tf.math.top_k(ranks, k=min(k, block_rows))
        of_block = {"ranks": ranks, "ids": tf.gather(ids, places)}
        if noise is not None:
            of_block["scores"] = tf.gather(scores, places, batch_dims=1)
        # Those of earlier blocks stand first: of equal ones, `top_k` takes them, and their ids are smaller.
        joined = {name: tf.concat([best[name], x], axis=1) for name, x in of_block.items()}
        ranks, places = tf.math.top_k(joined["ranks"], k=k)
        best = {name: tf.gather(x, places, batch_dims=1) for name, x in joined.items()} | {"ranks": ranks}
        return block + 1, best, running

    nothing = tf.fill([tokens, k], -float("inf"))
    best = {"ranks": nothing, "ids": tf.fill([tokens, k], -1)} | (
        {} if noise is None else {"scores": nothing}
    )
    running = {
        name: (tf.fill([tokens], -float("inf")), tf.zeros([tokens]))
        for name, is_asked in sums.items()
        if is_asked
    }
    _, best, running = tf.while_loop(
        lambda block, *_: block < num_blocks,
        body,
        [tf.constant(0), best, running],
        parallel_iterations=1,  # One block of scores at a time.
    )
    logsumexps = [
        running[name][0] + tf.math.log(running[name][1]) if name in running else None
        for name in ("all", "allowed")
    ]
    return _Best(best, *logsumexps)


def _without(scores, places):
    """-inf at these places [tokens, m] of scores [tokens, block_rows]; a place outside of it is none."""
    inside = (places >= 0) & (places < scores.shape[1])
    tokens = tf.broadcast_to(tf.range(scores.shape[0])[:, tf.newaxis], tf.shape(places))
    indices = tf.stack([tokens, tf.where(inside, places, 0)], axis=2)
    return tf.tensor_scatter_nd_min(scores, indices, tf.where(inside, -float("inf"), float("inf")))


def _merged(found, *, k):
    """(scores [n, k], ids [n, k]) of the best of all shards, {name: [n, candidates]}."""
    # The shards' ids alternate: in the order of ids, `top_k` takes the smaller one of equals.
    order = tf.argsort(found["ids"], axis=1, stable=True)
    found = {name: tf.gather(x, order, batch_dims=1) for name, x in found.items()}
    num_candidates = order.shape[1]
    _, places = tf.math.top_k(found["ranks"], k=min(k, num_candidates))
    missing = [[0, 0], [0, max(0, k - num_candidates)]]
    scores = tf.gather(found.get("scores", found["ranks"]), places, batch_dims=1)
    scores = tf.pad(scores, missing, constant_values=-float("inf"))
    ids = tf.pad(tf.gather(found["ids"], places, batch_dims=1), missing)
    return scores, tf.where(tf.math.is_inf(scores) & (scores < 0), -1, ids)


def _normalized(x):
    """Rows of length 1, in float32; rows of zeros stay as they are."""
    x = tf.cast(x, tf.float32)
    return tf.math.divide_no_nan(x, tf.norm(x, axis=1, keepdims=True))
