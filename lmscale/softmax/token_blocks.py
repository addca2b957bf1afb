"""Tokens in blocks, those of weight 0 last, so that work is done for the blocks alone that have another."""

import tensorflow as tf


class TokenBlocks:
    """An order of tokens, cut into blocks of one size; how many blocks count is known at run time alone.

    Attributes:
      is_computed: [tokens] bool, whether the block of a token counts.
    """

    def __init__(self, weights, *, block_tokens):
        """Args:
        weights: [tokens] float32.
        block_tokens: int, tokens of a block.
        """
        tokens = weights.shape[0]
        self._size = min(int(block_tokens), tokens)
        self._most = -(-tokens // self._size)
        is_padding = tf.cast(tf.equal(weights, 0.0), tf.int32)
        order = tf.argsort(is_padding, stable=True)
        # Where each token stands in that order.
        self._places = tf.scatter_nd(order[:, tf.newaxis], tf.range(tokens), [tokens])
        self._order = tf.reshape(tf.pad(order, [[0, self._most * self._size - tokens]]), [self._most, -1])
        self._is_token = tf.reshape(tf.range(self._most * self._size) < tokens, [self._most, -1])
        self._number = -(-(tokens - tf.reduce_sum(is_padding)) // self._size)
        self.is_computed = self._places < self._number * self._size

    def map(self, function, *of_tokens):
        """A function's values [block_tokens] of tensors [block_tokens, ...], of all tokens; 0 where not computed."""
        values, _ = self._loop(
            lambda block: (function(*(self._of_block(block, x) for x in of_tokens)), ()),
            value_shape=[],
            sums=(),
        )
        return values

    def map_and_sum(self, function, *of_tokens, weights, dim, sums):
        """As `map` of a function whose values are vectors, and that also returns what is summed over the blocks.

        Args:
          function: of tensors [block_tokens, ...] and weights [block_tokens], 0 where a block is filled up; returns
            [block_tokens, dim] and a list of what is added to the sums.
          of_tokens: tensors [tokens, ...].
          weights: [tokens].
          dim: int.
          sums: list of tensors to begin with.

        Returns:
          ([tokens, dim], the sums).
        """

        def of_block(block):
            of_its_tokens = (self._of_block(block, x) for x in of_tokens)
            return function(
                *of_its_tokens, tf.where(self._is_token[block], self._of_block(block, weights), 0.0)
            )

        return self._loop(of_block, value_shape=[dim], sums=sums)

    def _of_block(self, block, of_tokens):
        return tf.gather(of_tokens, self._order[block])

    def _loop(self, of_block, *, value_shape, sums):
        """([tokens, ...], sums) of a function of a block's number that returns ([block_tokens, ...], parts of sums)."""

        def body(block, values, sums):
            of_its_tokens, parts = of_block(block)
            values = tf.tensor_scatter_nd_update(values, [[block]], of_its_tokens[tf.newaxis])
            return block + 1, values, [total + part for total, part in zip(sums, parts, strict=True)]

        _, values, sums = tf.while_loop(
            lambda block, *_: block < self._number,
            body,
            [tf.constant(0), tf.zeros([self._most, self._size, *value_shape]), list(sums)],
            parallel_iterations=1,  # One block of logits at a time.
        )
        return tf.gather(tf.reshape(values, [-1, *value_shape]), self._places), sums
