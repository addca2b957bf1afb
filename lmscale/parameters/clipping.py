"""Norms of gradients, and the factors that bound them, for each group that is clipped together."""

import tensorflow as tf


def clipping(squares, treatments, *, clip_norm):
    """{path: factor on its gradient} that bounds the norm of each clip group, and of the parameters that have none.

    Args:
      squares: {path: squared norm of its gradient}.
      treatments: {path: `Treatment`}.
      clip_norm: bound for those without a clip group; None for none.
    """
    members: dict = {}
    for path in squares:
        members.setdefault(treatments[path].clip, []).append(path)
    scales = {}
    for clip, paths in members.items():
        bound = clip_norm if clip is None else clip.norm
        scale = 1.0
        if bound is not None:
            its_norm = norm(squares[path] for path in paths)
            scale = tf.minimum(1.0, bound / tf.maximum(its_norm, 1e-30))
        scales |= dict.fromkeys(paths, scale)
    return scales


def norm(squares):
    """The norm of what has these squared norms."""
    return tf.sqrt(scalar_sum(squares))


def scalar_sum(scalars):
    """Their sum. Not add_n: it begins with whichever input it may overwrite, so the last bit depends on timing."""
    return tf.reduce_sum(tf.stack([tf.zeros([]), *scalars]))
