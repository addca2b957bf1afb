"""What is at the place where prepared data are to be made: the same already, something to replace, or foreign files."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from lmscale.data.prepared_directory import is_empty, is_replaceable, remove_abandoned_folders
from lmscale.data.token_files import file_sha256
from lmscale.doing import doing

Data = TypeVar("Data")
Report = Callable[[str, int, int], None]


def describe_files(
    files: Mapping[str, Sequence[Path]], *, on_bytes: Callable[[int], None]
) -> dict[str, list[dict]]:
    """Names without folders, sizes and SHA-256 of files, by what they are for.

    Args:
      files: {name: paths}.
      on_bytes: called with the size of each file that has been read.
    """

    def entry(path):
        size = path.stat().st_size
        digest = file_sha256(path)
        on_bytes(size)
        return {"file": path.name, "bytes": size, "sha256": digest}

    return {name: [entry(path) for path in paths] for name, paths in files.items()}


def there_already(
    output: Path,
    *,
    open_data: Callable[[Path], Data],
    options: dict,
    inputs: Callable[[], dict],
    overwrite: bool,
) -> Data | None:
    """The data at `output`, if they are those that would be made; None if they are to be made.

    Removes what a killed preparation has left there.

    Args:
      output: the directory to make.
      open_data: opens what is there.
      options: what the manifest would say of the options.
      inputs: returns what it would say of the input, as of `describe_files`.
      overwrite: whether other data there are to be replaced.

    Raises:
      ValueError: for a file, a directory that holds anything else, or, without `overwrite`, other data.
    """
    if not output.exists():
        return None
    _check_replaceable(output)
    remove_abandoned_folders(output)
    if overwrite or is_empty(output):
        return None
    found = inputs()
    with doing("reading what is there already"):
        return _already_prepared(output, open_data=open_data, options=options, inputs=found)


def meter(phase: str, total: int, report: Report) -> Callable[[int], None]:
    """Adds up bytes for `report`."""
    done = 0

    def on_bytes(count: int):
        nonlocal done
        done += count
        report(phase, done, total)

    return on_bytes


def _check_replaceable(output: Path):
    if not output.is_dir():
        raise ValueError(f"output must be a directory. Received: {str(output)!r}, a file. Choose another.")
    if not is_replaceable(output):
        raise ValueError(
            f"output must be new, empty or made by this command. Received: {str(output)!r}, which holds "
            "other files, or no manifest. They are left alone, also with --overwrite: choose another place."
        )


def _already_prepared(output: Path, *, open_data, options: dict, inputs: dict):
    """Opens what is at `output` if it is whole, and of this input with these options."""
    try:
        data = open_data(output)
    except ValueError as error:
        raise ValueError(
            f"{output} exists and is not whole: {error} "
            "Pass --overwrite to replace it, or choose another output."
        ) from error
    there = {"inputs": data.manifest.get("inputs"), **(data.manifest.get("options") or {})}
    wanted = {"inputs": inputs, **options}
    differing = sorted(key for key in there.keys() | wanted.keys() if there.get(key) != wanted.get(key))
    if differing:
        shown = [
            f"{key} is {there.get(key)!r}, wanted {wanted.get(key)!r}"
            if key != "inputs"
            else "other input files"
            for key in differing
        ]
        raise ValueError(
            f"{output} exists and holds other data: {'; '.join(shown)}. "
            "Pass --overwrite to replace it, or choose another output."
        )
    return data
