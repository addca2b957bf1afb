"""Transformer decoder: pre-norm blocks of causal attention and feed-forward layers, with rotary positions."""

from typing import Literal

import keras
import tensorflow as tf

from lmscale.bodies.attention import attention, causal_attention, rotary
from lmscale.bodies.body import Body, write_at
from lmscale.bodies.dropout import check_rate
from lmscale.keras_settings import POLICIES, check_compute_dtype


class TransformerBody(Body):
    """Blocks over a residual stream as wide as the inputs; each window is a text of its own."""

    def __init__(
        self,
        *,
        num_layers,
        hidden_dim,
        num_heads,
        feed_forward_dim,
        dropout,
        embedding_dropout,
        output_dropout,
        compute_dtype,
    ):
        policy = None if compute_dtype is None else POLICIES[compute_dtype]
        # Each block adds to the stream twice: its variance stays about that of the inputs.
        towards_stream = keras.initializers.VarianceScaling(
            1 / (2 * num_layers), mode="fan_avg", distribution="uniform"
        )

        def dense(units, **settings):
            return keras.layers.Dense(units, dtype=policy, **settings)

        def normalization():
            return keras.layers.LayerNormalization(epsilon=1e-5, dtype=policy)

        layers = {}
        for i in range(num_layers):
            layers |= {
                f"block_{i}/attention_normalization": normalization(),
                f"block_{i}/queries_keys_values": dense(3 * hidden_dim, use_bias=False),
                f"block_{i}/attention_output": dense(
                    hidden_dim, use_bias=False, kernel_initializer=towards_stream
                ),
                f"block_{i}/feed_forward_normalization": normalization(),
                f"block_{i}/feed_forward": dense(feed_forward_dim, activation="gelu"),
                f"block_{i}/feed_forward_output": dense(hidden_dim, kernel_initializer=towards_stream),
            }
        layers["normalization"] = normalization()
        super().__init__(layers)
        self._num_layers = num_layers
        self._hidden_dim = hidden_dim
        self._num_heads = num_heads
        self._dropout = dropout
        self._embedding_dropout = embedding_dropout
        self._output_dropout = output_dropout

    def __call__(self, inputs, state, *, dropout):
        def attend(i, queries, keys, values):
            del i
            positions = tf.range(queries.shape[1])
            turned = (rotary(x, positions) for x in (queries, keys))
            return causal_attention(*(tf.transpose(x, [0, 2, 1, 3]) for x in (*turned, values)))

        return self._run(inputs, attend, dropout=dropout), state

    def decoding_state(self, batch_size, length):
        """Keys and values of each block [batch, length, hidden_dim], and the number of those there [batch]."""
        dtype = self.layers["normalization"].compute_dtype
        caches = [
            tf.zeros([batch_size, length, self._hidden_dim], dtype) for _ in range(2 * self._num_layers)
        ]
        return [*caches, tf.zeros([batch_size], tf.int32)]

    def decode(self, inputs, state):
        """As `Body.decode`; in time that grows with the length once, for the products with the cache."""
        *caches, position = state
        batch, time, _ = inputs.shape
        positions = position[:, tf.newaxis] + tf.range(time)

        def attend(i, queries, keys, values):
            for k, new in ((2 * i, rotary(keys, positions)), (2 * i + 1, values)):
                caches[k] = write_at(caches[k], position, tf.reshape(new, [batch, time, self._hidden_dim]))
            seen = positions[:, tf.newaxis, :, tf.newaxis] >= tf.range(caches[0].shape[1])
            return attention(
                tf.transpose(rotary(queries, positions), [0, 2, 1, 3]),
                *(tf.transpose(self._heads(cache), [0, 2, 1, 3]) for cache in caches[2 * i : 2 * i + 2]),
                seen=seen,
            )

        hidden = self._run(inputs, attend, dropout=None)
        return hidden, [*caches, position + time]

    def _heads(self, x):
        """[batch, time, hidden_dim] -> [batch, time, heads, dim]."""
        return tf.reshape(x, [*x.shape[:2], self._num_heads, self._hidden_dim // self._num_heads])

    def _run(self, inputs, attend, *, dropout):
        """Takes inputs through all blocks.

        `attend` maps (number of the block, queries, keys, values), [batch, time, heads, dim] before the rotation, to
        [batch, heads, time, dim].
        """
        if inputs.shape[-1] != self._hidden_dim:
            raise ValueError(
                "The inputs of a transformer must be as wide as its hidden_dim. Received: inputs of the width "
                f"{inputs.shape[-1]}, hidden_dim={self._hidden_dim}. Set HIDDEN_DIM to EMBED_DIM, or "
                f"next_token.NextToken.input_dim = {self._hidden_dim}, a learned layer between."
            )

        def drop(x, rate):
            return x if dropout is None else dropout.dropout(x, rate)

        # The rows of a table have entries of about dim ** -0.5 at first.
        stream = drop(tf.cast(inputs, tf.float32) * self._hidden_dim**0.5, self._embedding_dropout)
        for i in range(self._num_layers):
            layers = {
                name.partition("/")[2]: layer
                for name, layer in self.layers.items()
                if name.startswith(f"block_{i}/")
            }
            x = layers["queries_keys_values"](layers["attention_normalization"](stream))
            attended = attend(i, *(self._heads(part) for part in tf.split(x, 3, axis=-1)))
            attended = tf.reshape(tf.transpose(attended, [0, 2, 1, 3]), inputs.shape)
            x = layers["attention_output"](attended)
            stream += drop(tf.cast(x, tf.float32), self._dropout)
            x = layers["feed_forward"](layers["feed_forward_normalization"](stream))
            x = layers["feed_forward_output"](x)
            stream += drop(tf.cast(x, tf.float32), self._dropout)
        return drop(self.layers["normalization"](stream), self._output_dropout)


def transformer_body(
    *,
    num_layers: int,
    hidden_dim: int,
    num_heads: int,
    feed_forward_dim: int | None = None,
    dropout: float = 0.0,
    embedding_dropout: float | None = None,
    output_dropout: float | None = None,
    compute_dtype: Literal["float32", "bfloat16", "float16"] | None = None,
) -> TransformerBody:
    """Transformer decoder, without carried state: a window sees itself alone.

    Args:
      num_layers: blocks, at least 1.
      hidden_dim: width of the inputs, of the residual stream and of the outputs.
      num_heads: heads of attention; hidden_dim / num_heads must be even.
      feed_forward_dim: width inside the feed-forward layers; None for 4 * hidden_dim.
      dropout: rate on what each layer adds to the stream.
      embedding_dropout, output_dropout: rates on the embeddings and on the outputs; None for `dropout`.
      compute_dtype: of the products; None for the experiment's. Stream, logits and softmax are float32.

    Source: Vaswani et al. 2017 (arXiv:1706.03762), with the normalisations before the layers (Xiong et al. 2020,
    arXiv:2002.04745) and rotary positions (Su et al. 2021, arXiv:2104.09864).
    """
    if feed_forward_dim is None:
        feed_forward_dim = 4 * hidden_dim
    if min(num_layers, hidden_dim, num_heads, feed_forward_dim) < 1 or hidden_dim % (2 * num_heads):
        raise ValueError(
            "num_layers, hidden_dim, num_heads and feed_forward_dim must be at least 1, and hidden_dim a multiple of "
            f"2 * num_heads, since rotary positions turn pairs. Received: num_layers={num_layers}, "
            f"hidden_dim={hidden_dim}, num_heads={num_heads}, feed_forward_dim={feed_forward_dim}. Set HIDDEN_DIM, or "
            "num_heads, to one that fits."
        )
    check_compute_dtype(compute_dtype)
    embedding_dropout = dropout if embedding_dropout is None else embedding_dropout
    output_dropout = dropout if output_dropout is None else output_dropout
    check_rate(dropout=dropout, embedding_dropout=embedding_dropout, output_dropout=output_dropout)
    return TransformerBody(
        num_layers=num_layers,
        hidden_dim=hidden_dim,
        num_heads=num_heads,
        feed_forward_dim=feed_forward_dim,
        dropout=dropout,
        embedding_dropout=embedding_dropout,
        output_dropout=output_dropout,
        compute_dtype=compute_dtype,
    )
