"""The full softmax as a training loss: for small vocabularies, and to measure what sampling costs."""

from typing import Literal

import numpy as np

from lmscale.softmax.exact import full_softmax_value_and_gradients
from lmscale.softmax.head import Head, HeadGradients
from lmscale.softmax.products import resolved_compute_dtype


class FullSoftmax(Head):
    """Cross-entropy against every row, streamed; the backward pass recomputes the logits block by block."""

    name = "exact"
    needs_label_rows = False

    def __init__(
        self,
        *,
        table: str,
        vocab_size: int,
        counts: np.ndarray | None,
        block_rows: int | None = None,
        block_tokens: int | None = None,
        compute_dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    ):
        """Args:
        table, vocab_size, counts: as for every head.
        block_rows: rows of a shard whose logits exist at a time; None to choose by memory.
        block_tokens: tokens of the global batch that are compared with the rows at a time, where many have no label:
          those of weight 0 are put last, and blocks of nothing else left out. None for all tokens at once.
        compute_dtype: of the products, None for the experiment's; logits are float32.

        Raises:
          ValueError: if block_tokens < 1.
        """
        super().__init__(table=table, vocab_size=vocab_size, counts=counts)
        if block_tokens is not None and block_tokens < 1:
            raise ValueError(
                f"block_tokens must be at least 1. Received: block_tokens={block_tokens}. Leave it out for all tokens "
                "at once."
            )
        self.block_rows, self.block_tokens = block_rows, block_tokens
        self.compute_dtype = resolved_compute_dtype(compute_dtype)

    def hidden_bytes_per_token(self, *, embed_dim, num_devices):
        # All-gathers of hidden states, labels, weights and a logsumexp of each shard; all-reduces of d_hidden and of
        # true logits.
        return 4 * embed_dim + 2 * 4 + 4 * num_devices + 2 * (4 * embed_dim + 4)

    def value_and_gradients(
        self, hidden, *, labels, loss_weights, label_rows, candidate_rows, candidates, table
    ):
        del label_rows, candidate_rows, candidates
        result = full_softmax_value_and_gradients(
            hidden,
            labels=labels,
            loss_weights=loss_weights,
            rows=table.local_parameter("embedding"),
            bias=table.local_parameter("bias"),
            num_valid_rows=table.num_valid_rows,
            block_rows=self.block_rows,
            block_tokens=self.block_tokens,
            compute_dtype=self.compute_dtype,
        )
        d_shard = {"embedding": result.d_rows}
        if result.d_bias is not None:
            d_shard["bias"] = result.d_bias
        return HeadGradients(loss=result.loss_nats, d_hidden=result.d_hidden, d_shard=d_shard)
