"""Negative sampling: each label told from a few noise words, one yes or no each, with its gradients written out.

A pair of a hidden state h and a label with row v costs softplus(-h.v), and k noise words with rows u_j cost
softplus(h.u_j) each (Mikolov et al. 2013, arXiv:1310.4546, equation 4). The noise is a sample of S words that all pairs
of a batch share, each with the weight k / S: the same in expectation as k words drawn for each pair, and a matrix
product instead of many short ones.
"""

from collections.abc import Callable
from typing import Literal

import numpy as np
import tensorflow as tf

from lmscale.softmax.bands import Band
from lmscale.softmax.candidates import true_logits
from lmscale.softmax.head import Head, HeadGradients
from lmscale.softmax.products import float32_product, resolved_compute_dtype
from lmscale.softmax.samplers import Sampler
from lmscale.tables.rows import Rows


class NegativeSampling(Head):
    """Mikolov's negative sampling, its noise shared by the batch. Its logits are no log-probabilities."""

    name = "negative_sampling"
    communicates = False
    takes_reach = True

    def __init__(
        self,
        *,
        table: str,
        vocab_size: int,
        counts: np.ndarray | None,
        sampler: Callable[..., Sampler],
        num_negatives: float = 5,
        compute_dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    ):
        """Args:
        table, vocab_size, counts: as for every head.
        sampler: function (vocab_size=, counts=) that returns a `Sampler`; its num_sampled words are the S above.
        num_negatives: k, noise words that each pair is worth.
        compute_dtype: of the products, None for the experiment's; logits are float32.

        Raises:
          ValueError: if num_negatives is not above 0, or the sampler samples labels.
        """
        super().__init__(table=table, vocab_size=vocab_size, counts=counts)
        if not num_negatives > 0:
            raise ValueError(
                f"num_negatives must be above 0. Received: num_negatives={num_negatives}. Usual are 5 to 20."
            )
        self.sampler = sampler(vocab_size=vocab_size, counts=counts)
        if self.sampler.samples_are_labels:
            raise ValueError(
                "Negative sampling needs noise that does not depend on the labels. Received: a sampler whose samples "
                "are the labels. Use UnigramSampler, with power 0.75."
            )
        self.num_negatives = float(num_negatives)
        self.compute_dtype = resolved_compute_dtype(compute_dtype)

    def num_candidates(self, *, global_tokens):
        return self.sampler.num_sampled

    def candidates(self, *, seed, labels):
        return self.sampler.candidates(seed=seed, labels=labels)

    def value_and_gradients(
        self, hidden, *, labels, loss_weights, label_rows, candidate_rows, candidates, table, reach=None
    ):
        hidden = tf.cast(hidden, self.compute_dtype)
        rows = tf.cast(label_rows.embedding, self.compute_dtype)
        noise = tf.cast(candidate_rows.embedding, self.compute_dtype)
        share = loss_weights * (self.num_negatives / noise.shape[0])

        noise_logits = float32_product(hidden, noise, transpose_b=True)
        if candidate_rows.bias is not None:
            noise_logits = tf.nn.bias_add(noise_logits, candidate_rows.bias)
        noise_loss = tf.reduce_mean(tf.nn.softplus(noise_logits), axis=1) * self.num_negatives
        d_noise_logits = share[:, tf.newaxis] * tf.sigmoid(noise_logits)
        narrow = tf.cast(d_noise_logits, self.compute_dtype)
        d_hidden = tf.cast(tf.matmul(narrow, noise), tf.float32)
        d_noise = tf.cast(tf.matmul(narrow, hidden, transpose_a=True), tf.float32)

        positive = _one_label if reach is None else _neighbours
        label_loss, d_hidden_of_labels, d_rows, d_bias = positive(
            hidden, rows, label_rows.bias, loss_weights, reach
        )
        return HeadGradients(
            loss=label_loss + noise_loss,
            d_hidden=d_hidden + d_hidden_of_labels,
            d_label_rows=Rows(d_rows, None if label_rows.bias is None else d_bias),
            d_candidate_rows=Rows(
                d_noise, None if candidate_rows.bias is None else tf.reduce_sum(d_noise_logits, axis=0)
            ),
        )


def _one_label(hidden, rows, bias, loss_weights, reach):
    """Loss [n] of each state's label, and gradients: of the state, of the label's row and bias."""
    del reach
    logits = true_logits(hidden, rows, 0.0 if bias is None else bias)
    d_logits = -loss_weights * tf.sigmoid(-logits)
    d_hidden = d_logits[:, tf.newaxis] * tf.cast(rows, tf.float32)
    d_rows = d_logits[:, tf.newaxis] * tf.cast(hidden, tf.float32)
    return tf.nn.softplus(-logits), d_hidden, d_rows, d_logits


def _neighbours(hidden, rows, bias, loss_weights, reach):
    """The same of each state's neighbours: the loss is the mean over them, 0 without any."""
    band = Band.of(reach, num_labels=rows.shape[0])
    tiles, row_tiles = band.tiles_of_states(hidden), band.tiles_of_rows(rows)
    logits = float32_product(tiles, row_tiles, transpose_b=True)
    if bias is not None:
        logits += tf.squeeze(band.tiles_of_rows(bias[:, tf.newaxis]), 2)[:, tf.newaxis]
    mask = tf.reshape(band.mask, tf.shape(logits))
    num_labels = tf.maximum(tf.cast(reach.num_labels(), tf.float32), 1.0)
    loss = tf.reduce_sum(tf.where(mask, tf.nn.softplus(-logits), 0.0), axis=2, keepdims=True)
    share = band.tiles_of_states((loss_weights / num_labels)[:, tf.newaxis])
    d_logits = tf.where(mask, -share * tf.sigmoid(-logits), 0.0)
    narrow = tf.cast(d_logits, hidden.dtype)
    d_hidden = band.states_of_tiles(tf.cast(tf.matmul(narrow, row_tiles), tf.float32))
    d_rows = band.rows_of_tiles(tf.cast(tf.matmul(narrow, tiles, transpose_a=True), tf.float32))
    d_bias = None
    if bias is not None:
        d_bias = band.rows_of_tiles(tf.reduce_sum(d_logits, axis=1)[..., tf.newaxis])[:, 0]
    return band.states_of_tiles(loss)[:, 0] / num_labels, d_hidden, d_rows, d_bias
