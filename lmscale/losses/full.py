"""Full softmax: exact, and linear in vocab_size. For small vocabularies, and to measure what sampling costs."""

from typing import Literal

import numpy as np

from lmscale.losses.training_loss import LossGradients, TrainingLoss
from lmscale.vocabulary.full_softmax import full_softmax_value_and_gradients


class FullSoftmax(TrainingLoss):
    """Cross-entropy against every row, streamed; the backward pass recomputes the logits block by block."""

    name = "exact"

    def __init__(
        self,
        *,
        vocab_size: int,
        counts: np.ndarray | None,
        block_rows: int | None = None,
        compute_dtype: Literal["float32", "bfloat16"] = "float32",
    ):
        """Args:
        vocab_size, counts: as for every loss; not needed here.
        block_rows: rows of a shard whose logits exist at a time; None to choose by memory.
        compute_dtype: of the products; logits are float32.
        """
        del vocab_size, counts
        self.block_rows = block_rows
        self.compute_dtype = compute_dtype

    def candidates(self, *, seed, labels):
        del seed, labels
        return None

    def value_and_gradients(self, hidden, *, labels, loss_weights, pulled, candidates, table):
        del pulled, candidates
        result = full_softmax_value_and_gradients(
            hidden,
            labels=labels,
            loss_weights=loss_weights,
            rows=table.local_parameter("embedding"),
            bias=table.local_parameter("bias"),
            num_valid_rows=table.num_valid_rows,
            block_rows=self.block_rows,
            compute_dtype=self.compute_dtype,
        )
        shard = {"embedding": result.d_rows}
        if result.d_bias is not None:
            shard["bias"] = result.d_bias
        return LossGradients(loss=result.loss_nats, hidden=result.d_hidden, shard=shard)
