"""Rows of a table from CSV and TFRecord files, as {column: value} with the place where each stands."""

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from lmscale.data.schema import ColumnSchema, parse_number
from lmscale.data.text_files import read_blocks

_RECORD_ENDINGS = (".tfrecord", ".tfrecords")


def read_rows(
    path: Path, schema: Mapping[str, ColumnSchema], *, on_bytes: Callable[[int], None] = lambda count: None
) -> Iterator[tuple[str, dict]]:
    """(place, {column: text, list of texts, or float}) of each row.

    Args:
      path: a CSV file with a header, plain, gzip or xz; or a TFRecord file of `tf.train.Example`.
      schema: what is read; other columns are left.
      on_bytes: called with the bytes that have been read.

    Raises:
      ValueError: with file, line and column, where the file does not hold what the schema says.
    """
    if path.suffix in _RECORD_ENDINGS:
        yield from _read_records(path, schema, on_bytes)
    else:
        yield from _read_csv(path, schema, on_bytes)


def _read_csv(path, schema, on_bytes):
    def lines():
        for block in read_blocks(path, on_bytes=on_bytes):
            if not block.ends_line:
                raise ValueError(
                    f"{path}: a line is too long for a table. Received: {block.lines[-1][:60]!r}..."
                )
            # With its end, which is part of a value in quotes that goes on in the next line.
            yield from (f"{line}\n" for line in block.lines)

    reader = csv.reader(lines(), strict=True)
    try:
        header = next(reader)
        missing = [name for name in schema if name not in header]
        if missing:
            raise ValueError(
                f"{path}, line 1: the header must name each column of the schema. Received: {', '.join(header)}; "
                f"missing: {', '.join(missing)}. Correct the schema, or the header."
            )
        if len(set(header)) < len(header):
            raise ValueError(
                f"{path}, line 1: the header must name a column once. Received: {', '.join(header)}."
            )
        places = {name: header.index(name) for name in schema}
        for fields in reader:
            place = f"{path}, line {reader.line_num:,}"
            if len(fields) != len(header):
                raise ValueError(
                    f"{place}: must have {len(header)} fields, as the header. Received: {len(fields)}, {fields!r:.80}."
                )
            yield (
                place,
                {name: _value(fields[places[name]], column, place, name) for name, column in schema.items()},
            )
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num:,}: must be CSV. Received: {error}.") from error


def _value(text, column, place, name):
    if column.kind == "number":
        return _number(text, place, name)
    if column.kind == "bag":
        return [_checked(value, place, name) for value in text.split(column.separator) if value]
    return _checked(text, place, name)


def _number(value, place, name):
    try:
        return parse_number(value)
    except ValueError as error:
        raise ValueError(
            f"{place}: {name} must be a finite number, also in float32. Received: {value!r}."
        ) from error


def _checked(value, place, name):
    if not value or value.split() != [value]:
        raise ValueError(
            f"{place}: {name} must be a value without white space. Received: {value!r}. Write - for none, say."
        )
    return value


def _read_records(path, schema, on_bytes):
    import tensorflow as tf

    _check_whole(path)
    number = 0
    try:
        for number, record in enumerate(tf.data.TFRecordDataset(str(path)).as_numpy_iterator(), start=1):
            place = f"{path}, record {number:,}"
            features = tf.train.Example.FromString(record).features.feature
            row = {}
            for name, column in schema.items():
                if name not in features:
                    raise ValueError(
                        f"{place}: must have each column of the schema. Received: {', '.join(sorted(features))}; "
                        f"missing: {name}."
                    )
                row[name] = _feature(features[name], column, place, name)
            yield place, row
            on_bytes(len(record))
    except (tf.errors.DataLossError, tf.errors.OpError) as error:
        raise ValueError(
            f"{path}, after record {number:,}: must be a TFRecord file. Received: {error.message}."
        ) from error


def _check_whole(path):
    """Raises ValueError where the last record is cut off, which TensorFlow takes for the end if little is left."""
    size, place, number = path.stat().st_size, 0, 0
    with path.open("rb") as file:
        while place < size:
            file.seek(place)
            header = file.read(8)
            # Length, its checksum, the record and its checksum.
            place += 8 + 4 + int.from_bytes(header, "little") + 4
            if len(header) < 8 or place > size:
                raise ValueError(
                    f"{path}, after record {number:,}: must be a TFRecord file, whole. Received: {size:,} bytes, the "
                    "last of which are no record. Copy it again."
                )
            number += 1


def _feature(feature, column, place, name):
    kind = feature.WhichOneof("kind")
    values: Sequence = getattr(feature, kind).value if kind else ()
    if column.kind == "number":
        if kind not in ("float_list", "int64_list") or len(values) != 1:
            raise ValueError(f"{place}: {name} must be one number. Received: {kind} of {len(values)} values.")
        return _number(values[0], place, name)
    if kind == "float_list":
        raise ValueError(f"{place}: {name} must be texts or whole numbers. Received: {kind}.")
    try:
        texts = [value.decode() if isinstance(value, bytes) else str(value) for value in values]
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: {name} must be UTF-8. Received: {error.object!r}.") from error
    if column.kind == "bag":
        return [_checked(text, place, name) for text in texts]
    if len(texts) != 1:
        raise ValueError(
            f"{place}: {name} must be one value. Received: {len(texts)}. Declare it as a bag, say."
        )
    return _checked(texts[0], place, name)
