"""Opens a prepared directory, whatever is in it."""

import os

from lmscale.data.columns import PreparedColumns
from lmscale.data.token_files import PreparedData, read_manifest
from lmscale.storage import as_path

Prepared = PreparedData | PreparedColumns


def open_prepared(directory: str | os.PathLike) -> Prepared:
    """`PreparedData` of a text, `PreparedColumns` of examples.

    Raises:
      ValueError: saying which file is missing, malformed, or not the one that the manifest describes.
    """
    is_text = "kind" not in read_manifest(as_path(directory))
    return (PreparedData if is_text else PreparedColumns).open(directory)
