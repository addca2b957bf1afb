"""Files that TensorBoard's projector opens: vectors, and a word and its count for each."""

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from google.protobuf import text_format
from tensorboard.plugins.projector import EmbeddingInfo, ProjectorConfig

CONFIG_NAME = "projector_config.pbtxt"


def write_projector(
    directory: Path, rows: Iterable[tuple[str, int, np.ndarray]], *, name: str, dim: int
) -> int:
    """Adds vectors to what `tensorboard --logdir=DIRECTORY` shows in its projector, or replaces those of this name.

    NAME.vectors.tsv has a vector a line, in digits that read as the same float32 (TensorBoard takes binary files for
    text where their bytes happen to be UTF-8); NAME.words.tsv a word and a count, below a line of names. Each file is
    whole or not there, and the configuration, which names them, comes last.

    Args:
      directory: made if it is not there.
      rows: (word, count, [dim] numbers), in the order in which the projector has them.
      name: of the vectors in the projector.
      dim: numbers of a row.

    Returns:
      How many rows.

    Raises:
      ValueError: for a row that is not [dim] finite numbers; if there is none; if the directory is a file, or holds
        another configuration than one of a projector.
      OSError: if a file cannot be written.
    """
    if directory.exists() and not directory.is_dir():
        raise ValueError(
            f"The projector needs a folder. Received: {directory}, which is a file. Pass another path."
        )
    config = _config(directory / CONFIG_NAME)
    directory.mkdir(parents=True, exist_ok=True)
    vectors, words = directory / f"{name}.vectors.tsv", directory / f"{name}.words.tsv"
    parts = [path.with_name(f".{path.name}.partial") for path in (vectors, words)]
    number = 0
    try:
        with (
            parts[0].open("w", encoding="ascii") as of_vectors,
            parts[1].open("w", encoding="utf-8") as of_words,
        ):
            of_words.write("word\tcount\n")
            for word, count, row in rows:
                row = np.asarray(row, np.float32)
                if row.shape != (dim,) or not np.isfinite(row).all():
                    raise ValueError(
                        f"Vectors for the projector must be {dim} finite numbers. Received: {row} of {word!r}. Pass "
                        "a checkpoint from before training went wrong."
                    )
                of_vectors.write("\t".join([f"{x:.9g}" for x in row.tolist()]) + "\n")
                of_words.write(f"{word}\t{count}\n")
                number += 1
        if not number:
            raise ValueError("There must be vectors for the projector. Received: none.")
        for part, path in zip(parts, (vectors, words), strict=True):
            os.replace(part, path)
    finally:
        for part in parts:
            part.unlink(missing_ok=True)
    others = [embedding for embedding in config.embeddings if embedding.tensor_name != name]
    del config.embeddings[:]
    config.embeddings.extend(others)
    config.embeddings.append(
        EmbeddingInfo(
            tensor_name=name,
            tensor_shape=[number, dim],
            tensor_path=vectors.name,
            metadata_path=words.name,
        )
    )
    part = directory / f".{CONFIG_NAME}.partial"
    try:
        part.write_text(text_format.MessageToString(config), encoding="utf-8")
        os.replace(part, directory / CONFIG_NAME)
    finally:
        part.unlink(missing_ok=True)
    return number


def _config(path):
    """The `ProjectorConfig` of a file, an empty one where there is none."""
    if not path.exists():
        return ProjectorConfig()
    try:
        return text_format.Parse(path.read_text(encoding="utf-8"), ProjectorConfig())
    except (text_format.ParseError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} must be the configuration of a projector. Received: {error}. Remove it, or pass another folder."
        ) from error
