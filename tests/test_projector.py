"""What TensorBoard's projector serves of the folders that are written for it."""

import json

import numpy as np
import pytest
from google.protobuf import text_format
from tensorboard.backend import application
from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
from tensorboard.plugins import base_plugin
from tensorboard.plugins.projector import ProjectorConfig, projector_plugin
from werkzeug import test as werkzeug_test

from lmscale.projector import write_projector

DIM = 7


class Projector:
    """TensorBoard's own plugin over a log directory, behind its WSGI application."""

    def __init__(self, logdir):
        multiplexer = plugin_event_multiplexer.EventMultiplexer()
        multiplexer.AddRunsFromDirectory(str(logdir))
        multiplexer.Reload()
        provider = data_provider.MultiplexerDataProvider(multiplexer, str(logdir))
        context = base_plugin.TBContext(logdir=str(logdir), data_provider=provider)
        plugin = projector_plugin.ProjectorPlugin(context)
        self._client = werkzeug_test.Client(application.TensorBoardWSGI([plugin]))

    def get(self, route, **query):
        response = self._client.get(f"/data/plugin/projector/{route}", query_string=query)
        assert response.status_code == 200, response.data
        return response.data


def random_rows(number, *, seed=0):
    """[(word, count, vector)]; words of other scripts and signs, numbers of all sizes."""
    rng = np.random.default_rng(seed)
    words = ["žluťoučký", '"', "#", "日本", *(f"w{i}" for i in range(4, number))][:number]
    vectors = rng.normal(size=[number, DIM]).astype(np.float32) * 10.0 ** rng.integers(-30, 30, [number, DIM])
    return [(w, 1000 - i, v.astype(np.float32)) for i, (w, v) in enumerate(zip(words, vectors, strict=True))]


def test_tensorboard_serves_what_was_written(tmp_path):
    rows, others = random_rows(31), random_rows(5, seed=1)
    assert write_projector(tmp_path / "a" / "log", iter(rows), name="words", dim=DIM) == 31
    write_projector(tmp_path / "a" / "log", others, name="contexts", dim=DIM)
    projector = Projector(tmp_path / "a" / "log")
    assert json.loads(projector.get("runs")) == ["."]
    served = json.loads(projector.get("info", run="."))["embeddings"]
    assert [(e["tensorName"], e["tensorShape"]) for e in served] == [
        ("words", [31, DIM]),
        ("contexts", [5, DIM]),
    ]
    for name, expected in (("words", rows), ("contexts", others)):
        tensor = np.frombuffer(projector.get("tensor", run=".", name=name), np.float32).reshape(-1, DIM)
        np.testing.assert_array_equal(tensor, [vector for _, _, vector in expected])
        lines = projector.get("metadata", run=".", name=name).decode().splitlines()
        assert lines == ["word\tcount", *(f"{word}\t{count}" for word, count, _ in expected)]
        # The page asks for as many rows of both.
        assert len(projector.get("metadata", run=".", name=name, num_rows=3).decode().splitlines()) == 1 + 3
    assert sorted(path.name for path in (tmp_path / "a" / "log").iterdir()) == sorted(
        [
            "projector_config.pbtxt",
            *(f"{n}.{k}.tsv" for n in ("words", "contexts") for k in ("vectors", "words")),
        ]
    )


def test_the_same_name_is_replaced(tmp_path):
    for number in (9, 4):
        write_projector(tmp_path, random_rows(number), name="words", dim=DIM)
    config = text_format.Parse((tmp_path / "projector_config.pbtxt").read_text(), ProjectorConfig())
    assert [list(e.tensor_shape) for e in config.embeddings] == [[4, DIM]]
    assert len(Projector(tmp_path).get("tensor", run=".", name="words")) == 4 * DIM * 4


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("a", 1, [1, 2])], r"must be 7 finite numbers. Received: \[1. 2.\] of 'a'"),
        ([("a", 1, [1, 2, 3, 4, 5, 6, np.nan])], r"must be 7 finite numbers. Received: .*nan"),
        ([], "There must be vectors for the projector. Received: none"),
    ],
)
def test_what_cannot_be_shown_changes_nothing(tmp_path, rows, message):
    write_projector(tmp_path, random_rows(4), name="words", dim=DIM)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=message):
        write_projector(tmp_path, rows, name="words", dim=DIM)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_folders_that_are_none(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"needs a folder. Received: .*file, which is a file"):
        write_projector(tmp_path / "file", random_rows(4), name="words", dim=DIM)
    (tmp_path / "projector_config.pbtxt").write_text("embeddings { no_such_field: 1 }")
    with pytest.raises(
        ValueError, match=r"must be the configuration of a projector. Received: .*no_such_field"
    ):
        write_projector(tmp_path, random_rows(4), name="words", dim=DIM)
