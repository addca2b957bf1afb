"""Keras 3: a tied LSTM with a full softmax and Adam, trained with `train_on_batch`."""

import keras

from lmscale import keras_settings
from lmscale.benchmarks.peers.peer import Peer


class KerasFullSoftmax(Peer):
    """`keras_hub`-style tying: the logits are a product with the transposed embedding."""

    def __init__(self, shape):
        keras_settings.reset(seed=0)
        self._model = TiedLstm(shape)
        self._model.compile(
            optimizer=keras.optimizers.Adam(0.001, clipnorm=1.0),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )

    def train_step(self, window_ids):
        return float(self._model.train_on_batch(window_ids[:, :-1], window_ids[:, 1:]))


class TiedLstm(keras.Model):
    """Embedding, LSTM layers, logits from the same embedding."""

    def __init__(self, shape):
        super().__init__()
        self.embedding = keras.layers.Embedding(shape.vocab_size, shape.embed_dim)
        self.layers_over_time = [
            keras.layers.LSTM(shape.hidden_dim, return_sequences=True) for _ in range(shape.num_layers)
        ]

    def call(self, inputs):
        """[batch, time] ids -> [batch, time, vocab_size] logits."""
        hidden = self.embedding(inputs)
        for layer in self.layers_over_time:
            hidden = layer(hidden)
        return keras.ops.matmul(hidden, keras.ops.transpose(self.embedding.embeddings))
