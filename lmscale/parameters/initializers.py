"""First values as functions of (seed, path): the same on any number of devices, whatever else the process has built.

Any initialiser of Keras may be named; its own seed, which Keras draws when it is built, is replaced.
"""

import hashlib
import math

import keras
import numpy as np
import tensorflow as tf

# Rows of a table initialised at a time: fixed, so that a row's first value depends on (seed, path, id) and not on the
# number of shards or on vocab_size.
BLOCK_ROWS = 65_536


def seed_of(*parts):
    """An int in [0, 2**31) that depends on all `parts`, numbers and texts."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "little") % 2**31


class _Gates(keras.initializers.Initializer):
    """Each gate of a recurrent layer by an initialiser of its own: equal parts of the last axis, in Keras's order."""

    def __init__(self, **gates):
        self.gates = gates

    def seeded(self, *parts):
        """The same with seeds that depend on `parts` and the gate."""
        copy = object.__new__(type(self))
        copy.gates = {name: seeded(gate, *parts, name) for name, gate in self.gates.items()}
        return copy

    def __call__(self, shape, dtype=None):
        size, rest = divmod(shape[-1], len(self.gates))
        if rest:
            raise ValueError(
                f"{type(self).__name__} is for parameters whose last axis holds {len(self.gates)} gates of equal size. "
                f"Received: the shape {tuple(shape)}. Name another initialiser."
            )
        return tf.concat([gate((*shape[:-1], size), dtype=dtype) for gate in self.gates.values()], axis=-1)

    def __repr__(self):
        return f"{type(self).__name__}({', '.join(f'{k}={describe(v)}' for k, v in self.gates.items())})"


class LstmGates(_Gates):
    """The gates of `keras.layers.LSTM`, for its kernel, its recurrent kernel or its bias: input, forget, cell, output.

    As it stands, for the bias: a forget gate of one, which remembers at first (Jozefowicz et al. 2015, section 2.3).
    """

    def __init__(
        self,
        *,
        input: keras.initializers.Initializer | None = None,
        forget: keras.initializers.Initializer | None = None,
        cell: keras.initializers.Initializer | None = None,
        output: keras.initializers.Initializer | None = None,
    ):
        """Args: the initialiser of each gate; by default ones for `forget` and zeros for the others."""
        zeros, ones = keras.initializers.Zeros(), keras.initializers.Ones()
        super().__init__(
            input=input or zeros, forget=forget or ones, cell=cell or zeros, output=output or zeros
        )


class GruGates(_Gates):
    """The gates of `keras.layers.GRU`, for its kernel, its recurrent kernel or its biases: update, reset, candidate."""

    def __init__(
        self,
        *,
        update: keras.initializers.Initializer | None = None,
        reset: keras.initializers.Initializer | None = None,
        candidate: keras.initializers.Initializer | None = None,
    ):
        """Args: the initialiser of each gate, zeros by default."""
        zeros = keras.initializers.Zeros()
        super().__init__(update=update or zeros, reset=reset or zeros, candidate=candidate or zeros)


def seeded(initializer, *parts):
    """An initialiser like this one, whose seed depends on `parts` alone."""
    if isinstance(initializer, _Gates):
        return initializer.seeded(*parts)
    config = initializer.get_config()
    if "seed" not in config:
        return initializer
    return type(initializer).from_config({**config, "seed": seed_of(*parts)})


def initial_values(initializer, shape, *, seed, path):
    """[*shape] float32: first values of the parameter at `path`.

    Args:
      initializer: `keras.initializers.Initializer`.
      shape: of the parameter.
      seed: int, the run's.
      path: the parameter's path.

    Raises:
      ValueError: naming path and initialiser, if it cannot fill that shape.
    """
    return _drawn(initializer, tuple(shape), path=path, parts=(seed, path))


def _drawn(initializer, shape, *, path, parts):
    """Values of this shape, float32, by seeds that depend on `parts`; ValueError if it cannot be filled."""
    try:
        values = tf.cast(seeded(initializer, *parts)(shape, dtype="float32"), tf.float32)
        if tuple(values.shape) != shape:
            raise ValueError(f"it returns the shape {tuple(values.shape)}")
        return values
    # Of the values of a Constant, TensorFlow finds out that they do not fit.
    except (ValueError, TypeError, tf.errors.InvalidArgumentError) as error:
        raise ValueError(
            f"The initializer of {path} must fill its shape {shape}. Received: {describe(initializer)} "
            f"({getattr(error, 'message', error)}). Name another one in its group."
        ) from error


def default_initializer(embed_dim):
    """What the rows of a table start from if nothing else is said."""
    bound = embed_dim**-0.5
    return keras.initializers.RandomUniform(-bound, bound)


def initial_rows(initializer, *, vocab_size, embed_dim, seed, path):
    """Yields (start, values [rows, dim] float32) over the rows of a table, in blocks.

    Args:
      initializer: `keras.initializers.Initializer`.
      vocab_size, embed_dim: the table's.
      seed, path: as of `initial_values`.

    Raises:
      ValueError: for an initialiser that needs the whole matrix, or cannot fill rows of that width.
    """
    if isinstance(initializer, keras.initializers.Orthogonal | keras.initializers.Identity | _Gates):
        raise ValueError(
            f"The rows of {path} are drawn in blocks, independently of each other. Received: "
            f"{describe(initializer)}, which needs the whole matrix. Name another initializer in its group."
        )
    scale = _fan_correction(initializer, vocab_size=vocab_size, embed_dim=embed_dim)
    for block, start in enumerate(range(0, vocab_size, BLOCK_ROWS)):
        # Always a whole block, cut afterwards.
        values = _drawn(initializer, (BLOCK_ROWS, embed_dim), path=path, parts=(seed, path, block))
        stop = min(start + BLOCK_ROWS, vocab_size)
        yield start, scale * np.asarray(values[: stop - start], np.float32)


def _fan_correction(initializer, *, vocab_size, embed_dim):
    """Scales by the fans of the whole table what was drawn by those of a block."""
    if not isinstance(initializer, keras.initializers.VarianceScaling):
        return np.float32(1)

    def fan(rows):
        return {"fan_in": rows, "fan_out": embed_dim, "fan_avg": (rows + embed_dim) / 2}[initializer.mode]

    return np.float32(math.sqrt(fan(BLOCK_ROWS) / fan(vocab_size)))


def describe(initializer):
    """`RandomNormal(mean=0.0, stddev=0.05)`, for tables and messages."""
    if isinstance(initializer, _Gates):
        return repr(initializer)
    shown = {k: v for k, v in initializer.get_config().items() if k != "seed"}
    shown = {k: round(v, 6) if isinstance(v, float) else v for k, v in shown.items()}
    return f"{type(initializer).__name__}({', '.join(f'{k}={v}' for k, v in shown.items())})"
