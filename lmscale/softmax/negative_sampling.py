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
        noise_groups: parts into which both the examples and the sample fall, by their numbers: each example is compared
          with its part alone, at k / (S / noise_groups) a word. The work is that of a sample so many times smaller, and
          the batch still meets S noise words. An example is a chunk of words where states have neighbours, one state
          elsewhere. It must divide those of a replica and micro-batch, so that any number of devices has equal losses.
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
        num_examples = hidden.shape[0] if neighbours is None else neighbours.num_examples
        if num_examples % self.noise_groups:
            raise ValueError(
                "The examples of a replica must fall into as many equal parts as the noise. Received: "
                f"{num_examples} {'labels' if neighbours is None else 'examples'} of a replica and micro-batch, "
                f"noise_groups={self.noise_groups}. Choose a divisor, or other sizes of batches."
            )
        hidden, rows, noise = (
            tf.cast(x, self.compute_dtype) for x in (hidden, label_rows.embedding, candidate_rows.embedding)
        )
        of_noise = {"groups": self.noise_groups, "num_negatives": self.num_negatives}
        if neighbours is None:
            noise_loss, d_hidden, d_noise, d_noise_bias = compiled(_noise)(
                hidden[:, tf.newaxis], loss_weights[:, tf.newaxis], noise, candidate_rows.bias, **of_noise
            )
            label_weights = self.label_weight * loss_weights
            label_loss, d_of_labels, d_rows, d_bias = _one_label(hidden, rows, label_rows.bias, label_weights)
            loss = self.label_weight * label_loss + noise_loss[:, 0]
            d_hidden = d_of_labels + d_hidden[:, 0]
        else:
            split = neighbours.in_examples
            loss, d_hidden, d_rows, d_bias, d_noise, d_noise_bias = compiled(_neighbours_and_noise)(
                split(hidden),
                split(rows),
                None if label_rows.bias is None else split(label_rows.bias),
                noise,
                candidate_rows.bias,
                split(loss_weights),
                split(neighbours.before),
                split(neighbours.after),
                window=neighbours.window,
                label_weight=self.label_weight,
                **of_noise,
            )
            loss, d_hidden, d_rows = flat(loss), flat(d_hidden), flat(d_rows)
            d_bias = None if d_bias is None else flat(d_bias)
        return HeadGradients(
            loss=loss,
            d_hidden=d_hidden,
            d_label_rows=Rows(d_rows, d_bias),
            d_candidate_rows=Rows(d_noise, d_noise_bias),
        )


def _neighbours_and_noise(
    hidden, rows, bias, noise, noise_bias, loss_weights, before, after, *, window, label_weight, **of_noise
):
    """`_of_neighbours` and `_noise` in one: (loss, d_hidden, d_rows, d_bias, d_noise, d_noise_bias)."""
    loss, d_hidden, d_rows, d_bias = _of_neighbours(
        hidden, rows, bias, label_weight * loss_weights, before, after, window=window
    )
    noise_loss, d_of_noise, d_noise, d_noise_bias = _noise(
        hidden, loss_weights, noise, noise_bias, **of_noise
    )
    return label_weight * loss + noise_loss, d_hidden + d_of_noise, d_rows, d_bias, d_noise, d_noise_bias


def _noise(hidden, loss_weights, noise, bias, *, groups, num_negatives):
    """Loss of the noise at each state, and its gradients.

    Example number e is compared with every noise word whose number has the same remainder by `groups`.

    Args:
      hidden: [examples, chunk, dim].
      loss_weights: [examples, chunk].
      noise: [num_sampled, dim].
      bias: [num_sampled] or None.
      groups: int that divides examples and num_sampled.
      num_negatives: float.

    Returns:
      (loss [examples, chunk], d_hidden, d_noise, d_bias or None), gradients of the weighted sum of the losses.
    """
    chunk = hidden.shape[1]

    def by_group(x):
        """[n, ...] to [groups, n / groups, ...]."""
        return tf.stack(tf.unstack(tf.reshape(x, [-1, groups, *x.shape[1:]]), axis=1))

    def in_order(x):
        """The inverse of `by_group`."""
        x = tf.stack(tf.unstack(x), axis=1)
        return tf.reshape(x, [-1, *x.shape[2:]])

    def states(x):
        """[examples, chunk, ...] to [groups, examples / groups * chunk, ...]."""
        return tf.reshape(by_group(x), [groups, -1, *x.shape[2:]])

    def examples(x):
        """The inverse of `states`."""
        return in_order(tf.reshape(x, [groups, -1, chunk, *x.shape[2:]]))

    own_hidden, own_noise = states(hidden), by_group(noise)
    logits = float32_product(own_hidden, own_noise, transpose_b=True)
    if bias is not None:
        logits += by_group(bias)[:, tf.newaxis]
    loss, probabilities = softplus_and_sigmoid(logits)
    share = num_negatives / own_noise.shape[1]
    d_logits = (share * states(loss_weights))[..., tf.newaxis] * probabilities
    narrow = tf.cast(d_logits, hidden.dtype)
    d_hidden = tf.cast(tf.matmul(narrow, own_noise), tf.float32)
    d_noise = tf.cast(tf.matmul(narrow, own_hidden, transpose_a=True), tf.float32)
    return (
        examples(share * tf.reduce_sum(loss, axis=2)),
        examples(d_hidden),
        in_order(d_noise),
        None if bias is None else in_order(tf.reduce_sum(d_logits, axis=1)),
    )


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
