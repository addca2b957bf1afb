"""lmscale: language models whose vocabulary is the big thing, on TensorFlow."""

__version__ = "0.1.0"
