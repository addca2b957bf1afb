"""The sampled softmax: cross-entropy against a few sampled classes, with its gradients written out.

With x_j the logit of sampled class j less its log expected count (and removed hits at -1e30), x the same for
the label, and z = logsumexp_j x_j, the loss of a token is softplus(z - x). One softmax over the sampled
logits therefore gives everything: with p_j = softmax(x)_j,

    d loss / d x_j = sigmoid(z - x) p_j        d loss / d x = -sigmoid(z - x)

The only [tokens, num_sampled] arrays are the logits, the hits (one byte each) and p.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import numpy as np
import tensorflow as tf

from lmscale.softmax.bands import band_mask, flat
from lmscale.softmax.candidates import softmax_over_candidates, softplus_and_sigmoid, true_logits
from lmscale.softmax.head import EXCHANGES, Head, HeadGradients
from lmscale.softmax.products import compiled, float32_product, resolved_compute_dtype
from lmscale.softmax.sampled_shards import sharded_candidates_value_and_gradients
from lmscale.softmax.samplers import Sampler
from lmscale.tables.rows import Rows, ShardRows


@dataclasses.dataclass(frozen=True)
class SampledSoftmaxGradients:
    """Loss per token, and the gradients of sum(loss_weights * loss_nats).

    Attributes:
      loss_nats: [tokens] float32, not weighted.
      d_hidden: [tokens, embed_dim], dtype of the hidden given.
      d_true_rows: [tokens, embed_dim] float32.
      d_sampled_rows: [num_sampled, embed_dim] float32.
      d_true_bias: [tokens] float32.
      d_sampled_bias: [num_sampled] float32.
    """

    loss_nats: tf.Tensor
    d_hidden: tf.Tensor
    d_true_rows: tf.Tensor
    d_sampled_rows: tf.Tensor
    d_true_bias: tf.Tensor
    d_sampled_bias: tf.Tensor


def sampled_softmax_loss(
    hidden,
    *,
    true_rows,
    sampled_rows,
    labels,
    sampled_ids,
    true_log_expected_count,
    sampled_log_expected_count,
    true_bias=None,
    sampled_bias=None,
    remove_accidental_hits=True,
):
    """Cross-entropy of each token against its label and the sampled classes. Training only.

    Each logit has the log of its class's expected count among the sampled ids subtracted, which makes the
    expected sum over the sampled classes that of the full softmax. An id sampled twice counts twice, as the
    expected count supposes. Differentiable once, in hidden, rows and biases.

    Args:
      hidden: [tokens, embed_dim] float32, bfloat16 or float16. Products are taken in this dtype; logits,
        softmax and loss are float32 always.
      true_rows: [tokens, embed_dim], the softmax row of each label, dtype of hidden.
      sampled_rows: [num_sampled, embed_dim], the softmax row of each sampled id, dtype of hidden.
      labels: [tokens] int.
      sampled_ids: [num_sampled] int.
      true_log_expected_count: [tokens] float32, of each label; zeros for no correction.
      sampled_log_expected_count: [num_sampled] float32, of each sampled id.
      true_bias: [tokens] or None.
      sampled_bias: [num_sampled] or None.
      remove_accidental_hits: leave out, for each token, the sampled ids that are its label: every copy of an
        id drawn repeatedly, where tf.nn.sampled_softmax_loss leaves out one.

    Returns:
      [tokens] float32, nats, unreduced.

    Raises:
      ValueError: if dtypes or static shapes disagree.

    Communication: none.
    Source: Jean et al. 2015, arXiv:1412.2007, section 3; the loss of tf.nn.sampled_softmax_loss.
    """
    hidden, true_rows, sampled_rows, true_offset, sampled_offset, hits = _prepare(
        hidden,
        true_rows,
        sampled_rows,
        labels,
        sampled_ids,
        true_log_expected_count,
        sampled_log_expected_count,
        true_bias,
        sampled_bias,
        remove_accidental_hits,
    )

    @tf.custom_gradient
    def loss(hidden, true_rows, sampled_rows, true_offset, sampled_offset):
        loss_nats, probabilities, sampled_share = _forward(
            hidden, true_rows, sampled_rows, true_offset, sampled_offset, hits
        )

        def backward(loss_weights):
            d_hidden, d_true, d_sampled, d_true_offset, d_sampled_offset = _backward(
                hidden, true_rows, sampled_rows, probabilities, sampled_share, loss_weights
            )
            return (
                d_hidden,
                tf.cast(d_true, true_rows.dtype),
                tf.cast(d_sampled, sampled_rows.dtype),
                d_true_offset,
                d_sampled_offset,
            )

        return loss_nats, backward

    return loss(hidden, true_rows, sampled_rows, true_offset, sampled_offset)


def sampled_softmax_value_and_gradients(
    hidden,
    *,
    true_rows,
    sampled_rows,
    labels,
    sampled_ids,
    true_log_expected_count,
    sampled_log_expected_count,
    loss_weights,
    true_bias=None,
    sampled_bias=None,
    remove_accidental_hits=True,
):
    """`sampled_softmax_loss` with its gradients, computed directly: no gradient tape.

    Args:
      loss_weights: [tokens] float32: what each token's loss is multiplied by in the sum that is
        differentiated, for example 1 / (tokens of the global batch), or 0 for padding.
      The others: as in `sampled_softmax_loss`.

    Returns:
      SampledSoftmaxGradients. Gradients of absent biases are those a bias of zeros would have.

    Raises:
      ValueError: if dtypes or static shapes disagree.

    Communication: none.
    Source: as `sampled_softmax_loss`.
    """
    hidden, true_rows, sampled_rows, true_offset, sampled_offset, hits = _prepare(
        hidden,
        true_rows,
        sampled_rows,
        labels,
        sampled_ids,
        true_log_expected_count,
        sampled_log_expected_count,
        true_bias,
        sampled_bias,
        remove_accidental_hits,
    )
    loss_weights = tf.cast(loss_weights, tf.float32)
    _check_shape("loss_weights", loss_weights, hidden.shape[:1])
    loss_nats, probabilities, sampled_share = _forward(
        hidden, true_rows, sampled_rows, true_offset, sampled_offset, hits
    )
    d_hidden, d_true, d_sampled, d_true_offset, d_sampled_offset = _backward(
        hidden, true_rows, sampled_rows, probabilities, sampled_share, loss_weights
    )
    return SampledSoftmaxGradients(
        loss_nats=loss_nats,
        d_hidden=d_hidden,
        d_true_rows=d_true,
        d_sampled_rows=d_sampled,
        d_true_bias=d_true_offset,
        d_sampled_bias=d_sampled_offset,
    )


def _prepare(
    hidden,
    true_rows,
    sampled_rows,
    labels,
    sampled_ids,
    true_log_expected_count,
    sampled_log_expected_count,
    true_bias,
    sampled_bias,
    remove_accidental_hits,
):
    """Checks the arguments; returns hidden, rows, the offset of each logit, and the hits or None."""
    hidden, true_rows, sampled_rows = (tf.convert_to_tensor(x) for x in (hidden, true_rows, sampled_rows))
    if hidden.dtype not in (tf.float32, tf.bfloat16, tf.float16) or not (
        hidden.dtype == true_rows.dtype == sampled_rows.dtype
    ):
        raise ValueError(
            "hidden, true_rows and sampled_rows must share one dtype of float32, bfloat16 or float16. "
            f"Received: hidden={hidden.dtype.name}, true_rows={true_rows.dtype.name}, "
            f"sampled_rows={sampled_rows.dtype.name}. Cast them to the compute dtype."
        )
    if hidden.shape.rank != 2 or sampled_rows.shape.rank != 2:
        raise ValueError(
            "hidden must be [tokens, embed_dim] and sampled_rows [num_sampled, embed_dim]. Received: "
            f"hidden={hidden.shape}, sampled_rows={sampled_rows.shape}. Flatten batch and time into tokens."
        )
    tokens, embed_dim = hidden.shape
    num_sampled = sampled_rows.shape[0]
    # int64, because TensorFlow compares int32 on the host of a GPU.
    labels, sampled_ids = tf.cast(labels, tf.int64), tf.cast(sampled_ids, tf.int64)
    true_offset = -tf.cast(true_log_expected_count, tf.float32)
    sampled_offset = -tf.cast(sampled_log_expected_count, tf.float32)
    _check_shape("true_rows", true_rows, [tokens, embed_dim])
    _check_shape("sampled_rows", sampled_rows, [num_sampled, embed_dim])
    _check_shape("labels", labels, [tokens])
    _check_shape("sampled_ids", sampled_ids, [num_sampled])
    _check_shape("true_log_expected_count", true_offset, [tokens])
    _check_shape("sampled_log_expected_count", sampled_offset, [num_sampled])
    if true_bias is not None:
        true_bias = tf.cast(true_bias, tf.float32)
        _check_shape("true_bias", true_bias, [tokens])
        true_offset += true_bias
    if sampled_bias is not None:
        sampled_bias = tf.cast(sampled_bias, tf.float32)
        _check_shape("sampled_bias", sampled_bias, [num_sampled])
        sampled_offset += sampled_bias
    hits = labels[:, tf.newaxis] == sampled_ids[tf.newaxis, :] if remove_accidental_hits else None
    return hidden, true_rows, sampled_rows, true_offset, sampled_offset, hits


def _check_shape(name, tensor, expected):
    if not tensor.shape.is_compatible_with(expected):
        raise ValueError(
            f"{name} must have shape {tf.TensorShape(expected)}, as hidden and sampled_rows imply. Received: "
            f"{name}.shape={tensor.shape}. Pass one entry per token or per sampled id."
        )


def _forward(hidden, true_rows, sampled_rows, true_offset, sampled_offset, hits):
    """Returns loss [tokens], softmax over the sampled classes [tokens, num_sampled], their share [tokens]."""
    probabilities, logsumexp = softmax_over_candidates(hidden, sampled_rows, sampled_offset, hits)
    margin = logsumexp - true_logits(hidden, true_rows, true_offset)
    return tf.nn.softplus(margin), probabilities, tf.sigmoid(margin)


def _backward(hidden, true_rows, sampled_rows, probabilities, sampled_share, loss_weights):
    """Gradients of sum(loss_weights * loss): hidden, true rows, sampled rows, true offset, sampled offset."""
    share = sampled_share * loss_weights
    scaled_hidden = share[:, tf.newaxis] * tf.cast(hidden, tf.float32)
    # In a narrow dtype these two products sum in float32 and round once, at the end.
    narrow = tf.cast(probabilities, hidden.dtype)
    mean_row = tf.cast(tf.matmul(narrow, sampled_rows), tf.float32)
    d_hidden = share[:, tf.newaxis] * (mean_row - tf.cast(true_rows, tf.float32))
    d_sampled = tf.matmul(narrow, tf.cast(scaled_hidden, hidden.dtype), transpose_a=True)
    d_sampled_offset = tf.linalg.matvec(probabilities, share, transpose_a=True)
    return (
        tf.cast(d_hidden, hidden.dtype),
        -scaled_hidden,
        tf.cast(d_sampled, tf.float32),
        -share,
        d_sampled_offset,
    )


class SampledSoftmax(Head):
    """Cross-entropy against the label and a sample of the vocabulary, shared by the tokens of the global batch."""

    name = "sampled"
    communicates = False
    takes_neighbours = True

    def __init__(
        self,
        *,
        table: str,
        vocab_size: int,
        counts: np.ndarray | None,
        sampler: Callable[..., Sampler],
        remove_accidental_hits: bool = True,
        compute_dtype: Literal["float32", "bfloat16", "float16"] | None = None,
        exchange: Literal["auto", "rows", "hidden"] = "auto",
    ):
        """Args:
        table, vocab_size, counts: as for every head.
        sampler: function (vocab_size=, counts=) that returns a `Sampler`.
        remove_accidental_hits: take a sampled id out of the loss of the tokens whose label it is.
        compute_dtype: of the products, None for the experiment's; logits are float32.
        exchange: what goes from device to device, the candidates' "rows" or the "hidden" states; "auto" for the
          former unless the latter moves clearly less in the first batch. The losses are the same to rounding.
        """
        super().__init__(table=table, vocab_size=vocab_size, counts=counts)
        if exchange not in EXCHANGES:
            raise ValueError(f"exchange must be one of {EXCHANGES}. Received: exchange={exchange!r}.")
        self.exchange = exchange
        self.sampler = sampler(vocab_size=vocab_size, counts=counts)
        self.candidates_are_labels = self.sampler.samples_are_labels
        self.remove_accidental_hits = remove_accidental_hits
        self.compute_dtype = resolved_compute_dtype(compute_dtype)

    def num_candidates(self, *, global_tokens):
        return self.sampler.num_sampled or global_tokens

    def hidden_bytes_per_token(self, *, embed_dim, num_devices):
        # Hidden states there, their gradients back; a shard's logsumexp back, that of all and a weight there; labels.
        label = 4 if self.remove_accidental_hits else 0
        return 2 * embed_dim * self.compute_dtype.size + 3 * 4 + label

    def candidates(self, *, seed, labels):
        return self.sampler.candidates(seed=seed, labels=labels)

    def value_and_gradients(
        self, hidden, *, labels, loss_weights, label_rows, candidate_rows, candidates, table, neighbours=None
    ):
        hidden = tf.cast(hidden, self.compute_dtype)
        if neighbours is not None:
            return self._of_neighbours(
                hidden, labels, loss_weights, label_rows, candidate_rows, candidates, neighbours
            )
        of_tokens = {
            "true_rows": tf.cast(label_rows.embedding, self.compute_dtype),
            "true_bias": label_rows.bias,
            "labels": labels,
            "true_log_expected_count": self.sampler.log_expected_count(
                labels, num_draws=candidates.sampled_ids.shape[0]
            ),
            "loss_weights": loss_weights,
            "remove_accidental_hits": self.remove_accidental_hits,
        }
        if candidate_rows is None:
            return _sharded(hidden, of_tokens, candidates=candidates, table=table)
        result = sampled_softmax_value_and_gradients(
            hidden,
            sampled_rows=tf.cast(candidate_rows.embedding, self.compute_dtype),
            sampled_bias=candidate_rows.bias,
            sampled_ids=candidates.sampled_ids,
            sampled_log_expected_count=candidates.sampled_log_expected_count,
            **of_tokens,
        )
        return HeadGradients(
            loss=result.loss_nats,
            d_hidden=tf.cast(result.d_hidden, tf.float32),
            d_label_rows=Rows(result.d_true_rows, result.d_true_bias),
            d_candidate_rows=Rows(result.d_sampled_rows, result.d_sampled_bias),
        )

    def _of_neighbours(
        self, hidden, labels, loss_weights, label_rows, candidate_rows, candidates, neighbours
    ):
        """`HeadGradients` where each token has several labels: those that are sampled count as hits of all of them."""
        num_draws = candidates.sampled_ids.shape[0]
        offset = -self.sampler.log_expected_count(labels, num_draws=num_draws)
        sampled_offset = -candidates.sampled_log_expected_count
        has_bias = label_rows.bias is not None
        if has_bias:
            offset += label_rows.bias
            sampled_offset += candidate_rows.bias
        split = neighbours.in_examples
        found = compiled(_band_value_and_gradients)(
            split(hidden),
            split(tf.cast(label_rows.embedding, self.compute_dtype)),
            split(offset),
            tf.cast(candidate_rows.embedding, self.compute_dtype),
            sampled_offset,
            split(loss_weights),
            split(neighbours.before),
            split(neighbours.after),
            split(labels) if self.remove_accidental_hits else None,
            candidates.sampled_ids,
            window=neighbours.window,
        )
        loss, d_hidden, d_rows, d_offset, d_sampled, d_sampled_offset = found
        return HeadGradients(
            loss=flat(loss),
            d_hidden=flat(d_hidden),
            d_label_rows=Rows(flat(d_rows), flat(d_offset) if has_bias else None),
            d_candidate_rows=Rows(d_sampled, d_sampled_offset if has_bias else None),
        )


def _band_value_and_gradients(
    hidden,
    rows,
    offset,
    sampled_rows,
    sampled_offset,
    loss_weights,
    before,
    after,
    labels,
    sampled_ids,
    *,
    window,
):
    """Loss of tokens with several labels, the mean over them, and its gradients.

    Args:
      hidden: [examples, chunk, dim].
      rows, offset: [examples, chunk + 2 * window, dim] and without dim, of the labels.
      sampled_rows, sampled_offset: [num_sampled, dim] and [num_sampled].
      loss_weights, before, after: [examples, chunk].
      labels: [examples, chunk + 2 * window], to remove those that are sampled; None to leave them.
      sampled_ids: [num_sampled].
      window: int.

    Returns:
      Loss, and the gradients of hidden, rows, offset, sampled_rows and sampled_offset, float32.
    """
    num_examples, chunk, dim = hidden.shape
    mask = band_mask(before, after, window=window)
    hits = None
    if labels is not None:
        is_sampled = tf.cast(labels[..., tf.newaxis] == sampled_ids, tf.float32)
        hits = tf.reshape(tf.matmul(tf.cast(mask, tf.float32), is_sampled) > 0, [num_examples * chunk, -1])
    tokens = tf.reshape(hidden, [-1, dim])
    probabilities, logsumexp = softmax_over_candidates(tokens, sampled_rows, sampled_offset, hits)
    logits = float32_product(hidden, rows, transpose_b=True) + offset[:, tf.newaxis]
    margin = tf.reshape(logsumexp, [num_examples, chunk, 1]) - logits
    loss, sampled_share = softplus_and_sigmoid(margin)
    num_labels = tf.maximum(tf.cast(before + after, tf.float32), 1.0)
    loss = tf.reduce_sum(tf.where(mask, loss, 0.0), axis=2) / num_labels
    share = tf.where(mask, (loss_weights / num_labels)[..., tf.newaxis] * sampled_share, 0.0)
    narrow = tf.cast(share, hidden.dtype)
    share_of_token = tf.reshape(tf.reduce_sum(share, axis=2), [-1])
    narrow_probabilities = tf.cast(probabilities, hidden.dtype)
    mean_row = tf.cast(tf.matmul(narrow_probabilities, sampled_rows), tf.float32)
    d_hidden = tf.reshape(share_of_token[:, tf.newaxis] * mean_row, hidden.shape)
    d_hidden -= tf.cast(tf.matmul(narrow, rows), tf.float32)
    scaled = tf.cast(share_of_token[:, tf.newaxis] * tf.cast(tokens, tf.float32), hidden.dtype)
    return (
        loss,
        d_hidden,
        -tf.cast(tf.matmul(narrow, hidden, transpose_a=True), tf.float32),
        -tf.reduce_sum(share, axis=1),
        tf.cast(tf.matmul(narrow_probabilities, scaled, transpose_a=True), tf.float32),
        tf.linalg.matvec(probabilities, share_of_token, transpose_a=True),
    )


def _sharded(hidden, of_tokens, *, candidates, table):
    """`HeadGradients` where the candidates' rows stay on their shards."""
    result = sharded_candidates_value_and_gradients(
        hidden,
        candidates=candidates,
        rows=table.local_parameter("embedding"),
        bias=table.local_parameter("bias"),
        placement=table.placement,
        **of_tokens,
    )
    d_sampled = Rows(result.d_sampled_rows, result.d_sampled_bias)
    return HeadGradients(
        loss=result.loss_nats,
        d_hidden=result.d_hidden,
        d_label_rows=Rows(result.d_true_rows, result.d_true_bias),
        d_shard_rows=ShardRows(result.local_rows, d_sampled),
    )
