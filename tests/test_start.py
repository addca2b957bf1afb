"""Pretrained vectors and a warm start in one run."""

import types

import numpy as np
import pytest
from array_parameters import array_parameters

from lmscale.checkpoints.directory import Checkpoints
from lmscale.data.vocab import EOS, UNK, Vocabulary
from lmscale.parameters.pretrained import PretrainedVectors
from lmscale.parameters.warm_start import WarmStart
from lmscale.start import report_names, start_from_elsewhere
from lmscale.tables.table_config import TableConfig

PATH = "tables/words/embedding"


def vocabulary(*words):
    return Vocabulary(tokens=(UNK, EOS, *words), counts=np.arange(len(words) + 2, 0, -1))


@pytest.fixture
def start(tmp_path):
    """Starts a run of the words a, b and c from vectors of b and c and from a run of a and b; its rows and reports."""
    old = vocabulary("b", "a")
    arrays = {PATH: np.full([4, 3], 1, np.float32), "layers/lstm_0/bias": np.ones([3], np.float32)}
    Checkpoints(tmp_path / "checkpoints").save(7, array_parameters(arrays), metadata={})
    (tmp_path / "vocab.txt").write_text(old.to_text())
    vectors = tmp_path / "vectors.txt"
    vectors.write_text("b 2 2 2\nc 2 2 2\n")

    def start(**settings):
        rows = np.zeros([5, 3], np.float32)
        parameters = array_parameters({PATH: rows, "layers/lstm_0/bias": np.zeros([3], np.float32)})
        config = TableConfig(embed_dim=3, pretrained=PretrainedVectors(path=str(vectors)))
        trainer = types.SimpleNamespace(
            parameters=lambda: parameters,
            task=types.SimpleNamespace(
                tables={"words": config}, vocabularies={"words": vocabulary("c", "a", "b")}
            ),
            model=types.SimpleNamespace(earlier_updates=None),
        )
        warm_start = WarmStart(checkpoint=str(tmp_path), **settings)
        reports = start_from_elsewhere(types.SimpleNamespace(warm_start=warm_start), trainer)
        assert trainer.model.earlier_updates == {}  # No slots.
        assert list(reports) == report_names(trainer.task) == ["pretrained_words", "warm_start"]
        return rows[:, 0].tolist()

    return start


def test_new_words_keep_their_vectors(start):
    assert start(rows_by_word=True) == [1, 1, 2, 1, 1]


def test_vectors_alone_for_the_rows(start):
    assert start(rename=[(PATH, None), (".*", r"\g<0>")]) == [0, 0, 2, 0, 2]


@pytest.mark.parametrize("new_rows", ["mean", "pieces"])
def test_vectors_of_which_nothing_would_be_left_are_refused(start, new_rows):
    with pytest.raises(ValueError, match=rf"replaces all rows of it\. Put \('{PATH}', None\) first"):
        start(rows_by_word=True, new_rows=new_rows)
