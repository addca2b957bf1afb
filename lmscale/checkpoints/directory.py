"""The checkpoints of a run, one directory per step.

    checkpoints/step_00001000/metadata.json      step, metadata, validation loss, tensors, checksums
    checkpoints/step_00001000/tensors.index      a TensorFlow V2 checkpoint, which any TensorFlow tool
    checkpoints/step_00001000/tensors.data-...   reads: `tf.train.load_checkpoint(".../tensors")`

A directory takes its name by one rename, when all of it is on disk. A save that is killed leaves a
hidden directory behind, which the next `Checkpoints` removes. No file names the latest checkpoint:
the names of the directories do.

On a local or mounted POSIX filesystem renames must be atomic and fsync must mean it. A store, such as gs://bucket/run,
cannot rename a directory. There, a checkpoint is written under its name, metadata.json last, and removed metadata.json
first: a directory without it is no checkpoint. What differs: a save that replaces a checkpoint of the same step removes
that one before it writes.
"""

import contextlib
import json
import logging
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from lmscale.checkpoints import document as documents
from lmscale.checkpoints.tensors import (
    PREFIX,
    DamagedError,
    Stored,
    read_tensors,
    stored_as,
    write_tensors,
)
from lmscale.distribution.process_group import ProcessGroup
from lmscale.parameters.tree import Parameter
from lmscale.paths import check_checkpoint_path
from lmscale.storage import as_path, is_remote
from lmscale.workdir import fsync_directory

logger = logging.getLogger(__name__)

STEP_DIRECTORY = re.compile(r"step_(\d{8,})")
_UNFINISHED = re.compile(r"\.step_(\d{8,})\.(saving|removing|replaced)")
_SET_ASIDE = "set_aside_metadata.json"  # In a store, for metadata.json.
_RESERVED_METADATA = ("step", "validation_loss_nats")


class UnavailableError(ValueError):
    """The checkpoint of the step that was asked for is not there, not any more, or damaged."""


class Checkpoints:
    """The checkpoints of one run, in one directory, with one writer: a process, or a group of processes.

    Of a group, every process calls `save` and `restore`, in the same order. Each writes, or reads, a part of the
    tensors; the chief gives the whole its name, and alone changes the directory otherwise.

    Keeps the `keep` newest, and the one of the lowest validation loss.
    """

    def __init__(
        self,
        directory,
        *,
        keep: int = 3,
        block_mib: float = 64,
        readonly: bool = False,
        group: ProcessGroup | None = None,
    ):
        """Opens the directory, and clears what killed saves left in it.

        Args:
          directory: where the checkpoints are; made if absent.
          keep: how many of the newest to keep; the best is kept besides.
          block_mib: rows pass through memory in blocks of this size. A save holds about three blocks; among several
            processes, which exchange them, up to eight.
          readonly: change nothing in the directory, which another run may be writing. For an evaluation.
          group: `ProcessGroup` of those that save and restore together; None for one process.

        Raises:
          ValueError: if keep < 1 or block_mib <= 0, or TensorFlow would take the directory for another one.
        """
        if keep < 1 or not block_mib > 0:
            raise ValueError(
                "keep must be at least 1 and block_mib above 0. "
                f"Received: keep={keep}, block_mib={block_mib}."
            )
        check_checkpoint_path(directory, what="The directory of checkpoints")
        self._directory = as_path(directory)
        self._is_remote = is_remote(self._directory)
        self._keep = keep
        self._block_bytes = int(block_mib * 2**20)
        self._readonly = readonly
        self._group = group or ProcessGroup()
        if not readonly and self._group.is_chief:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._clear_unfinished()

    def prefix(self, step: int) -> str:
        """The path for TensorFlow's own readers: `tf.train.load_checkpoint(checkpoints.prefix(step))`."""
        return str(self.step_directory(step) / PREFIX)

    def step_directory(self, step: int) -> Path:
        """Where the checkpoint of a step is, or would be."""
        return self._directory / f"step_{step:08d}"

    def newest_step(self) -> int | None:
        """The newest checkpoint, damaged or not, if there is any."""
        return max(self._published(), default=None)

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, ascending: each file is there and has its size."""
        return list(self._complete())

    def best_step(self) -> int | None:
        """The complete checkpoint of the lowest validation loss (the earliest of equals), if any has one."""
        losses = [(document["validation_loss_nats"], step) for step, document in self._complete().items()]
        return min(((loss, step) for loss, step in losses if loss is not None), default=(None, None))[1]

    def save(
        self,
        step: int,
        items: Sequence[Parameter],
        *,
        metadata: dict,
        validation_loss_nats: float | None = None,
    ) -> str:
        """Saves a checkpoint of `step`, then removes the ones that need not be kept.

        A checkpoint of the same step is replaced. Checkpoints of later steps exist when the run went
        back to an earlier one, and are no part of it from here on: they are renamed to
        `set_aside_step_...`, with a warning, and neither restored nor removed.

        Args:
          step: int, at least 0.
          items: what to save.
          metadata: anything JSON holds; `restore` returns it.
          validation_loss_nats: loss at this step, if known. NaN and infinity count as unknown.

        Returns:
          The path for TensorFlow's readers, as `prefix(step)`.

        Raises:
          ValueError: if an item's `read` returns another shape or dtype than the item declares, if paths
            repeat, if metadata is not JSON, or if this object is readonly. Nothing is changed then.
        """
        if self._readonly:
            raise ValueError(f"Checkpoints opened readonly cannot be saved to: {self._directory}.")
        if step < 0:
            raise ValueError(f"step must be at least 0. Received: step={step}.")
        _check_paths(items)
        tensors = [(item, stored_as(item, block_bytes=self._block_bytes)) for item in items]
        document = {
            "format": documents.FORMAT,
            "step": int(step),
            "validation_loss_nats": _finite_or_none(validation_loss_nats),
            "metadata": _json_copy(metadata),
            "tensors": {stored.name: stored.to_json() for _, stored in tensors},
        }
        temporary = self.step_directory(step) if self._is_remote else self._hidden(step, "saving")
        is_chief = self._group.is_chief
        try:
            if is_chief:
                self._withdraw(temporary)
                _remove_tree(temporary)
                temporary.mkdir(exist_ok=self._is_remote)
            document["files"] = write_tensors(
                temporary, tensors, block_bytes=self._block_bytes, group=self._group
            )
            if is_chief:
                documents.write(temporary, document)
                if not self._is_remote:
                    self._publish(temporary, step)
        except BaseException:
            if is_chief:
                _remove_tree(temporary)
            raise
        if is_chief:
            self._set_aside_later_than(step)
            self._prune()
        self._group.gather()
        return self.prefix(step)

    def mark_best(self, step: int, validation_loss_nats: float) -> None:
        """Records the validation loss of a checkpoint already saved, for `best_step` to compare.

        NaN and infinity are recorded as unknown: they are never the best.

        Raises:
          ValueError: if the step has no checkpoint, or this object is readonly.
        """
        if self._readonly:
            raise ValueError(f"Checkpoints opened readonly cannot be marked: {self._directory}.")
        self._check_available(step)
        try:
            document = self._document(step)
        except DamagedError as damage:
            raise ValueError(f"The checkpoint of step {step} is damaged: {damage}.") from damage
        document["validation_loss_nats"] = _finite_or_none(validation_loss_nats)
        documents.write(self.step_directory(step), document)

    def restore(
        self,
        items: Sequence[Parameter],
        *,
        step: int | None = None,
        subset: bool = False,
        format_1_names: Mapping[str, str] | None = None,
    ) -> dict | None:
        """Writes a checkpoint's tensors into `items`.

        Paths, shapes and dtypes are compared before any data is read, and checksums before any item is
        written to. Items are written to in the blocks that were saved: the memory needed is the save's.

        Args:
          items: what to restore.
          step: the step to restore. None: the newest; if it is damaged, with a warning, the one before.
          subset: `items` may leave out tensors of the checkpoint: an evaluation needs no optimizer's.
          format_1_names: {path: name under which a checkpoint of format 1 holds it}, for the paths of `items`
            that it holds under another name.

        Returns:
          The metadata as it was saved, with "step" and "validation_loss_nats" (None if unknown) added;
          or None if there is no checkpoint at all.

        Raises:
          ValueError: if the checkpoint does not fit `items`; if checkpoints exist and none is readable.
          UnavailableError: if `step` has no checkpoint, or a damaged one; if it is removed while it is read.
        """
        _check_paths(items)
        if step is not None:
            self._check_available(step)
            try:
                return self._load(step, items, subset, format_1_names or {})
            except DamagedError as damage:
                self._check_available(step)
                raise UnavailableError(
                    f"The checkpoint of step {step} in {self._directory} is damaged: {damage}. "
                    f"Select another step. Available: {_listed(s for s in self.steps() if s != step)}."
                ) from damage
        damages: dict[int, str] = {}
        # Listed anew each time: a run that writes here may have removed a step while it was read.
        while untried := self._group.of_chief([s for s in self._published() if s not in damages]):
            newest = untried[-1]
            try:
                return self._load(newest, items, subset, format_1_names or {})
            except DamagedError as damage:
                if newest not in self._group.of_chief(self._published()):
                    continue
                damages[newest] = str(damage)
                if self._group.is_chief:  # All know the same.
                    logger.warning(
                        "DAMAGED CHECKPOINT: step %d in %s: %s. Trying the one before it.",
                        newest,
                        self._directory,
                        damage,
                    )
        if not damages:
            return None
        reasons = "\n".join(f"  step {s}: {reason}" for s, reason in sorted(damages.items()))
        raise ValueError(
            f"No checkpoint in {self._directory} is readable:\n{reasons}\n"
            "Restore the files from a copy, or start over in another directory."
        )

    # Directories and what they are called.

    def _hidden(self, step: int, state: str) -> Path:
        return self._directory / f".step_{step:08d}.{state}"

    def _published(self) -> list[int]:
        """Steps that have a directory, ascending. It was complete when it was given its name."""
        if not self._directory.is_dir():
            return []
        matches = {
            path: STEP_DIRECTORY.fullmatch(path.name) for path in self._directory.iterdir() if path.is_dir()
        }
        return sorted(
            int(match[1])
            for path, match in matches.items()
            if match and (not self._is_remote or (path / documents.FILE).exists())
        )

    def _withdraw(self, directory: Path) -> None:
        """In a store: makes a checkpoint none, before its files are removed."""
        if self._is_remote:
            (directory / documents.FILE).unlink(missing_ok=True)

    def _check_available(self, step: int) -> None:
        """Raises UnavailableError, at every process, unless the chief finds a directory of the step."""
        available = None
        if self._group.is_chief and step not in self._published():
            available = _listed(self.steps())
        available = self._group.of_chief(available)
        if available is not None:
            raise UnavailableError(
                f"There is no checkpoint of step {step} in {self._directory}. Available: {available}."
            )

    def _clear_unfinished(self) -> None:
        if self._is_remote:
            for path in self._directory.iterdir():
                is_whole = any((path / name).exists() for name in (documents.FILE, _SET_ASIDE))
                if STEP_DIRECTORY.fullmatch(path.name) and not is_whole:
                    logger.info("Removing %s, left by a save that did not finish.", path)
                    _remove_tree(path)
            return
        for path in sorted(self._directory.iterdir()):
            match = _UNFINISHED.fullmatch(path.name)
            if not match:
                continue
            step = int(match[1])
            if match[2] == "replaced" and not self.step_directory(step).exists():
                # Killed between the two renames that replace a checkpoint.
                path.rename(self.step_directory(step))
            else:
                logger.info("Removing %s, left by a save that did not finish.", path)
                _remove_tree(path)
        for step in self._published():
            (self.step_directory(step) / f"{documents.FILE}.tmp").unlink(missing_ok=True)

    def _publish(self, temporary: Path, step: int) -> None:
        """Gives a finished directory its name, in place of an earlier one of that name."""
        target, replaced = self.step_directory(step), self._hidden(step, "replaced")
        if target.exists():
            _remove_tree(replaced)
            target.rename(replaced)
        try:
            temporary.rename(target)
        except BaseException:
            if replaced.exists():
                replaced.rename(target)
            raise
        fsync_directory(self._directory)
        _remove_tree(replaced)

    def _set_aside_later_than(self, step: int) -> None:
        for later in self._published():
            if later > step:
                directory = self.step_directory(later)
                aside = self._directory / f"set_aside_step_{later:08d}"
                if self._is_remote:
                    aside = directory / _SET_ASIDE
                logger.warning(
                    "The run went back to step %d: its checkpoint of step %d is set aside as %s. "
                    "Nothing reads it any more: delete it when you do not need it.",
                    step,
                    later,
                    aside,
                )
                if self._is_remote:
                    aside.write_bytes((directory / documents.FILE).read_bytes())
                    self._withdraw(directory)
                    continue
                _remove_tree(aside)
                directory.rename(aside)

    def _prune(self) -> None:
        """Removes checkpoints older than the `keep` newest complete ones, but for the best."""
        oldest_kept = self.steps()[-self._keep :][0]
        best = self.best_step()
        for step in self._published():
            if step < oldest_kept and step != best:
                if self._is_remote:
                    self._withdraw(self.step_directory(step))
                    _remove_tree(self.step_directory(step))
                    continue
                # Renamed first: a removal that is killed half way must not look like a damaged checkpoint.
                hidden = self._hidden(step, "removing")
                _remove_tree(hidden)
                self.step_directory(step).rename(hidden)
                _remove_tree(hidden)

    # Reading.

    def _document(self, step: int) -> dict:
        """metadata.json of a step that has a directory."""
        document = documents.read(self.step_directory(step))
        if document["step"] != step:
            raise DamagedError(f"{documents.FILE} does not match its directory's name")
        return document

    def _complete(self) -> dict[int, dict]:
        """Step and document of each checkpoint whose files are there and have their size, ascending."""
        complete = {}
        for step in self._published():
            with contextlib.suppress(DamagedError):
                document = self._document(step)
                documents.check_sizes(self.step_directory(step), document)
                complete[step] = document
        return complete

    def _load(
        self, step: int, items: Sequence[Parameter], subset: bool, format_1_names: Mapping[str, str]
    ) -> dict:
        directory = self.step_directory(step)
        document = self._document_of_chief(step)
        paths = {name: path for path, name in format_1_names.items()} if document["format"] == 1 else {}
        saved = {
            paths.get(name, name): Stored.from_json(name, entry)
            for name, entry in document["tensors"].items()
        }
        _check_fit(directory, saved, items, subset)
        documents.check_files(directory, document, group=self._group)
        tensors = [(item, saved[item.path]) for item in items]
        read_tensors(directory, tensors, block_bytes=self._block_bytes, group=self._group)
        return documents.user_metadata(document)

    def _document_of_chief(self, step: int) -> dict:
        """The document of a step, which the chief reads; raises DamagedError at every process."""
        document = damage = None
        if self._group.is_chief:
            try:
                document = self._document(step)
            except DamagedError as error:
                damage = str(error)
        document, damage = self._group.of_chief([document, damage])
        if damage is not None:
            raise DamagedError(damage)
        return document


def _check_paths(items: Sequence[Parameter]) -> None:
    paths = [item.path for item in items]
    repeated = sorted({path for path in paths if paths.count(path) > 1})
    if repeated or not paths:
        raise ValueError(
            f"A checkpoint needs items of different paths. Received: repeated paths {repeated} in {paths}."
        )


def _check_fit(directory: Path, saved: dict[str, Stored], items: Sequence[Parameter], subset: bool) -> None:
    """Raises ValueError naming each tensor that the checkpoint and `items` disagree about."""
    problems = []
    for item in items:
        stored = saved.get(item.path)
        if stored is None:
            problems.append(f"{item.path}: requested with shape {item.shape}, not in the checkpoint")
            continue
        if stored.shape != item.shape:
            problems.append(f"{item.path}: shape {stored.shape} in the checkpoint, {item.shape} requested")
        if stored.dtype != item.dtype:
            problems.append(
                f"{item.path}: dtype {stored.dtype.name} in the checkpoint, {item.dtype.name} requested"
            )
    if not subset:
        paths = {item.path for item in items}
        problems += [
            f"{name}: in the checkpoint with shape {stored.shape}, not requested"
            for name, stored in saved.items()
            if name not in paths
        ]
    if problems:
        raise ValueError(
            f"The checkpoint {directory} does not fit the model:\n  " + "\n  ".join(problems) + "\n"
            "Use the configuration that it was trained with, or another working directory."
        )


def _remove_tree(path: Path) -> None:
    """Removes a directory if it exists. A run does not end because disk space could not be given back."""
    try:
        if is_remote(path):
            path.remove_tree()  # type: ignore[attr-defined]
        else:
            shutil.rmtree(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        logger.warning("Cannot remove %s: %s", path, error)


def _json_copy(metadata: dict) -> dict:
    try:
        copy = json.loads(json.dumps(metadata, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"metadata must be a dict that JSON can hold, without NaN ({error}). Received: {metadata}."
        ) from error
    for key in _RESERVED_METADATA:
        copy.pop(key, None)
    return copy


def _finite_or_none(loss: float | None) -> float | None:
    return float(loss) if loss is not None and math.isfinite(loss) else None


def _listed(steps) -> str:
    return ", ".join(str(step) for step in steps) or "none"
