"""metadata.json of one checkpoint: what it says, and whether the files beside it are those that were saved."""

import hashlib
import json
from pathlib import Path

from lmscale.checkpoints.tensors import DamagedError, checksums, raise_damage
from lmscale.distribution.process_group import ProcessGroup
from lmscale.workdir import replace_file

FILE = "metadata.json"
FORMAT = 2
# Of format 1: the names of the tensors, which were positions in the body; nothing else.
_READABLE_FORMATS = (1, FORMAT)


def write(directory: Path, document: dict) -> None:
    """Writes metadata.json with a digest of itself, in one piece or not at all."""
    text = json.dumps({**document, "sha256": _digest(document)}, indent=1)
    replace_file(directory / FILE, text=text)


def read(directory: Path) -> dict:
    """metadata.json, checked against the digest of itself.

    Raises:
      DamagedError: if it is not what was written.
      ValueError: if its format is one that this version does not know.
    """
    path = directory / FILE
    try:
        document = json.loads(path.read_bytes())
        digest = document.pop("sha256")
    except OSError as error:
        raise DamagedError(f"{FILE} cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise DamagedError(f"{FILE} is not the JSON that was written ({error!r})") from error
    if digest != _digest(document):
        raise DamagedError(f"{FILE} does not match its own checksum")
    if document["format"] not in _READABLE_FORMATS:
        known = " or ".join(map(str, _READABLE_FORMATS))
        raise ValueError(
            f"The checkpoint {directory} must have format {known}. Received: {document['format']}. "
            "Read it with the version of lmscale that wrote it."
        )
    return document


def check_sizes(directory: Path, document: dict) -> None:
    """Raises DamagedError unless each file of the tensors is there and has its size."""
    for name, file in document["files"].items():
        try:
            size = (directory / name).stat().st_size
        except OSError as error:
            raise DamagedError(f"{name} cannot be read ({error.strerror})") from error
        if size != file["bytes"]:
            raise DamagedError(f"{name} has {size} bytes instead of {file['bytes']}")


def check_files(directory: Path, document: dict, *, group: ProcessGroup) -> None:
    """Raises DamagedError, at every process, unless each file of the tensors has its size and checksum.

    Each process of the group reads its share of the files.
    """
    names = sorted(document["files"])
    own = names[group.rank :: group.size]
    try:
        check_sizes(directory, document)
        found = checksums([directory / name for name in own])
        wrong = [name for name in own if found[name] != document["files"][name]]
        damage = f"the checksum of {wrong[0]} is not the one saved" if wrong else None
    except (OSError, DamagedError) as error:
        damage = str(error)
    raise_damage(damage, group=group)


def user_metadata(document: dict) -> dict:
    """The metadata as it was saved, with "step" and "validation_loss_nats" (None if unknown) added."""
    return {
        **document["metadata"],
        "step": document["step"],
        "validation_loss_nats": document["validation_loss_nats"],
    }


def _digest(document: dict) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def vocabulary_sha256(metadata, table):
    """SHA-256 of the vocabulary whose words are the rows of a table, by a checkpoint's metadata; None if not told."""
    vocabularies = metadata.get("vocabularies", {})
    if table in vocabularies:
        return vocabularies[table]
    # Earlier versions knew one vocabulary, under a name that need not be a table's, or under none.
    known = set(vocabularies.values()) or {metadata.get("vocabulary_sha256")}
    return known.pop() if len(known) == 1 else None
