"""Exact softmax cross-entropy against the whole vocabulary, streamed over blocks of rows.

    loss[t] = logsumexp_v(logits[t, v]) - logits[t, label[t]],    logits[t, v] = hidden[t] . row[v] + bias[v]

Every shard streams its own rows, `block_rows` at a time, over the tokens of all replicas, so that the
[tokens, vocab_size] logits never exist: the largest temporary is [tokens, block_rows]. Gradients recompute the
logits of each block instead of keeping them.

The logits are read once: what is summed is exp(logit - reference), with the label's own logit for a reference,
which is known beforehand. Where that fails the sums of a shard are taken again, with a running maximum: where one
overflows (at 88 nats of loss), is NaN, or is below 1e-20, so that float32 may have lost some of its terms.

Everything here is local to a shard; `exact.py` and `top_k.py` combine the shards.
"""

import tensorflow as tf

from lmscale.softmax.products import float32_product
from lmscale.tables.int8_rows import gather_rows

_BLOCK_MIB = 64
_BLOCK_ROWS_MULTIPLE = 128

# Sums of exp(logit - reference) below it may have lost terms to float32's underflow, at 1e-38.
_SMALLEST_SUM = 1e-20


def default_block_rows(*, tokens, embed_dim, shard_rows):
    """Rows per block for which rows and logits take about 64 MiB in float32, evenly split over the shard.

    Args:
      tokens: int, tokens of all replicas together.
      embed_dim: int, values of a row.
      shard_rows: int, rows of a shard.

    Returns:
      int, a multiple of 128 unless the shard is smaller than that.
    """
    multiple = _BLOCK_ROWS_MULTIPLE
    largest = max(1, _BLOCK_MIB * 2**20 // (4 * (tokens + embed_dim)) // multiple) * multiple
    num_blocks = -(-shard_rows // largest)
    return min(shard_rows, -(-shard_rows // (num_blocks * multiple)) * multiple)


def shard_logsumexp(
    hidden,
    *,
    reference,
    rows,
    bias,
    num_valid_rows,
    block_rows=None,
    compute_dtype=tf.float32,
    fused=False,
):
    """Logarithm of the sum of exponentials of each token's logits over one shard's valid rows.

    Args:
      hidden: [tokens, embed_dim] float.
      reference: [tokens] float32, a guess at the result. Within 40 of it one pass over the logits is enough;
        further off a second one, with their maximum, may follow.
      rows: [shard_rows, embed_dim] float tensor or variable (a replica's own component), read block by block.
      bias: [shard_rows] float tensor or variable, or None.
      num_valid_rows: int or scalar int32; rows from there on are padding and never count, whatever they hold.
      block_rows: int, rows read at a time; None for `default_block_rows`.
      compute_dtype: dtype in which hidden and rows are multiplied; the logits are float32 in any case.
      fused: compile product and sums into one program, as those of the gradients are: it takes longer on CPUs, but
        leaves no memory behind that they could not use.

    Returns:
      [tokens] float32; -inf on a shard without a valid row.

    Raises:
      ValueError: if static shapes are unknown or disagree, or block_rows < 1.

    Communication: none.
    """
    block_rows = checked_block_rows(hidden, rows=rows, bias=bias, block_rows=block_rows)
    return _shard_logsumexp(
        tf.convert_to_tensor(hidden),
        tf.convert_to_tensor(reference, tf.float32),
        rows,
        bias,
        tf.convert_to_tensor(num_valid_rows, tf.int32),
        block_rows=block_rows,
        compute_dtype=tf.as_dtype(compute_dtype),
        fused=fused,
    )


def shard_gradients(
    hidden,
    *,
    rows,
    bias,
    num_valid_rows,
    local_labels,
    logsumexp,
    loss_weights,
    block_rows=None,
    compute_dtype=tf.float32,
):
    """One shard's part of the gradients of `sum(loss_weights * loss)`, the logits recomputed block by block.

    d_hidden = d . rows, d_rows = d^T . hidden, d_bias = sum_t d[t], where over the valid rows r
    d[t, r] = loss_weights[t] * (exp(logits[t, r] - logsumexp[t]) - [r == local_labels[t]]).

    Args:
      hidden: [tokens, embed_dim] float.
      rows, bias, num_valid_rows, block_rows, compute_dtype: as for `shard_logsumexp`.
      local_labels: [tokens] int32, the label's row on this shard; negative where another shard owns it.
      logsumexp: [tokens] float32, over the rows of all shards.
      loss_weights: [tokens] float32, the gradient arriving at each token's loss.

    Returns:
      d_hidden [tokens, embed_dim] float32, to be summed over shards.
      d_rows [shard_rows, embed_dim] float32; its blocks are joined at the end, when they are there twice.
      d_bias [shard_rows] float32, or None without a bias.

    Raises:
      ValueError: as for `shard_logsumexp`.

    Communication: none.
    """
    block_rows = checked_block_rows(hidden, rows=rows, bias=bias, block_rows=block_rows)
    return _shard_gradients(
        tf.convert_to_tensor(hidden),
        rows,
        bias,
        tf.convert_to_tensor(num_valid_rows, tf.int32),
        tf.cast(local_labels, tf.int32),
        tf.convert_to_tensor(logsumexp, tf.float32),
        tf.convert_to_tensor(loss_weights, tf.float32),
        block_rows=block_rows,
        compute_dtype=tf.as_dtype(compute_dtype),
    )


def check_tokens(hidden, **per_token):
    """Raises unless hidden is [tokens, embed_dim] and every other is [tokens], statically."""
    if hidden.shape.rank != 2 or not hidden.shape.is_fully_defined():
        raise ValueError(
            "hidden must have a static shape [tokens, embed_dim]. Received: "
            f"{hidden.shape}. Reshape it to two dimensions with fixed sizes."
        )
    for name, value in per_token.items():
        if value.shape.as_list() != [hidden.shape[0]]:
            raise ValueError(
                f"{name} must have one value per token, shape [{hidden.shape[0]}] as hidden {hidden.shape}. "
                f"Received: {value.shape}. Flatten batch and time alike in both."
            )


def checked_block_rows(hidden, *, rows, bias, block_rows):
    """Checks static shapes; returns block_rows, at most the rows of the shard."""
    check_tokens(hidden)
    tokens, embed_dim = hidden.shape
    if rows.shape.rank != 2 or not rows.shape[0] or rows.shape[1] != embed_dim:
        raise ValueError(
            f"rows must have a static shape [shard_rows, {embed_dim}] with hidden {hidden.shape}, and "
            f"shard_rows at least 1. Received: {rows.shape}. Project hidden to the size of a row."
        )
    shard_rows = rows.shape[0]
    if bias is not None and bias.shape.as_list() != [shard_rows]:
        raise ValueError(
            f"bias must have one value per row, shape [{shard_rows}]. Received: {bias.shape}. "
            "Give None for no bias."
        )
    if block_rows is None:
        return default_block_rows(tokens=tokens, embed_dim=embed_dim, shard_rows=shard_rows)
    if block_rows < 1:
        raise ValueError(f"block_rows must be at least 1. Received: {block_rows}. Give None for the default.")
    return min(int(block_rows), shard_rows)


def read_block(rows, bias, block, block_rows, num_valid_rows):
    """Rows [block_rows, embed_dim] and bias [block_rows] (or None) of a block, their ids, which are valid.

    A gather, not a slice: a slice reads the variable, and reading one that scatter updates have touched
    copies the whole of it.
    """
    local_ids = block * block_rows + tf.range(block_rows, dtype=tf.int32)
    valid = local_ids < tf.minimum(num_valid_rows, rows.shape[0])
    inside = tf.minimum(local_ids, rows.shape[0] - 1)
    return gather_rows(rows, inside), None if bias is None else tf.gather(bias, inside), local_ids, valid


def with_bias(logits, bias, valid):
    """Adds the bias [block_rows], or None, to the products; -inf where not valid, whatever they are there."""
    if bias is not None:
        logits += tf.cast(bias, tf.float32)
    # Also keeps XLA on CPUs (TensorFlow 2.21) from fusing a bfloat16 product with a reduction, where it aborts.
    return tf.where(valid, logits, -float("inf"))


def _sum_over_rows(x):
    """[tokens, block_rows] to [tokens], in two stages: one after the other, the terms' roundings would add up."""
    tokens, block_rows = x.shape
    grouped = block_rows // _BLOCK_ROWS_MULTIPLE * _BLOCK_ROWS_MULTIPLE
    of_groups = tf.reduce_sum(tf.reshape(x[:, :grouped], [tokens, -1, _BLOCK_ROWS_MULTIPLE]), axis=2)
    return tf.reduce_sum(of_groups, axis=1) + tf.reduce_sum(x[:, grouped:], axis=1)


@tf.function(jit_compile=True, autograph=False)
def _add_to_sum(total, logits, bias, valid, reference):
    """Adds a block's exp(logit - reference) to each token's total."""
    logits = with_bias(logits, bias, valid)
    return total + _sum_over_rows(tf.exp(logits - reference[:, tf.newaxis]))


@tf.function(jit_compile=True, autograph=False)
def add_to_logsumexp(running_max, running_sum, logits):
    """Adds a block's logits [tokens, block_rows] to each token's running (max, sum of exp(logit - max)), [tokens]."""
    new_max = tf.maximum(running_max, tf.reduce_max(logits, axis=1))
    # While no valid row has been seen the maximum is -inf, and -inf - -inf would be NaN.
    reference = tf.where(tf.math.is_inf(new_max) & (new_max < 0), 0.0, new_max)
    block_sum = _sum_over_rows(tf.exp(logits - reference[:, tf.newaxis]))
    return new_max, running_sum * tf.exp(running_max - reference) + block_sum


@tf.function(jit_compile=True, autograph=False)
def _add_block_to_logsumexp(running_max, running_sum, logits, bias, valid):
    return add_to_logsumexp(running_max, running_sum, with_bias(logits, bias, valid))


@tf.function(jit_compile=True, autograph=False)
def _gradients_of_block(
    hidden,
    hidden_transposed,
    rows,
    bias,
    valid,
    local_ids,
    local_labels,
    logsumexp,
    loss_weights,
    d_hidden,
):
    """Adds a block to d_hidden; returns it and (d_rows transposed, d_bias if there is a bias) of the block.

    hidden is transposed before and d_rows after, outside: in here XLA would turn them into a product with the
    transpose of d_logits, which takes it 1.6 (float32) to 3 (bfloat16) times as long on a CPU.
    """
    # Zero where not valid, so that garbage in padding cannot spread as NaN.
    rows = tf.cast(tf.where(valid[:, tf.newaxis], rows, tf.zeros([], rows.dtype)), hidden.dtype)
    logits = with_bias(float32_product(hidden, rows, transpose_b=True), bias, valid)
    is_label = (local_labels[:, tf.newaxis] == local_ids) & valid
    probabilities = tf.exp(logits - logsumexp[:, tf.newaxis])
    d_logits = loss_weights[:, tf.newaxis] * (probabilities - tf.cast(is_label, tf.float32))
    d_bias = () if bias is None else (tf.reduce_sum(d_logits, axis=0),)
    d_logits = tf.cast(d_logits, hidden.dtype)
    d_hidden += float32_product(d_logits, rows)
    d_rows_transposed = float32_product(hidden_transposed, d_logits)
    return d_hidden, (d_rows_transposed, *d_bias)


# The loops over a shard are not functions of TensorFlow's own: those are kept for as long as the process lives, and
# fail when a later table of the same shape meets the trace of a variable that is gone.
def _shard_logsumexp(hidden, reference, rows, bias, num_valid_rows, *, block_rows, compute_dtype, fused):
    hidden = tf.cast(hidden, compute_dtype)
    tokens, num_blocks = hidden.shape[0], -(-rows.shape[0] // block_rows)

    def over_blocks(add_block, *running):
        """running after add_block(*running, logits, bias, valid) of every block."""

        def multiply_and_add(rows, bias, valid, *running):
            logits = float32_product(hidden, tf.cast(rows, compute_dtype), transpose_b=True)
            return add_block(*running, logits, bias, valid)

        if fused:
            multiply_and_add = tf.function(multiply_and_add, jit_compile=True, autograph=False)

        def body(block, *running):
            block_of_rows, block_of_bias, _, valid = read_block(rows, bias, block, block_rows, num_valid_rows)
            return block + 1, *multiply_and_add(block_of_rows, block_of_bias, valid, *running)

        _, *running = tf.while_loop(
            lambda block, *_: block < num_blocks,
            body,
            [tf.constant(0), *running],
            parallel_iterations=1,  # One block of logits at a time.
        )
        return running

    def in_two_passes():
        running_max, running_sum = over_blocks(
            _add_block_to_logsumexp, tf.fill([tokens], -float("inf")), tf.zeros([tokens])
        )
        return running_max + tf.math.log(running_sum)

    (total,) = over_blocks(lambda *args: (_add_to_sum(*args, reference),), tf.zeros([tokens]))
    exact = tf.math.is_finite(total) & (total >= _SMALLEST_SUM)
    return tf.cond(tf.reduce_all(exact), lambda: reference + tf.math.log(total), in_two_passes)


def _shard_gradients(
    hidden, rows, bias, num_valid_rows, local_labels, logsumexp, loss_weights, *, block_rows, compute_dtype
):
    hidden = tf.cast(hidden, compute_dtype)
    hidden_transposed = tf.transpose(hidden)
    (tokens, embed_dim), shard_rows = hidden.shape, rows.shape[0]
    num_blocks = -(-shard_rows // block_rows)

    def body(block, d_hidden, d_shard):
        block_of_rows, block_of_bias, local_ids, valid = read_block(
            rows, bias, block, block_rows, num_valid_rows
        )
        d_hidden, (block_of_d_rows, *block_of_d_bias) = _gradients_of_block(
            hidden,
            hidden_transposed,
            block_of_rows,
            block_of_bias,
            valid,
            local_ids,
            local_labels,
            logsumexp,
            loss_weights,
            d_hidden,
        )
        d_block = [tf.transpose(block_of_d_rows), *block_of_d_bias]
        return block + 1, d_hidden, [d.write(block, new) for d, new in zip(d_shard, d_block, strict=True)]

    # Not one tensor: a scatter into it copies the whole of it for every block.
    shapes = [[block_rows, embed_dim]] + ([] if bias is None else [[block_rows]])
    buffers = [tf.TensorArray(tf.float32, size=num_blocks, element_shape=shape) for shape in shapes]
    _, d_hidden, d_shard = tf.while_loop(
        lambda block, *_: block < num_blocks,
        body,
        [tf.constant(0), tf.zeros([tokens, embed_dim]), buffers],
        parallel_iterations=1,
    )
    d_shard = [
        tf.reshape(d.stack(), [-1, *shape[1:]])[:shard_rows] for d, shape in zip(d_shard, shapes, strict=True)
    ]
    return d_hidden, d_shard[0], None if bias is None else d_shard[1]
