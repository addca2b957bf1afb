"""lmscale: language models whose vocabulary is the big thing, on TensorFlow."""

import os

__version__ = "0.1.0"

# Read when Keras and TensorFlow are imported; they win over ~/.keras/keras.json. NNX is JAX's, legacy means Keras 2.
os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ["KERAS_NNX_ENABLED"] = "false"
os.environ["TF_USE_LEGACY_KERAS"] = "0"
