"""Negative sampling: each label told from a few noise words, one yes or no each, with its gradients written out.

A pair of a hidden state h and a label with row v costs softplus(-h.v), and k noise words with rows u_j cost
softplus(h.u_j) each (Mikolov et al. 2013, arXiv:1310.4546, equation 4). The noise is a sample of S words that all pairs
of a batch share, each with the weight k / S: the same in expectation as k words drawn for each pair, and a matrix
product instead of many short ones.

At their optimum such logits overestimate how likely a label is, the more so the fewer negatives it has. Calibration
(Petrov and Macdonald 2023, arXiv:2308.07192) weighs the label's loss by a number beta <= 1 that undoes a part of it, or
all.
"""

from collections.abc import Callable
from typing import Literal

import numpy as np
import tensorflow as tf

from lmscale.softmax.bands import band_mask, flat
from lmscale.softmax.candidates import softplus_and_sigmoid, true_logits
from lmscale.softmax.head import Head, HeadGradients
from lmscale.softmax.products import compiled, float32_product, resolved_compute_dtype
from lmscale.softmax.samplers import Sampler
from lmscale.tables.rows import Rows


class NegativeSampling(Head):
    """Mikolov's negative sampling, its noise shared by the batch. Its logits are no log-probabilities."""

    name = "negative_sampling"
    communicates = False
    takes_neighbours = True

    def __init__(
        self,
        *,
        table: str,
        vocab_size: int,
        counts: np.ndarray | None,
        sampler: Callable[..., Sampler],
        num_negatives: float = 5,
        noise_groups: int = 1,
        calibration: float = 0.0,
        compute_dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    ):
        """Args:
        table, vocab_size, counts: as for every head.
        sampler: function (vocab_size=, counts=) that returns a `Sampler`; its num_sampled words are the S above.
        num_negatives: k, noise words that each pair is worth.
        noise_groups: parts into which hidden states fall by their ids, each of which is compared with a part of the
          sample alone, at k / (S / noise_groups) a word. The work is that of a sample so many times smaller; each noise
          word still gets the gradients of one of S.
        calibration: t of gSASRec's loss (gBCE), from 0 (the plain logistic loss) to 1 (fully calibrated). The label's
          loss is -log(sigmoid(h.v)**beta), with the share of the catalogue that a label is told from,
          alpha = num_negatives / (vocab_size - 1), and

            beta = alpha * (t * (1 - 1 / alpha) + 1 / alpha) = 1 - t * (1 - alpha)

          Of uniform noise (`UniformSampler`, or `UnigramSampler` with power 0), logits then end near
          log(beta / alpha * p), p the probability of the label: at t = 1 they are log-probabilities. (It is the odds
          p / (1 - p) in the paper, whose negatives leave out the label itself; here the noise may be the label.) Of
          noise with probabilities q they end near log(beta / (num_negatives * q) * p): beta shifts all logits alike,
          as it does of uniform noise, but no t makes them probabilities, and frequent labels stay lower by log q.

        compute_dtype: of the products, None for the experiment's; logits are float32.

        Raises:
          ValueError: if num_negatives is not above 0, or the sampler samples labels; if calibration is not from 0 to 1,
            or is above 0 with more negatives than there are other rows.

        Source: of calibration, Petrov and Macdonald 2023, arXiv:2308.07192, section 5.
        """
        super().__init__(table=table, vocab_size=vocab_size, counts=counts)
        if not num_negatives > 0:
            raise ValueError(
                f"num_negatives must be above 0. Received: num_negatives={num_negatives}. Usual are 5 to 20."
            )
        if not 0 <= calibration <= 1:
            raise ValueError(
                f"calibration must be from 0 (plain) to 1 (full). Received: calibration={calibration}."
            )
        if calibration and num_negatives > vocab_size - 1:
            raise ValueError(
                "With a calibration, a label must have at most as many negatives as there are other rows. Received: "
                f"num_negatives={num_negatives}, {vocab_size} rows. Lower num_negatives, or leave calibration at 0."
            )
        # beta.
        self.label_weight = (
            1.0 - calibration * (1.0 - num_negatives / (vocab_size - 1)) if calibration else 1.0
        )
        self.sampler = sampler(vocab_size=vocab_size, counts=counts)
        if self.sampler.samples_are_labels:
            raise ValueError(
                "Negative sampling needs noise that does not depend on the labels. Received: a sampler whose samples "
                "are the labels. Use UnigramSampler, with power 0.75."
            )
        num_sampled = self.num_candidates(global_tokens=0)
        if noise_groups < 1 or num_sampled % noise_groups:
            raise ValueError(
                "noise_groups must be at least 1 and divide the sample. Received: "
                f"noise_groups={noise_groups}, num_sampled={num_sampled}. Choose a divisor."
            )
        self.noise_groups = noise_groups
        self.num_negatives = float(num_negatives)
        self.compute_dtype = resolved_compute_dtype(compute_dtype)

    def num_candidates(self, *, global_tokens):
        return self.sampler.num_sampled

    def candidates(self, *, seed, labels):
        return self.sampler.candidates(seed=seed, labels=labels)

    def value_and_gradients(
        self, hidden, *, labels, loss_weights, label_rows, candidate_rows, candidates, table, neighbours=None
    ):
        hidden = tf.cast(hidden, self.compute_dtype)
        rows = tf.cast(label_rows.embedding, self.compute_dtype)
        noise = Rows(tf.cast(candidate_rows.embedding, self.compute_dtype), candidate_rows.bias)
        ids = labels if neighbours is None else neighbours.state_ids
        if neighbours is None or table.static_shapes:
            is_own = None
            if self.noise_groups > 1:
                groups = tf.range(noise.embedding.shape[0]) % self.noise_groups
                is_own = tf.equal(ids[:, tf.newaxis] % self.noise_groups, groups)
            noise_loss, d_hidden, d_noise = self._noise(hidden, loss_weights, noise, is_own)
        else:
            # The noise of a state depends on its id alone: it is computed once for all states that are equal.
            ids, places = tf.unique(ids)
            first = tf.math.unsorted_segment_min(tf.range(hidden.shape[0]), places, tf.size(ids))
            weights = tf.math.unsorted_segment_sum(loss_weights, places, tf.size(ids))
            noise_loss, d_distinct, d_noise = self._noise_by_group(
                tf.gather(hidden, first), weights, noise, ids % self.noise_groups
            )
            noise_loss = tf.gather(noise_loss, places)
            d_hidden = None
        label_weights = self.label_weight * loss_weights
        if neighbours is None:
            label_loss, d_of_labels, d_rows, d_bias = _one_label(hidden, rows, label_rows.bias, label_weights)
        else:
            split = neighbours.in_examples
            found = compiled(_of_neighbours)(
                split(hidden),
                split(rows),
                None if label_rows.bias is None else split(label_rows.bias),
                split(label_weights),
                split(neighbours.before),
                split(neighbours.after),
                window=neighbours.window,
            )
            label_loss, d_of_labels, d_rows, d_bias = (None if x is None else flat(x) for x in found)
        if d_hidden is None:
            d_hidden = tf.tensor_scatter_nd_add(d_of_labels, first[:, tf.newaxis], d_distinct)
        else:
            d_hidden += d_of_labels
        return HeadGradients(
            loss=self.label_weight * label_loss + noise_loss,
            d_hidden=d_hidden,
            d_label_rows=Rows(d_rows, d_bias),
            d_candidate_rows=d_noise,
        )

    def _noise_by_group(self, hidden, loss_weights, noise, group):
        """`_noise`, each state with the part of the noise that its group [n] has."""
        if self.noise_groups == 1:
            return self._noise(hidden, loss_weights, noise)
        number = self.noise_groups
        order = tf.dynamic_partition(tf.range(tf.size(group)), group, number)
        parts = zip(*(tf.dynamic_partition(x, group, number) for x in (hidden, loss_weights)), strict=True)
        losses, d_hidden, d_rows, d_biases = [], [], [], []
        for i, (states, weights) in enumerate(parts):
            bias = None if noise.bias is None else noise.bias[i::number]
            loss, d_states, d_noise = self._noise(states, weights, Rows(noise.embedding[i::number], bias))
            losses.append(loss)
            d_hidden.append(d_states)
            d_rows.append(d_noise.embedding)
            d_biases.append(d_noise.bias)

        def interleaved(of_groups):
            x = tf.stack(of_groups, axis=1)
            return tf.reshape(x, [-1, *x.shape[2:]])

        return (
            tf.dynamic_stitch(order, losses),
            tf.dynamic_stitch(order, d_hidden),
            Rows(interleaved(d_rows), None if noise.bias is None else interleaved(d_biases)),
        )

    def _noise(self, hidden, loss_weights, noise, is_own=None):
        """Loss of the noise at each of [n] states, gradient of the states, and `Rows` of those of the noise.

        `is_own` [n, noise] bool says which noise is for which state; None for all of what is given.
        """
        logits = float32_product(hidden, noise.embedding, transpose_b=True)
        if noise.bias is not None:
            logits = tf.nn.bias_add(logits, noise.bias)
        loss, probabilities = softplus_and_sigmoid(logits)
        number = noise.embedding.shape[0]
        if is_own is not None:
            loss, probabilities = (tf.where(is_own, x, 0.0) for x in (loss, probabilities))
            number //= self.noise_groups
        share = self.num_negatives / number
        d_logits = (share * loss_weights)[:, tf.newaxis] * probabilities
        narrow = tf.cast(d_logits, hidden.dtype)
        d_hidden = tf.cast(tf.matmul(narrow, noise.embedding), tf.float32)
        d_noise = tf.cast(tf.matmul(narrow, hidden, transpose_a=True), tf.float32)
        d_bias = None if noise.bias is None else tf.reduce_sum(d_logits, axis=0)
        return share * tf.reduce_sum(loss, axis=1), d_hidden, Rows(d_noise, d_bias)


def _one_label(hidden, rows, bias, loss_weights):
    """Loss [n] of each state's label, and gradients: of the states, of the rows and the biases of the labels."""
    loss, probabilities = softplus_and_sigmoid(-true_logits(hidden, rows, 0.0 if bias is None else bias))
    d_logits = -loss_weights * probabilities
    d_rows = d_logits[:, tf.newaxis] * tf.cast(hidden, tf.float32)
    d_hidden = d_logits[:, tf.newaxis] * tf.cast(rows, tf.float32)
    return loss, d_hidden, d_rows, None if bias is None else d_logits


def _of_neighbours(hidden, rows, bias, loss_weights, before, after, *, window):
    """The same of each state's neighbours: the loss is the mean over them, 0 without any.

    The states of an example are compared with all its labels, one small product an example, of which those stay that
    lie along the diagonal.

    Args:
      hidden: [examples, chunk, dim].
      rows: [examples, chunk + 2 * window, dim].
      bias: [examples, chunk + 2 * window] or None.
      loss_weights, before, after: [examples, chunk].
      window: int.
    """
    logits = float32_product(hidden, rows, transpose_b=True)
    if bias is not None:
        logits += bias[:, tf.newaxis]
    mask = band_mask(before, after, window=window)
    num_labels = tf.maximum(tf.cast(before + after, tf.float32), 1.0)
    loss, probabilities = softplus_and_sigmoid(-logits)
    loss = tf.reduce_sum(tf.where(mask, loss, 0.0), axis=2) / num_labels
    d_logits = tf.where(mask, -(loss_weights / num_labels)[..., tf.newaxis] * probabilities, 0.0)
    narrow = tf.cast(d_logits, hidden.dtype)
    d_hidden = tf.cast(tf.matmul(narrow, rows), tf.float32)
    d_rows = tf.cast(tf.matmul(narrow, hidden, transpose_a=True), tf.float32)
    return loss, d_hidden, d_rows, None if bias is None else tf.reduce_sum(d_logits, axis=1)
