"""Tables of CSV and TFRecord files: what is prepared, by hand; and what is refused, with its place."""

import json

import numpy as np
import pytest
import tensorflow as tf

from lmscale.data.columns import PreparedColumns
from lmscale.data.schema import bucket, read_schema
from lmscale.data.table_preparation import prepare_table

SCHEMA = {
    "town": {"kind": "categorical", "min_count": 2},
    "tags": {"kind": "bag", "separator": ";"},
    "device": {"kind": "categorical", "buckets": 7},
    "age": {"kind": "number"},
    "label": {"kind": "class"},
}
ROWS = {
    "train": [
        ("rome", "red;blue", "x1", 1.5, "a"),
        ("oslo", "", "x2", -2, "b"),
        ("rome", "red", "x3", 0, "a"),
        ("lima", "green;red", "x1", 7, "c"),
        ("oslo", "blue;blue", "x9", 2.25, "a"),
    ],
    "valid": [("lima", "pink;red", "x1", 3, "c"), ("oslo", "green", "x5", 1, "b")],
    "test": [("rome", "", "x2", 4, "a")],
}
COLUMNS = ("town", "tags", "device", "age", "label")


def csv_text(rows, header=("other", *COLUMNS)):
    return "\n".join([",".join(header), *(",".join(map(str, ("zz", *row))) for row in rows), ""])


def write_records(path, rows):
    def feature(value):
        if isinstance(value, list):
            return tf.train.Feature(bytes_list=tf.train.BytesList(value=[v.encode() for v in value]))
        if isinstance(value, str):
            return feature([value])
        return tf.train.Feature(float_list=tf.train.FloatList(value=[value]))

    with tf.io.TFRecordWriter(str(path)) as writer:
        for town, tags, device, age, label in rows:
            values = (town, tags.split(";") if tags else [], device, float(age), label)
            features = {name: feature(value) for name, value in zip(COLUMNS, values, strict=True)}
            example = tf.train.Example(features=tf.train.Features(feature=features))
            writer.write(example.SerializeToString())


def prepared(tmp_path, *, rows=None, schema=None, name="out", texts=None, **settings):
    path = tmp_path / "schema.json"
    path.write_text(json.dumps({"columns": schema or SCHEMA}))
    files = {}
    for split, of_split in (rows or ROWS).items():
        files[split] = [tmp_path / f"{split}.csv"]
        files[split][0].write_text((texts or {}).get(split) or csv_text(of_split))
    return prepare_table(files, schema=read_schema(path), output=tmp_path / name, **settings)


@pytest.fixture
def data(tmp_path):
    return prepared(tmp_path)[0]


def test_values(data):
    towns, tags, labels = (data.vocabularies[name].tokens for name in ("town", "tags", "label"))
    assert towns == ("oslo", "rome", "<unk>")  # lima once: unknown.
    assert data.vocabularies["town"].counts.tolist() == [2, 2, 1]
    assert tags == ("blue", "red", "green", "<unk>")
    assert labels == ("a", "b", "c")
    for split, rows in ROWS.items():
        found = [towns[i] for i in data.column(split, "town")]
        assert found == [row[0] if row[0] != "lima" else "<unk>" for row in rows]
        assert [labels[i] for i in data.column(split, "label")] == [row[4] for row in rows]
        np.testing.assert_array_equal(data.column(split, "age"), [[row[3]] for row in rows])
        assert data.column(split, "device").tolist() == [bucket(row[2], 7) for row in rows]
        lists = data.column(split, "tags")
        for i, row in enumerate(rows):
            own = [tags[j] for j in lists.values[lists.offsets[i] : lists.offsets[i + 1]]]
            assert own == [tag if tag in tags else "<unk>" for tag in row[1].split(";") if tag]
    assert data.manifest["splits"]["valid"]["unknown"] == {"town": 1, "tags": 1}
    assert len(data.vocabularies["device"]) == 7


def test_records_hold_what_csv_files_hold(data, tmp_path):
    path = tmp_path / "schema.json"
    files = {split: [tmp_path / f"{split}.tfrecord"] for split in ROWS}
    for split, rows in ROWS.items():
        write_records(files[split][0], rows)
    other, _ = prepare_table(files, schema=read_schema(path), output=tmp_path / "records")
    assert other.fingerprint == data.fingerprint
    with files["valid"][0].open("ab") as file:
        file.write(b"cut off")
    with pytest.raises(ValueError, match=r"valid\.tfrecord, after record 2: must be a TFRecord file"):
        prepare_table(files, schema=read_schema(path), output=tmp_path / "damaged")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (b"", "record 1: tags must be a value without white space. Received: ''"),
        (b"new\tyork", r"tags must be a value without white space. Received: 'new\\tyork'"),
        (b"\xff", r"record 1: tags must be UTF-8. Received: b'\\xff'"),
    ],
)
def test_refused_values_of_records(tmp_path, value, message):
    """Such as would make a vocabulary that cannot be read."""
    path = tmp_path / "schema.json"
    path.write_text(json.dumps({"columns": {"tags": {"kind": "bag"}}}))
    feature = tf.train.Feature(bytes_list=tf.train.BytesList(value=[b"red", value]))
    example = tf.train.Example(features=tf.train.Features(feature={"tags": feature}))
    with tf.io.TFRecordWriter(str(tmp_path / "all.tfrecord")) as writer:
        writer.write(example.SerializeToString())
    files = {split: [tmp_path / "all.tfrecord"] for split in ROWS}
    with pytest.raises(ValueError, match=message):
        prepare_table(files, schema=read_schema(path), output=tmp_path / "out")


def test_a_number_of_records_that_is_none(tmp_path):
    path = tmp_path / "schema.json"
    path.write_text(json.dumps({"columns": {"age": {"kind": "number"}}}))
    feature = tf.train.Feature(float_list=tf.train.FloatList(value=[float("nan")]))
    example = tf.train.Example(features=tf.train.Features(feature={"age": feature}))
    with tf.io.TFRecordWriter(str(tmp_path / "all.tfrecord")) as writer:
        writer.write(example.SerializeToString())
    files = {split: [tmp_path / "all.tfrecord"] for split in ROWS}
    with pytest.raises(ValueError, match=r"all\.tfrecord, record 1: age must be a finite number.*nan"):
        prepare_table(files, schema=read_schema(path), output=tmp_path / "out")


def test_the_same_again(data, tmp_path):
    assert not prepared(tmp_path)[1]
    assert PreparedColumns.open(data.directory).fingerprint == data.fingerprint
    with pytest.raises(ValueError, match="holds other data: other input files"):
        prepared(tmp_path, rows=ROWS | {"test": ROWS["valid"]})
    assert prepared(tmp_path, rows=ROWS | {"test": ROWS["valid"]}, overwrite=True)[1]


HEADER = ",".join(("other", *COLUMNS))


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (
            {"valid": f"{HEADER}\nz,rome,red,x,old,a\n"},
            r"valid\.csv, line 2: age must be a finite number.*'old'",
        ),
        (
            {"test": f"{HEADER}\nz,rome,red,x,nan,a\n"},
            r"test\.csv, line 2: age must be a finite number.*'nan'",
        ),
        ({"test": f"{HEADER}\nz,rome,red,x,-1e39,a\n"}, "line 2: age must be a finite number.*'-1e39'"),
        ({"valid": f"{HEADER}\nz,rome,red,x,1\n"}, r"line 2: must have 6 fields, as the header. Received: 5"),
        ({"train": f"{HEADER},town\n"}, "the header must name a column once"),
        (
            {"train": "other,town,tags,device,age\nz,a,b,c,1\n"},
            "line 1: the header must name each column.*missing: label",
        ),
        ({"test": f"{HEADER}\n"}, "Every split must have examples. Received: none for test"),
        ({"valid": f"{HEADER}\nz,,red,x,1,a\n"}, "line 2: town must be a value without white space"),
        (
            {"train": f"{HEADER}\nz,rome,red;\tblue,x,1,a\n"},
            r"line 2: tags must be a value without white space. Received: '\\tblue'",
        ),
        (
            {"valid": f'{HEADER}\nz,"new\nyork",red,x,1,a\n'},
            r"line 3: town must be a value without white space. Received: 'new\\nyork'",
        ),
        ({"test": f'{HEADER}\nz,rome,red,x,"1\n2",a\n'}, r"line 3: age must be a finite number.*'1\\n2'"),
        (
            {"valid": f"{HEADER}\nz,rome,red,x,1,a\nz,rome,red,x,1,aa\n"},
            r"line 3: each class of label must be one of the training data's. Received: 'aa'. Did you mean 'a'\?",
        ),
    ],
)
def test_refused_rows(tmp_path, texts, message):
    with pytest.raises(ValueError, match=message):
        prepared(tmp_path, texts=texts)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"town": {"kind": "town"}}, "the column 'town': kind must be one of categorical"),
        (
            {"town": {"kind": "categorical", "size": 3}},
            "the column 'town' must have kind, and of .* no others",
        ),
        ({"town": {"kind": "categorical", "buckets": 0}}, "buckets must be a whole number from 1 on"),
        ({"label": {"kind": "class", "buckets": 3}}, "A class must not be hashed"),
        (
            {"town": {"kind": "categorical", "vocabulary": ["tags"]}},
            r"the column 'town': vocabulary must be letters.*Received: \['tags'\]",
        ),
        ({"town": {"kind": "categorical", "vocabulary": "../tags"}}, r"vocabulary must be letters"),
        ({"tags": {"kind": "bag", "separator": 5}}, r"column 'tags': separator must be a text.*Received: 5"),
        ({"tags": {"kind": "bag", "separator": ""}}, r"separator must be a text, not empty. Received: ''"),
        ({"a b": {"kind": "number"}}, "a column's name must be letters"),
        (
            {"town": {"kind": "number", "vocabulary": "a"}},
            "A number has no vocabulary. Received: vocabulary='a'",
        ),
        ({"town": {"kind": "number", "buckets": 7}}, "A number has no vocabulary. Received: buckets=7"),
        ({"town": {"kind": "number", "min_count": 2}}, "A number has no vocabulary. Received: min_count=2"),
        (
            {"town": {"kind": "categorical", "vocabulary": "tags"}, "tags": {"kind": "bag", "min_count": 9}},
            "must agree",
        ),
    ],
)
def test_refused_schemas(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        prepared(tmp_path, schema=SCHEMA | change)


def test_a_column_that_is_there_twice(tmp_path):
    """JSON itself keeps the last."""
    path = tmp_path / "schema.json"
    path.write_text('{"columns": {"town": {"kind": "categorical"}, "town": {"kind": "bag"}}}')
    with pytest.raises(
        ValueError, match=r"schema\.json must be JSON. Received: the key 'town' is there twice"
    ):
        read_schema(path)


def test_columns_may_share_a_vocabulary(tmp_path):
    schema = {
        "town": {"kind": "categorical", "vocabulary": "all"},
        "tags": {"kind": "bag", "separator": ";", "vocabulary": "all"},
    }
    data, _ = prepared(tmp_path, schema=schema)
    assert set(data.vocabularies) == {"all"}
    assert set(data.vocabularies["all"].tokens) == {"rome", "oslo", "lima", "red", "blue", "green", "<unk>"}
