import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf
from array_parameters import array_parameter, array_parameters, callback_parameter

from lmscale.checkpoints import document as documents
from lmscale.checkpoints.directory import Checkpoints

REPOSITORY = Path(__file__).parents[2]
TINY_BLOCK_MIB = 1e-3


def make_arrays(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "table": rng.normal(size=(1003, 7)).astype(np.float32),
        "table/bfloat16": rng.normal(size=(1003, 7)).astype(ml_dtypes.bfloat16),
        "cube": rng.normal(size=(97, 3, 5)),
        "counts": rng.integers(-(2**62), 2**62, size=1501),
        "mask": rng.integers(0, 2, size=(1999,)).astype(bool),
        "bytes": rng.integers(0, 255, size=(11, 300)).astype(np.uint8),
        "rng": rng.integers(0, 2**32, size=(2, 300), dtype=np.uint32),
        "half": rng.normal(size=(900, 2)).astype(np.float16),
        "wide_row": rng.normal(size=(3, 2000)).astype(np.float32),
        "step": np.array(rng.integers(2**40)),
        "done": np.array(True),
        "scale": np.array(rng.normal(), ml_dtypes.bfloat16),
        "empty": np.zeros((0, 4), np.float32),
        "no_columns": np.zeros((4, 0), np.float32),
    }


def zeros_like(arrays):
    return {name: np.zeros_like(array) for name, array in arrays.items()}


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        assert actual[name].dtype == array.dtype, name
        np.testing.assert_array_equal(actual[name], array, err_msg=name)


def save_small(directory, step, *, loss=None, value=None, **kwargs):
    """Saves [50, 3] rows which all hold `value`, the step unless given."""
    rows = np.full((50, 3), step if value is None else value, np.float32)
    checkpoints = Checkpoints(directory, block_mib=2e-4, **kwargs)
    return checkpoints.save(
        step, [array_parameter("rows", rows)], metadata={"tokens": step * 10}, validation_loss_nats=loss
    )


def restore_small(directory, **kwargs):
    """Returns the value that all rows hold, and the metadata."""
    rows = np.full((50, 3), np.nan, np.float32)
    metadata = Checkpoints(directory).restore([array_parameter("rows", rows)], **kwargs)
    assert metadata is None or (rows == rows[0, 0]).all()
    return rows[0, 0], metadata


def hidden_names(directory):
    return [path.name for path in Path(directory).iterdir() if path.name.startswith(".")]


def test_stock_tensorflow_reads_whole_tensors(tmp_path):
    arrays = make_arrays()
    path = Checkpoints(tmp_path, block_mib=TINY_BLOCK_MIB).save(7, array_parameters(arrays), metadata={})
    reader = tf.train.load_checkpoint(path)
    assert sorted(reader.get_variable_to_shape_map()) == sorted(arrays)
    assert_same({name: reader.get_tensor(name) for name in arrays}, arrays)


@pytest.mark.parametrize("block_mib", [TINY_BLOCK_MIB / 3, 1])
def test_restore_with_another_block_size(tmp_path, block_mib):
    arrays = make_arrays()
    Checkpoints(tmp_path, block_mib=TINY_BLOCK_MIB).save(
        7, array_parameters(arrays), metadata={"seed": 3, "name": "é"}, validation_loss_nats=np.float32(2.5)
    )
    restored = zeros_like(arrays)
    metadata = Checkpoints(tmp_path, block_mib=block_mib).restore(array_parameters(restored))
    assert metadata == {"seed": 3, "name": "é", "step": 7, "validation_loss_nats": 2.5}
    assert_same(restored, arrays)


def test_blocks_are_passed_in_order_each_row_once(tmp_path):
    arrays = make_arrays()
    reads, writes = [], []
    checkpoints = Checkpoints(tmp_path, block_mib=TINY_BLOCK_MIB)
    checkpoints.save(7, array_parameters(arrays, log=reads), metadata={})
    checkpoints.restore(array_parameters(zeros_like(arrays), log=writes))
    assert writes == reads
    assert list(dict.fromkeys(name for name, _, _ in reads)) == list(arrays)
    for name, array in arrays.items():
        blocks = [(start, stop) for other, start, stop in reads if other == name]
        rows = len(array) if array.ndim else 1
        assert blocks[0][0] == 0
        assert blocks[-1][1] == rows
        assert all(before[1] == after[0] for before, after in itertools.pairwise(blocks))
    table_rows_per_block = int(TINY_BLOCK_MIB * 2**20) // (7 * 4)
    assert ("table", 0, table_rows_per_block) in reads


def test_small_tensors_share_files(tmp_path):
    arrays = {f"small_{i}": np.full((3,), i) for i in range(40)}
    Checkpoints(tmp_path).save(1, array_parameters(arrays), metadata={})
    assert sorted(path.name for path in (tmp_path / "step_00000001").iterdir()) == [
        "metadata.json",
        "tensors.data-00000-of-00001",
        "tensors.index",
    ]


def test_memory_is_bounded_by_the_block(tmp_path):
    """400 MiB generated on the fly, in a process of its own: the peak grows by some three blocks of 8 MiB."""
    script = """
        import sys
        import numpy as np
        from pathlib import Path
        from lmscale.checkpoints.directory import Checkpoints
        from array_parameters import callback_parameter

        def peak_mib():
            return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024

        def row_numbers(start, stop):
            return np.repeat(np.arange(start, stop, dtype=np.float32)[:, None], 256, axis=1)

        def check(start, rows):
            assert (rows[:, 255] == np.arange(start, start + len(rows))).all()
            restored_rows.append(len(rows))

        def item(rows):
            return callback_parameter("t", (rows, 256), np.float32, read=row_numbers, write=check)

        restored_rows = []
        Checkpoints(sys.argv[1] + "/warm").save(1, [item(5)], metadata={})
        Checkpoints(sys.argv[1] + "/warm").restore([item(5)])
        before = peak_mib()
        checkpoints = Checkpoints(sys.argv[1] + "/large", block_mib=8)
        checkpoints.save(1, [item(400 * 1024)], metadata={})
        checkpoints.restore([item(400 * 1024)])
        assert sum(restored_rows) == 5 + 400 * 1024
        print(peak_mib() - before)
    """
    grown_mib = float(run_python(script, tmp_path))
    shutil.rmtree(tmp_path / "large")
    assert grown_mib < 5 * 8


def run_python(script, *arguments):
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY / "tests"),
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "CUDA_VISIBLE_DEVICES": "",
        "MALLOC_ARENA_MAX": "1",  # Arenas of threads keep what was freed in them, as many as there happen to be.
    }
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    completed = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert completed.returncode == 0, completed.stderr
    return completed.stdout


def test_a_save_killed_anywhere_loses_nothing(tmp_path):
    """SIGKILL before each file operation of a save that replaces a checkpoint and removes an older one."""
    save_small(tmp_path / "start", 10)
    save_small(tmp_path / "start", 20, value=1)
    (tmp_path / "runs").mkdir()
    # Children are forked from a process that has imported TensorFlow and run nothing: fast, and safe.
    script = """
        import os, shutil, signal, sys
        import tensorflow as tf
        from tests.checkpoints.test_directory import save_small

        def run(directory, kill_at):
            calls = 0
            def killing(function):
                def counted(*args, **kwargs):
                    nonlocal calls
                    calls += 1
                    if calls > kill_at:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return function(*args, **kwargs)
                return counted
            for name in ("SaveV2", "MergeV2Checkpoints"):
                setattr(tf.raw_ops, name, killing(getattr(tf.raw_ops, name)))
            for name in ("fsync", "mkdir", "unlink", "rmdir", "rename", "replace"):
                setattr(os, name, killing(getattr(os, name)))
            save_small(directory, 20, value=2, keep=1)
            os._exit(0)

        start, runs = sys.argv[1:]
        for kill_at in range(200):
            directory = f"{runs}/{kill_at:03d}"
            shutil.copytree(start, directory)
            child = os.fork()
            if child == 0:
                run(directory, kill_at)
            _, status = os.waitpid(child, 0)
            if not os.WIFSIGNALED(status):
                assert os.WEXITSTATUS(status) == 0
                break
            assert os.WTERMSIG(status) == signal.SIGKILL
        print(kill_at)
    """
    num_killed = int(run_python(script, tmp_path / "start", tmp_path / "runs"))
    assert 10 < num_killed < 199
    values = []
    for directory in sorted((tmp_path / "runs").iterdir()):
        value, metadata = restore_small(directory)
        values.append(value)
        assert metadata["step"] == 20
        steps = Checkpoints(directory).steps()
        assert sorted(path.name for path in directory.iterdir()) == [f"step_{step:08d}" for step in steps]
        assert steps in ([10, 20], [20])
        assert restore_small(directory, step=steps[0])[1]["step"] == steps[0]
        save_small(directory, 30)
        assert restore_small(directory)[0] == 30
    assert values == sorted(values)
    assert set(values) == {1, 2}


@pytest.mark.parametrize(
    "error", [RuntimeError("device lost"), tf.errors.UnavailableError(None, None, "process lost")], ids=repr
)
def test_a_save_that_fails_leaves_the_earlier_ones(tmp_path, error):
    """What a collective says of a process that is lost is no fault of the files."""
    save_small(tmp_path, 10)

    def read(start, stop):
        if start > 20:
            raise error
        return np.zeros((stop - start, 3), np.float32)

    item = callback_parameter("rows", (50, 3), np.float32, read=read, write=lambda *_: None)
    with pytest.raises(type(error), match="lost"):
        Checkpoints(tmp_path, block_mib=2e-4).save(20, [item], metadata={})
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000010"]


def test_saving_a_step_again_replaces_it(tmp_path):
    save_small(tmp_path, 10, loss=1.0)
    path = save_small(tmp_path, 10, value=5)
    assert restore_small(tmp_path) == (5, {"tokens": 100, "step": 10, "validation_loss_nats": None})
    assert tf.train.load_checkpoint(path).get_tensor("rows")[0, 0] == 5
    assert Checkpoints(tmp_path).steps() == [10]
    assert hidden_names(tmp_path) == []


def test_keeps_the_newest_and_the_best(tmp_path):
    losses = {1: 5.0, 2: 3.0, 3: float("nan"), 4: 4.0, 5: float("-inf"), 6: 3.0, 7: None}
    for step, loss in losses.items():
        save_small(tmp_path, step, loss=loss, keep=2)
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.steps() == [2, 6, 7]
    assert checkpoints.best_step() == 2
    assert restore_small(tmp_path, step=2)[1]["validation_loss_nats"] == 3.0
    assert restore_small(tmp_path)[1]["step"] == 7
    documents = [path.read_text() for path in tmp_path.glob("*/metadata.json")]
    assert not any(re.search("nan|inf", document, re.IGNORECASE) for document in documents)


def test_no_best_without_a_validation_loss(tmp_path):
    assert Checkpoints(tmp_path).best_step() is None
    save_small(tmp_path, 1, loss=float("nan"))
    assert Checkpoints(tmp_path).best_step() is None


def test_mark_best_later(tmp_path):
    for step in (1, 2):
        save_small(tmp_path, step, loss=2.0)
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.mark_best(2, 1.5)
    assert checkpoints.best_step() == 2
    checkpoints.mark_best(2, float("nan"))
    assert checkpoints.best_step() == 1
    checkpoints.mark_best(1, 1.75)
    assert restore_small(tmp_path, step=1)[1]["validation_loss_nats"] == 1.75
    with pytest.raises(ValueError, match=r"no checkpoint of step 3 .*Available: 1, 2\."):
        checkpoints.mark_best(3, 1.0)


def test_nothing_to_restore(tmp_path):
    assert restore_small(tmp_path / "new")[1] is None


def truncate(directory, pattern):
    path = sorted(directory.glob(pattern))[-1]
    os.truncate(path, path.stat().st_size // 2)


def remove(directory, pattern):
    sorted(directory.glob(pattern))[-1].unlink()


def flip(directory, pattern):
    path = sorted(directory.glob(pattern))[-1]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def empty(directory, pattern):
    sorted(directory.glob(pattern))[-1].write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, remove, flip, empty])
@pytest.mark.parametrize("pattern", ["*.data-*", "*.index", "metadata.json"])
def test_a_damaged_newest_falls_back_loudly(tmp_path, caplog, damage, pattern):
    for step in (10, 20):
        save_small(tmp_path, step)
    damage(tmp_path / "step_00000020", pattern)
    value, metadata = restore_small(tmp_path)
    assert (value, metadata["step"]) == (10, 10)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "DAMAGED CHECKPOINT: step 20" in record.message
    name = next((tmp_path / "step_00000010").glob(pattern)).name.split("-")[0]
    assert name in record.message
    assert (tmp_path / "step_00000020").is_dir(), "what is damaged is left to look at"


def test_any_flipped_bit_is_noticed(tmp_path):
    save_small(tmp_path, 10)
    rng = np.random.default_rng(0)
    for path in sorted((tmp_path / "step_00000010").iterdir()):
        original = path.read_bytes()
        for position in rng.choice(len(original), size=min(8, len(original)), replace=False):
            content = bytearray(original)
            content[position] ^= 1 << rng.integers(8)
            path.write_bytes(content)
            with pytest.raises(ValueError, match=f"readable:\n  step 10: .*{path.name}"):
                restore_small(tmp_path)
        path.write_bytes(original)
    assert restore_small(tmp_path)[0] == 10


def test_when_none_is_readable_it_is_an_error_each_time(tmp_path):
    for step in (10, 20):
        save_small(tmp_path, step)
    truncate(tmp_path / "step_00000010", "*.data-*")
    remove(tmp_path / "step_00000020", "metadata.json")
    for _ in range(2):
        with pytest.raises(
            ValueError,
            match=r"(?s)No checkpoint in .* is readable:\n  step 10: .*bytes.*\n  step 20: .*metadata",
        ):
            restore_small(tmp_path)


def test_select_a_step(tmp_path):
    for step in (10, 20, 30):
        save_small(tmp_path, step)
    assert restore_small(tmp_path, step=10)[0] == 10
    with pytest.raises(ValueError, match=r"no checkpoint of step 15 in .*Available: 10, 20, 30\."):
        restore_small(tmp_path, step=15)
    with pytest.raises(ValueError, match=r"Available: none\."):
        restore_small(tmp_path / "new", step=15)
    truncate(tmp_path / "step_00000020", "*.data-*")
    with pytest.raises(ValueError, match=r"step 20 in .* is damaged: .*Available: 10, 30\."):
        restore_small(tmp_path, step=20)


def test_after_going_back_the_run_continues_from_there(tmp_path, caplog):
    """A damaged or deserted later checkpoint must not push out new ones, nor be restored instead of them."""
    for step in (10, 20, 30):
        save_small(tmp_path, step, keep=1, loss=step)
    assert Checkpoints(tmp_path).steps() == [10, 30]
    flip(tmp_path / "step_00000030", "*.data-*")
    assert restore_small(tmp_path)[0] == 10
    save_small(tmp_path, 15, keep=1, loss=20.0)
    assert Checkpoints(tmp_path).steps() == [10, 15]
    assert restore_small(tmp_path)[0] == 15
    assert (tmp_path / "set_aside_step_00000030" / "tensors.index").exists()
    assert "step 30 is set aside" in caplog.text


def test_a_damaged_one_does_not_count_among_those_kept(tmp_path):
    save_small(tmp_path, 10)
    save_small(tmp_path, 20)
    truncate(tmp_path / "step_00000020", "*.data-*")
    save_small(tmp_path, 30, keep=2)
    assert Checkpoints(tmp_path).steps() == [10, 30]


def test_a_checkpoint_that_does_not_fit_is_named_and_not_skipped(tmp_path):
    def restore(arrays, **kwargs):
        Checkpoints(tmp_path).restore(array_parameters(arrays), **kwargs)

    saved = {"table": np.zeros((1003, 7), np.float32), "kernel": np.zeros((7, 8), np.float32)}
    other = {"table": np.zeros((1000, 7), np.float32), "kernel": np.zeros((7, 8), np.float32)}
    Checkpoints(tmp_path).save(10, array_parameters(other), metadata={})
    Checkpoints(tmp_path).save(20, array_parameters(saved), metadata={})
    # Without its data: the comparison comes before any of it is read.
    data = next((tmp_path / "step_00000020").glob("*.data-*"))
    content = data.read_bytes()
    data.unlink()
    with pytest.raises(
        ValueError, match=r"table: shape \(1003, 7\) in the checkpoint, \(1000, 7\) requested"
    ):
        restore(other)
    with pytest.raises(ValueError, match=r"kernel: in the checkpoint with shape \(7, 8\), not requested"):
        restore({"table": saved["table"]})
    with pytest.raises(
        ValueError, match=r"(?s)step_00000020 does not fit.*bias: requested with shape \(3,\), not in the"
    ):
        restore({**saved, "bias": np.zeros(3)})
    with pytest.raises(ValueError, match=r"kernel: dtype float32 in the checkpoint, bfloat16 requested"):
        restore({**saved, "kernel": np.zeros((7, 8), ml_dtypes.bfloat16)}, step=20)
    data.write_bytes(content)
    restore({"table": saved["table"]}, subset=True)
    with pytest.raises(ValueError, match="bias: requested"):
        restore({"table": saved["table"], "bias": np.zeros(3)}, subset=True)


def test_a_checkpoint_of_another_format(tmp_path):
    save_small(tmp_path, 10)
    path = tmp_path / "step_00000010" / "metadata.json"
    document = json.loads(path.read_text())
    del document["sha256"]
    document["format"] = 3
    documents.write(path.parent, document)
    with pytest.raises(ValueError, match=r"must have format 1 or 2\. Received: 3\."):
        restore_small(tmp_path)


FORMAT_1_NAMES = {
    "tables/words/embedding": "table/embedding",
    "slots/tables/words/embedding/second_moment": "table/embedding/second_moment",
    "layers/lstm_1/recurrent_kernel": "body/1/lstm_cell/recurrent_kernel",
    "slots/layers/lstm_1/recurrent_kernel/first_moment": "body_slots/1/lstm_cell/recurrent_kernel/first_moment",
    "state/3": "carried_state/3",
}


def test_a_checkpoint_of_format_1_is_restored_to_the_paths_of_today(tmp_path):
    directory = REPOSITORY / "tests" / "runs" / "format_1" / "checkpoints"
    checkpoints = Checkpoints(directory, readonly=True)
    reader = tf.train.load_checkpoint(checkpoints.prefix(20))
    expected = {path: reader.get_tensor(name) for path, name in FORMAT_1_NAMES.items()}
    restored = zeros_like(expected)
    with pytest.raises(ValueError, match="tables/words/embedding: requested with shape"):
        checkpoints.restore(array_parameters(restored), subset=True)
    with pytest.raises(ValueError, match=r"table/bias: in the checkpoint with shape \(211,\), not requested"):
        checkpoints.restore(array_parameters(restored), format_1_names=FORMAT_1_NAMES)
    assert not any(array.any() for array in restored.values())
    metadata = checkpoints.restore(array_parameters(restored), subset=True, format_1_names=FORMAT_1_NAMES)
    assert metadata["step"] == 20
    assert_same(restored, expected)
    # Saved again it is of format 2, whose paths no mapping touches.
    path = Checkpoints(tmp_path).save(20, array_parameters(restored), metadata={})
    assert sorted(tf.train.load_checkpoint(path).get_variable_to_shape_map()) == sorted(FORMAT_1_NAMES)
    again = zeros_like(expected)
    Checkpoints(tmp_path).restore(array_parameters(again), format_1_names=FORMAT_1_NAMES)
    assert_same(again, expected)


def test_mistakes_change_nothing(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    rows = np.zeros((5, 3), np.float32)
    item = array_parameter("rows", rows)

    def item_reading(result):
        return callback_parameter("rows", (5, 3), np.float32, read=lambda *_: result, write=lambda *_: None)

    with pytest.raises(
        ValueError, match=r"parameter rows must return shape \(5, 3\) of float32. Received: shape \(4, 3\)"
    ):
        checkpoints.save(1, [item_reading(rows[:4])], metadata={})
    with pytest.raises(ValueError, match=r"Received: shape \(5, 3\) of float64"):
        checkpoints.save(1, [item_reading(rows.astype(np.float64))], metadata={})
    with pytest.raises(ValueError, match=r"repeated paths \['rows'\]"):
        checkpoints.save(1, [item, item], metadata={})
    with pytest.raises(ValueError, match="without NaN"):
        checkpoints.save(1, [item], metadata={"loss": float("nan")})
    with pytest.raises(ValueError, match="JSON can hold"):
        checkpoints.save(1, [item], metadata={"loss": np.float32(1)})
    with pytest.raises(ValueError, match="step=-1"):
        checkpoints.save(-1, [item], metadata={})
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="keep=0"):
        Checkpoints(tmp_path, keep=0)
    with pytest.raises(ValueError, match="block_mib=0"):
        Checkpoints(tmp_path, block_mib=0)
    with pytest.raises(ValueError, match="dtype=<U3"):
        array_parameter("words", np.array(["abc"]))


def test_readonly_leaves_a_running_save_alone(tmp_path):
    save_small(tmp_path, 10)
    (tmp_path / ".step_00000020.saving").mkdir()
    rows = np.zeros((50, 3), np.float32)
    checkpoints = Checkpoints(tmp_path, readonly=True)
    assert checkpoints.restore([array_parameter("rows", rows)])["step"] == 10
    assert rows[0, 0] == 10
    assert hidden_names(tmp_path) == [".step_00000020.saving"]
    with pytest.raises(ValueError, match="readonly"):
        checkpoints.save(30, [array_parameter("rows", rows)], metadata={})
    with pytest.raises(ValueError, match="readonly"):
        checkpoints.mark_best(10, 1.0)
    assert Checkpoints(tmp_path / "absent", readonly=True).steps() == []
    assert not (tmp_path / "absent").exists()
    Checkpoints(tmp_path)
    assert hidden_names(tmp_path) == []


def test_directories_that_tensorflow_takes_for_a_pattern(tmp_path, monkeypatch):
    directory = tmp_path / "lr[0.004]"
    for readonly in (False, True):
        with pytest.raises(
            ValueError, match=rf"square brackets .* Received: {re.escape(str(directory / 'c'))}\."
        ):
            Checkpoints(directory / "c", readonly=readonly)
    assert not directory.exists()
    directory.mkdir()
    monkeypatch.chdir(directory)  # A relative path is what TensorFlow gets.
    arrays = make_arrays()
    checkpoints = Checkpoints("c")
    checkpoints.save(1, array_parameters(arrays), metadata={})
    restored = zeros_like(arrays)
    assert checkpoints.restore(array_parameters(restored))["step"] == 1
    assert_same(restored, arrays)
