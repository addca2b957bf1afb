"""Writes word vectors in word2vec's text and binary form, row by row in bounded memory."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import numpy as np

FORMATS = ("word2vec_text", "word2vec_binary")


def write_vectors(
    path: Path,
    rows: Iterable[tuple[str, np.ndarray]],
    *,
    num_rows: int,
    dim: int,
    format: Literal["word2vec_text", "word2vec_binary"],
) -> None:
    """Writes a file that is complete or not there: under another name until its last row is written.

    Args:
      path: of the file.
      rows: (word, [dim] numbers), num_rows of them; written as float32, the text so that it reads as the same float32.
      num_rows, dim: what the first line announces.
      format: as of `vector_files`.

    Raises:
      ValueError: for a word with white space, which no reader could tell from two, or another number or width of rows
        than announced.
      OSError: if the file cannot be written.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {FORMATS}. Received: format={format!r}.")
    partial = path.with_name(f".{path.name}.partial")
    written = 0
    try:
        with partial.open("wb") as file:
            file.write(f"{num_rows} {dim}\n".encode())
            for word, row in rows:
                if not word or word.split() != [word]:
                    raise ValueError(
                        f"A word in a file of vectors must have no white space. Received: {word!r}. Prepare the data "
                        "with a tokenizer whose tokens have none."
                    )
                if np.shape(row) != (dim,):
                    raise ValueError(f"Rows must have {dim} numbers. Received: {np.shape(row)} of {word!r}.")
                file.write(word.encode() + b" ")
                values = np.asarray(row, "<f4")
                if format == "word2vec_binary":
                    file.write(values.tobytes() + b"\n")
                else:
                    # Nine digits tell any two float32 apart.
                    file.write(" ".join([f"{x:.9g}" for x in values.tolist()]).encode() + b"\n")
                written += 1
        if written != num_rows:
            raise ValueError(f"There must be the {num_rows:,} rows announced. Received: {written:,}.")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
