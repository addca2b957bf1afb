"""Tables of examples to a prepared directory: vocabularies of the training data, then the ids of every split."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lmscale.data.columns import ColumnsWriter, Lists, PreparedColumns
from lmscale.data.prepared_directory import PreparedDirectoryWriter
from lmscale.data.schema import ColumnSchema, bucket, did_you_mean
from lmscale.data.table_files import read_rows
from lmscale.data.there_already import Report, describe_files, meter, there_already
from lmscale.data.token_files import SPLITS
from lmscale.data.vocab import UNK, UnnamedVocabulary, Vocabulary
from lmscale.doing import doing


def prepare_table(
    files: Mapping[str, Sequence[Path]],
    *,
    schema: Mapping[str, ColumnSchema],
    output: Path,
    overwrite: bool = False,
    report: Report = lambda phase, done, total: None,
) -> tuple[PreparedColumns, bool]:
    """Prepares a table. Numbers are scaled by nothing: scale them before, or put a layer that does into the model.

    Args:
      files: {split: paths} of CSV or TFRecord files, one after the other.
      schema: {column: `ColumnSchema`}.
      output: the directory to make.
      overwrite: whether to replace a prepared directory there.
      report: called with (phase, bytes done, bytes in all).

    Returns:
      The data, and whether it was made: not if it was there already.

    Raises:
      ValueError: where files do not hold what the schema says, with line and column; for a class that the training
        data has not; for a split without examples; as `there_already`.
    """
    options = {
        "format": "table",
        "schema": {name: dataclasses.asdict(column) for name, column in schema.items()},
    }
    num_bytes = {split: sum(path.stat().st_size for path in files[split]) for split in SPLITS}

    def inputs():
        return describe_files(files, on_bytes=meter("checking", sum(num_bytes.values()), report))

    there = there_already(
        output, open_data=PreparedColumns.open, options=options, inputs=inputs, overwrite=overwrite
    )
    if there is not None:
        return there, False
    with doing("counting the values of the training data"):
        on_bytes = meter("counting", num_bytes["train"], report)
        vocabularies = _vocabularies(files["train"], schema, on_bytes)
    with PreparedDirectoryWriter(output, replace=overwrite) as writer:
        columns = ColumnsWriter(writer)
        for name, vocabulary in vocabularies.items():
            columns.vocabulary(name, vocabulary)
        for name, column in schema.items():
            columns.column(name, column.column)
        on_bytes = meter("writing", sum(num_bytes.values()), report)
        for split in SPLITS:
            with doing(f"writing the examples of {split}"):
                values, unknown = _values(files[split], schema, vocabularies, on_bytes)
                if not len(next(iter(values.values()))):
                    raise ValueError(f"Every split must have examples. Received: none for {split}.")
                columns.split(split, values, unknown=unknown)
        columns.finish(options=options, inputs=inputs())
    return PreparedColumns.open(output), True


def _texts(value, column):
    return value if column.kind == "bag" else [value]


def _vocabularies(paths, schema, on_bytes):
    """{name: vocabulary}: of values by falling count, equal ones by code point, with `<unk>` where it is allowed."""
    counts: dict[str, Counter[str]] = {
        column.vocabulary: Counter()
        for column in schema.values()
        if column.vocabulary is not None and column.buckets is None
    }
    for path in paths:
        for _, row in read_rows(path, schema, on_bytes=on_bytes):
            for name, column in schema.items():
                if column.vocabulary in counts:
                    counts[column.vocabulary].update(_texts(row[name], column))
    found: dict[str, Vocabulary | UnnamedVocabulary] = {}
    for column in schema.values():
        if column.vocabulary is None or column.vocabulary in found:
            continue
        if column.buckets is not None:
            found[column.vocabulary] = UnnamedVocabulary(size=column.buckets)
            continue
        of_values = counts[column.vocabulary]
        ranked = sorted(
            (item for item in of_values.items() if item[1] >= column.min_count and item[0] != UNK),
            key=lambda item: (-item[1], item[0]),
        )
        if column.kind == "class":
            if column.max_size is not None or column.min_count > 1:
                dropped = len(of_values) - len(ranked[: column.max_size])
                if dropped:
                    raise ValueError(
                        f"Every class must have a row. Received: {dropped:,} classes of {column.vocabulary!r} beyond "
                        "min_count or max_size. Leave these out, or declare the column as categorical."
                    )
        else:
            if column.max_size is not None:
                del ranked[max(0, column.max_size - 1) :]
            ranked.append((UNK, sum(of_values.values()) - sum(count for _, count in ranked)))
            ranked.sort(key=lambda item: (-item[1], item[0]))
        found[column.vocabulary] = Vocabulary(
            tokens=tuple(value for value, _ in ranked),
            counts=np.array([count for _, count in ranked], np.int64),
        )
    return found


def _values(paths, schema, vocabularies, on_bytes):
    """({column: values of a split}, {column: how many of them are unknown})."""
    values: dict = {name: [] for name in schema}
    lengths: dict = {name: [0] for name, column in schema.items() if column.kind == "bag"}
    unknown = {
        name: 0
        for name, column in schema.items()
        if column.kind in ("categorical", "bag") and not column.buckets
    }
    for path in paths:
        for place, row in read_rows(path, schema, on_bytes=on_bytes):
            for name, column in schema.items():
                value = row[name]
                if column.kind == "number":
                    values[name].append(value)
                    continue
                texts = _texts(value, column)
                if column.buckets is not None:
                    ids = [bucket(text, column.buckets) for text in texts]
                else:
                    known = vocabularies[column.vocabulary].ids
                    if column.kind == "class" and texts[0] not in known:
                        raise ValueError(
                            f"{place}: each class of {name} must be one of the training data's. Received: "
                            f"{texts[0]!r}.{did_you_mean(texts[0], known)} Take the line out, or train on it."
                        )
                    ids = [known[text] for text in texts]
                    if name in unknown:
                        unknown[name] += ids.count(known[UNK])
                values[name] += ids
                if name in lengths:
                    lengths[name].append(len(ids))
    found: dict = {}
    for name, column in schema.items():
        if column.kind == "number":
            found[name] = np.array(values[name], np.float32).reshape(-1, 1)
        elif column.kind == "bag":
            found[name] = Lists(np.array(values[name], np.int64), np.cumsum(lengths[name]).astype(np.int64))
        else:
            found[name] = np.array(values[name], np.int64)
    return found, unknown
