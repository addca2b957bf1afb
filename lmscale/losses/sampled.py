"""Sampled softmax: a step costs the same for ten thousand rows and for ten million."""

from collections.abc import Callable
from typing import Literal

import numpy as np
import tensorflow as tf

from lmscale.losses.training_loss import LossGradients, TrainingLoss
from lmscale.vocabulary.sampled_softmax import sampled_softmax_value_and_gradients
from lmscale.vocabulary.samplers import Sampler


class SampledSoftmax(TrainingLoss):
    """Cross-entropy against the label and a sample of the vocabulary, shared by the tokens of the global batch."""

    name = "sampled"

    def __init__(
        self,
        *,
        vocab_size: int,
        counts: np.ndarray | None,
        sampler: Callable[..., Sampler],
        remove_accidental_hits: bool = True,
        compute_dtype: Literal["float32", "bfloat16"] = "float32",
    ):
        """Args:
        vocab_size: rows of the table.
        counts: [vocab_size] int, how often each id occurs in the training data.
        sampler: function (vocab_size=, counts=) that returns a `Sampler`.
        remove_accidental_hits: take a sampled id out of the loss of the tokens whose label it is.
        compute_dtype: of the products; logits are float32.
        """
        self.sampler = sampler(vocab_size=vocab_size, counts=counts)
        self.remove_accidental_hits = remove_accidental_hits
        self.compute_dtype = tf.as_dtype(compute_dtype)

    def num_shared_rows(self, *, global_tokens):
        return self.sampler.num_sampled or global_tokens

    def candidates(self, *, seed, labels):
        return self.sampler.candidates(seed=seed, labels=labels)

    def value_and_gradients(self, hidden, *, labels, loss_weights, pulled, candidates, table):
        del table
        result = sampled_softmax_value_and_gradients(
            tf.cast(hidden, self.compute_dtype),
            true_rows=tf.cast(pulled.embedding, self.compute_dtype),
            true_bias=pulled.bias,
            sampled_rows=tf.cast(pulled.shared_embedding, self.compute_dtype),
            sampled_bias=pulled.shared_bias,
            labels=labels,
            sampled_ids=candidates.sampled_ids,
            true_log_expected_count=self.sampler.log_expected_count(
                labels, num_draws=candidates.sampled_ids.shape[0]
            ),
            sampled_log_expected_count=candidates.sampled_log_expected_count,
            loss_weights=loss_weights,
            remove_accidental_hits=self.remove_accidental_hits,
        )
        return LossGradients(
            loss=result.loss_nats,
            hidden=tf.cast(result.hidden, tf.float32),
            true_rows=result.true_rows,
            true_bias=result.true_bias,
            shared_rows=result.sampled_rows,
            shared_bias=result.sampled_bias,
        )
