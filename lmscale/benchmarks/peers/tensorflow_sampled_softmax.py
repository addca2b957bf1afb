"""TensorFlow: a tied LSTM with `tf.nn.sampled_softmax_loss` and a Keras optimizer, in a `tf.function`."""

import keras
import tensorflow as tf

from lmscale import keras_settings
from lmscale.benchmarks.peers.peer import Peer


class TensorflowSampledSoftmax(Peer):
    """The op's own log-uniform sampler; every gradient goes to one Keras optimizer."""

    def __init__(self, shape, *, optimizer):
        """`optimizer`: name of a class in `keras.optimizers`."""
        keras_settings.reset(seed=0)
        self._shape = shape
        self._embedding = tf.Variable(tf.random.uniform([shape.vocab_size, shape.embed_dim], -0.1, 0.1))
        self._bias = tf.Variable(tf.zeros([shape.vocab_size]))
        self._layers = [
            keras.layers.LSTM(shape.hidden_dim, return_sequences=True) for _ in range(shape.num_layers)
        ]
        for i, layer in enumerate(self._layers):
            layer.build([None, shape.window, shape.hidden_dim if i else shape.embed_dim])
        self._variables = [self._embedding, self._bias]
        self._variables += [v.value for layer in self._layers for v in layer.trainable_variables]
        self._optimizer = getattr(keras.optimizers, optimizer)(0.001, clipnorm=1.0)
        self._optimizer.build(self._variables)

    def train_step(self, window_ids):
        return float(self._step(tf.constant(window_ids)))

    @tf.function
    def _step(self, window_ids):
        with tf.GradientTape() as tape:
            hidden = tf.nn.embedding_lookup(self._embedding, window_ids[:, :-1])
            for layer in self._layers:
                hidden = layer(hidden)
            loss = tf.reduce_mean(
                tf.nn.sampled_softmax_loss(
                    weights=self._embedding,
                    biases=self._bias,
                    labels=tf.reshape(tf.cast(window_ids[:, 1:], tf.int64), [-1, 1]),
                    inputs=tf.reshape(hidden, [-1, self._shape.hidden_dim]),
                    num_sampled=self._shape.num_sampled,
                    num_classes=self._shape.vocab_size,
                )
            )
        gradients = tape.gradient(loss, self._variables)
        self._optimizer.apply_gradients(zip(gradients, self._variables, strict=True))
        return loss
