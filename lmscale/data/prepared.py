"""Opens a prepared directory, whatever is in it."""

import os

from lmscale.data.columns import PreparedColumns
from lmscale.data.token_files import PreparedData, read_manifest
from lmscale.storage import as_path

Prepared = PreparedData | PreparedColumns


def open_prepared(directory: str | os.PathLike, *, with_words: bool = True) -> Prepared:
    """`PreparedData` of a text, with or without its words in memory; `PreparedColumns` of examples.

    Raises:
      ValueError: saying which file is missing, malformed, or not the one that the manifest describes.
    """
    if "kind" in read_manifest(as_path(directory)):
        return PreparedColumns.open(directory)
    return PreparedData.open(directory, with_words=with_words)
