"""Writes a run as a SavedModel, which TensorFlow serves without lmscale."""

import dataclasses
import os
import shutil
from pathlib import Path

import tensorflow as tf

from lmscale.assembly import make_task
from lmscale.checkpoints import document
from lmscale.checkpoints.directory import Checkpoints
from lmscale.checkpoints.saved import open_checkpoint
from lmscale.data.prepared import open_prepared
from lmscale.data.token_files import PreparedData
from lmscale.data.vocab import UNK
from lmscale.doing import doing
from lmscale.serving.model import ServedModel
from lmscale.serving.signatures import Signatures, Words, available


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """What a SavedModel serves, and how.

    Attributes:
      signatures: names; None for all that the task has.
      table: table of the signature `embed`; None for that of the head.
      batch_size: examples that are computed at a time.
      length: words or items of an example at most; None for the window of the run's evaluations.
      k: words or items that are returned for an example.
      int8: rows in int8 with a scale a row.
    """

    signatures: tuple[str, ...] | None = None
    table: str | None = None
    batch_size: int = 8
    length: int | None = None
    k: int = 10
    int8: bool = False


def open_run(workdir, checkpoint):
    """The `SavedCheckpoint` of a run.

    Args:
      workdir: `Workdir`.
      checkpoint: a step as a string, "latest" or "best".

    Raises:
      ValueError: if there is none, or a damaged one.
    """
    if checkpoint.isdecimal():
        checkpoints = Checkpoints(workdir.checkpoints_dir, readonly=True)
        return open_checkpoint(checkpoints.step_directory(int(checkpoint)))
    return open_checkpoint(workdir.path, best=checkpoint == "best")


def export(experiment, *, saved, output, settings):
    """Writes the SavedModel, under another name beside it until it is whole: servers load what appears.

    Args:
      experiment: `Experiment` of the run.
      saved: `SavedCheckpoint` of it.
      output: folder to make.
      settings: `ExportSettings`.

    Returns:
      {"step", "signatures", "bytes": of all files}.

    Raises:
      ValueError: for a folder that holds something, a signature or table that the task has not, a checkpoint that does
        not fit the experiment or its data, and experiments whose averages would be evaluated.
    """
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output must be new or empty. Received: {output}. Choose another folder.")
    if experiment.evaluate_averages:
        raise ValueError(
            "A run whose averages are evaluated cannot be exported: they are kept beside its weights. Received: "
            'evaluate_averages=True. Pass --gin_param="experiment.Experiment.evaluate_averages=False" for its weights.'
        )
    with doing(f"reading the data of {experiment.data_dir}"):
        data = open_prepared(experiment.data_dir, with_words=False)
    task = make_task(experiment, data=data, num_replicas=1, training=False)
    names = _checked_signatures(settings.signatures, task)
    of_heads = list(dict.fromkeys(head.table for head in task.heads.values()))
    table = settings.table or of_heads[0]
    if table not in task.tables:
        raise ValueError(f"The table must be one of the run's, {', '.join(task.tables)}. Received: {table}.")
    if "embed" in names and task.tables[table].vocabulary not in data.vocabulary_files:
        raise ValueError(
            f"The rows of the table that embed reads must have words. Received: {table}, whose rows are numbers. Pass "
            "another --table."
        )
    tables = {table} if names == ["embed"] else {table, *task.tables}
    for name in sorted(tables):
        told = document.vocabulary_sha256(saved.metadata, name)
        if told not in (None, task.vocabularies[name].sha256):
            raise ValueError(
                "A model must be exported with the vocabulary it was trained with. Received: "
                f"{experiment.data_dir}, where that of the table {name!r} is another one. Set DATA_DIR."
            )
    with doing("reading the checkpoint"):
        model = ServedModel(task, saved, tables=sorted(tables), int8=settings.int8)
    files = {name: data.vocabulary_files.get(task.tables[name].vocabulary) for name in sorted(tables)}
    vocabularies = {
        name: Words(path, unknown_id=_unknown_id(data, task.vocabularies[name]))
        for name, path in files.items()
        if path is not None
    }
    length = settings.length or getattr(task, "eval_window", None) or 1
    signatures = Signatures(
        model, vocabularies, table=table, batch_size=settings.batch_size, length=length, k=settings.k
    )
    # What is saved is found from here.
    signatures.parts = [model, *vocabularies.values()]
    with doing("writing the SavedModel"):
        _save(signatures, names, output)
    return {
        "step": saved.step,
        "signatures": names,
        "bytes": sum(path.stat().st_size for path in output.rglob("*") if path.is_file()),
    }


def _save(signatures, names, output):
    """Writes a folder that is whole or not there; but into a mount point, which cannot be put in place."""
    output = Path(os.path.realpath(output))
    if output.is_mount():
        tf.saved_model.save(signatures, str(output), signatures=signatures.functions(names))
        return
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # What a killed export has left.
    try:
        tf.saved_model.save(signatures, str(partial), signatures=signatures.functions(names))
        os.replace(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _unknown_id(data, vocabulary):
    """What words that are not in a vocabulary have for an id: that of `<unk>`, or -1."""
    if isinstance(data, PreparedData):
        return data.unk_id
    return vocabulary.ids.get(UNK, -1)


def _checked_signatures(names, task):
    known = available(task)
    for name in names or ():
        if name not in known:
            raise ValueError(
                f"A signature must be one that the task {type(task).__name__} has: {', '.join(known)}. Received: "
                f"{name!r}."
            )
    return list(names or known)
