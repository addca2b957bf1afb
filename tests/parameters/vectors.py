"""Word vectors in each format, written without the reader's help."""

import struct

import numpy as np


def text(words, rows, *, header=True, trailing="", line_end="\n"):
    """word2vec's text form, or GloVe's without header; the numbers as decimal texts that float32 survives."""
    lines = [f"{len(words)} {rows.shape[1]}"] if header else []
    lines += [
        word + "".join(f" {value:.9g}" for value in row.tolist()) + trailing
        for word, row in zip(words, rows, strict=True)
    ]
    return "".join(line + line_end for line in lines).encode()


def binary(words, rows, *, behind=b"\n"):
    """word2vec's binary form; word2vec ends each row with a line feed, gensim with nothing."""
    first = f"{len(words)} {rows.shape[1]}\n".encode()
    return first + b"".join(
        word.encode() + b" " + struct.pack(f"<{len(row)}f", *row.tolist()) + behind
        for word, row in zip(words, rows, strict=True)
    )


def random_rows(num_rows, dim, *, seed=0):
    """[num_rows, dim] float32 over many magnitudes, some of them whole numbers."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(num_rows, dim)) * 10.0 ** rng.integers(-6, 6, size=(num_rows, dim))
    return np.where(rng.random((num_rows, dim)) < 0.1, np.round(rows), rows).astype(np.float32)
