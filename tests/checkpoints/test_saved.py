import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from array_parameters import array_parameters
from test_directory import TINY_BLOCK_MIB, flip, make_arrays, remove, save_small, truncate

from lmscale.checkpoints import format_1
from lmscale.checkpoints.directory import Checkpoints
from lmscale.checkpoints.saved import open_checkpoint

FORMAT_1 = Path(__file__).parents[1] / "runs" / "format_1"


@pytest.fixture
def workdir(tmp_path):
    """A run of 3 checkpoints, the second of which is the best."""
    for step, loss in ((10, 3.0), (20, 2.0), (30, 2.5)):
        save_small(tmp_path / "run" / "checkpoints", step, loss=loss)
    return tmp_path / "run"


def test_reads_every_tensor_whole_and_in_parts(tmp_path):
    arrays = make_arrays()
    Checkpoints(tmp_path, block_mib=TINY_BLOCK_MIB).save(7, array_parameters(arrays), metadata={"seed": 3})
    saved = open_checkpoint(tmp_path)
    assert saved.metadata == {"seed": 3, "step": 7, "validation_loss_nats": None}
    assert saved.step == 7
    assert saved.tensors == {path: (array.shape, array.dtype) for path, array in arrays.items()}
    rng = np.random.default_rng(0)
    for path, array in arrays.items():
        whole = saved.read(path)
        assert whole.dtype == array.dtype, path
        np.testing.assert_array_equal(whole, array, err_msg=path)
        if not array.ndim:
            continue
        blocks = list(saved.blocks(path))
        np.testing.assert_array_equal(np.concatenate([saved.read(path, *b) for b in blocks]), array)
        for _ in range(5):
            start, stop = np.sort(rng.integers(0, len(array) + 1, 2)).tolist()
            part = saved.read(path, start, stop)
            assert (part.dtype, part.shape) == (array.dtype, (stop - start, *array.shape[1:])), path
            np.testing.assert_array_equal(part, array[start:stop], err_msg=f"{path} [{start}, {stop})")
    assert len(list(saved.blocks("table"))) > 10
    with pytest.raises(ValueError, match=r"must lie in 0 \.\. 1003. Received: \[1000, 1004\)"):
        saved.read("table", 1000, 1004)
    with pytest.raises(ValueError, match=r"holds .*table.*Received: 'tables'"):
        saved.read("tables", 0, 1)


def test_the_newest_the_best_or_a_given_step(workdir):
    checkpoints = workdir / "checkpoints"
    assert open_checkpoint(workdir).step == 30
    assert open_checkpoint(str(workdir), best=True).step == 20
    assert open_checkpoint(checkpoints).step == 30
    saved = open_checkpoint(checkpoints / "step_00000010")
    assert saved.step == 10
    np.testing.assert_array_equal(saved.read("rows"), np.full((50, 3), 10, np.float32))
    assert saved.vocabulary_path("words") == workdir / "vocab.txt"
    with pytest.raises(ValueError, match=r"step_00000010, which is one step\. Pass the working directory"):
        open_checkpoint(checkpoints / "step_00000010", best=True)
    # Taken out of its run, under another name.
    shutil.copytree(checkpoints / "step_00000020", workdir.parent / "copy")
    assert open_checkpoint(workdir.parent / "copy").step == 20


def test_a_step_is_opened_from_inside_its_folder(workdir, monkeypatch):
    monkeypatch.chdir(workdir / "checkpoints" / "step_00000010")
    saved = open_checkpoint(".")
    assert (saved.step, saved.vocabulary_path("words")) == (10, workdir / "vocab.txt")


def test_a_run_that_goes_on_writing_is_left_alone(workdir):
    (workdir / "checkpoints" / ".step_00000040.saving").mkdir()
    names = sorted(path.name for path in workdir.rglob("*"))
    open_checkpoint(workdir).read("rows")
    assert sorted(path.name for path in workdir.rglob("*")) == names


@pytest.mark.parametrize("damage", [truncate, remove, flip])
@pytest.mark.parametrize("pattern", ["*.data-*", "*.index", "metadata.json"])
def test_a_damaged_newest_is_an_error_that_names_the_others(workdir, damage, pattern):
    damage(workdir / "checkpoints" / "step_00000030", pattern)
    with pytest.raises(
        ValueError, match=r"step_00000030 is damaged: .*step_00000010, .*step_00000020(, .*step_00000030)?\."
    ):
        open_checkpoint(workdir)
    assert open_checkpoint(workdir, best=True).step == 20


def test_where_there_is_no_checkpoint(tmp_path, workdir):
    (tmp_path / "empty").mkdir()
    for path, words in [
        (tmp_path / "absent", "no such directory"),
        (tmp_path / "empty", "none there"),
        (tmp_path / "empty" / "step_00000001", "There is no checkpoint .*step_00000001"),
        (tmp_path / "lr[0.1]", "square brackets"),
    ]:
        with pytest.raises(ValueError, match=words):
            open_checkpoint(path)
    save_small(tmp_path / "no_loss", 1)
    with pytest.raises(ValueError, match=r"with a validation loss.*Pass best=False"):
        open_checkpoint(tmp_path / "no_loss", best=True)
    with pytest.raises(ValueError, match="does not match its directory's name"):
        open_checkpoint(
            shutil.move(workdir / "checkpoints" / "step_00000010", workdir / "checkpoints" / "step_00000011")
        )


def test_format_1_has_the_paths_of_today():
    saved = open_checkpoint(FORMAT_1)
    reader = tf.train.load_checkpoint(str(FORMAT_1 / "checkpoints" / "step_00000020" / "tensors"))
    assert len(saved.tensors) == len(reader.get_variable_to_shape_map())
    for path, name in {
        "tables/words/embedding": "table/embedding",
        "tables/words/bias": "table/bias",
        "slots/tables/words/embedding/second_moment": "table/embedding/second_moment",
        "slots/tables/words/bias/last_step": "table/bias/last_step",
        "layers/lstm_0/kernel": "body/0/lstm_cell/kernel",
        "layers/lstm_1/recurrent_kernel": "body/1/lstm_cell/recurrent_kernel",
        "layers/lstm_1/seed_generator_state": "body/1/seed_generator_state",
        "layers/projection/kernel": "body/2/kernel",
        "slots/layers/lstm_0/kernel/first_moment": "body_slots/0/lstm_cell/kernel/first_moment",
        "slots/layers/projection/kernel/num_updates": "body_slots/2/kernel/num_updates",
        "state/3": "carried_state/3",
    }.items():
        np.testing.assert_array_equal(saved.read(path), reader.get_tensor(name), err_msg=path)
    assert {path.split("/")[0] for path in saved.tensors} == {"tables", "layers", "slots", "state"}
    assert saved.vocabulary_sha256("words") == saved.metadata["vocabulary_sha256"]


def test_format_1_of_other_bodies_keeps_its_names():
    names = ["body/0/gru_cell/kernel", "body/1/kernel", "body_slots/1/kernel/first_moment", "other/3"]
    assert format_1.paths(names) == {name: name for name in names}
    # Not a projection: another layer lies between it and the LSTM.
    mixed = ["body/0/lstm_cell/kernel", "body/1/beta", "body/2/kernel"]
    assert format_1.paths(mixed) == {
        "body/0/lstm_cell/kernel": "layers/lstm_0/kernel",
        "body/1/beta": "body/1/beta",
        "body/2/kernel": "body/2/kernel",
    }


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"vocabularies": {"words": "a", "tags": "b"}}, {"words": "a", "tags": "b", "output": None}),
        ({"vocabularies": {"text": "a"}}, {"words": "a"}),
        ({"vocabulary_sha256": "a"}, {"words": "a"}),
        ({}, {"words": None}),
    ],
)
def test_the_vocabulary_of_a_table(tmp_path, metadata, expected):
    arrays = {"tables/words/embedding": np.ones((5, 3), np.float32)}
    Checkpoints(tmp_path).save(1, array_parameters(arrays), metadata=metadata)
    saved = open_checkpoint(tmp_path)
    assert {table: saved.vocabulary_sha256(table) for table in expected} == expected
