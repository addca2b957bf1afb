"""Runs whose files are in a store: TensorFlow's ram://, in which directories cannot be renamed, and file://."""

import json
import os
import re
import time

import numpy as np
import pytest
import tensorflow as tf
import tiny_experiments
import tiny_runs
from array_parameters import array_parameters
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary

from lmscale import event_files, storage
from lmscale.bodies.lstm import lstm_body
from lmscale.checkpoints import directory as checkpoints_directory
from lmscale.checkpoints.directory import Checkpoints
from lmscale.checkpoints.saved import open_checkpoint
from lmscale.data.token_files import PreparedData
from lmscale.follow import Follower
from lmscale.metrics import MetricsWriter, read_metrics
from lmscale.parameters.update_rules import Adam
from lmscale.run import check_same_run
from lmscale.workdir import Workdir

NUM_STEPS = 6
gfile = tf.io.gfile


def body():
    return lstm_body(num_layers=1, hidden_dim=7, dropout=0.2)


def make_experiment(data_dir, **changes):
    task = tiny_experiments.language_model(body=body, head=tiny_experiments.sampled(), eval_window=13)
    settings = {
        "data_dir": str(data_dir),
        "groups": tiny_experiments.one_rule(Adam(learning_rate=0.05)),
        "train_steps": NUM_STEPS,
        "eval_batch_size": 7,
        "probe_tokens": 0,
        "keep_checkpoints": 2,
    }
    return tiny_experiments.experiment(task=task, **(settings | changes))


@pytest.fixture(autouse=True)
def quick_starts(monkeypatch):
    monkeypatch.setattr(storage, "SETTLE_SECS", 0.0)
    monkeypatch.setattr(storage, "STALE_SECS", 12.0)  # Renewed every other second.


@pytest.fixture
def store(request):
    """A folder of a store, empty."""
    return f"ram://tests/{re.sub('[^a-z0-9_]', '_', request.node.name)}"


@pytest.fixture(scope="module")
def stored_data(data_dir):
    target = "ram://tests/data"
    gfile.makedirs(target)
    for path in data_dir.iterdir():
        if path.is_file():
            gfile.copy(str(path), f"{target}/{path.name}")
    return target


@pytest.fixture(scope="module")
def local_run(data_dir, mirrored, tmp_path_factory):
    path = tmp_path_factory.mktemp("local") / "run"
    tiny_runs.train_here(make_experiment(data_dir), workdir=path, strategy=mirrored(2))
    return path


def overwrite(path, data):
    """As an object store does it; ram:// would append."""
    gfile.remove(path)
    with gfile.GFile(path, "wb") as file:
        file.write(data)


def stored_tensors(workdir, step):
    prefix = f"{workdir}/checkpoints/step_{step:08d}/tensors"
    reader = tf.compat.v1.train.NewCheckpointReader(prefix)
    return {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}


def stored_steps(workdir):
    names = [name.rstrip("/") for name in gfile.listdir(f"{workdir}/checkpoints")]
    return sorted(
        int(name[5:]) for name in names if gfile.exists(f"{workdir}/checkpoints/{name}/metadata.json")
    )


def events(directory):
    """(step, {tag: value}) of the scalars in TensorBoard's files of a directory, read by TensorFlow."""
    found = []
    for path in sorted(gfile.glob(f"{directory}/events.out.tfevents.*")):
        for record in tf.data.TFRecordDataset(path):
            event = Event.FromString(record.numpy())
            values = {
                v.tag: v.simple_value for v in event.summary.value if v.WhichOneof("value") == "simple_value"
            }
            found += [(event.step, values)] if values else []
    return found


def without_times(directory):
    return tiny_runs.without_times(read_metrics(directory))


# ------------------------------------------------------------------------------------------------------ Whole runs


def test_a_run_in_a_store_is_the_run(stored_data, local_run, mirrored, store):
    """Stopped after four steps, resumed, finished: as the one on this machine that was not."""
    first = make_experiment(stored_data, train_steps=4)
    tiny_runs.train_here(first, workdir=store, strategy=mirrored(2))
    assert stored_steps(store)[-1] == 4
    summary = tiny_runs.train_here(make_experiment(stored_data), workdir=store, strategy=mirrored(2))
    assert summary["step"] == NUM_STEPS
    assert stored_steps(store) == tiny_runs.checkpoint_steps(local_run)
    for step in stored_steps(store):
        tiny_runs.assert_same_bits(stored_tensors(store, step), tiny_runs.tensors(local_run, step))
    for name in ("train", "eval"):
        lines = without_times(f"{store}/{name}")
        assert [line["step"] for line in lines] == list(range(1, NUM_STEPS + 1))
        assert lines == tiny_runs.without_times(tiny_runs.metrics(local_run, name))
    losses = [line["valid/exact_loss_nats"] for line in read_metrics(f"{store}/eval")]
    shown = [(step, v["valid/exact_loss_nats"]) for step, v in events(f"{store}/eval")]
    assert [step for step, _ in shown] == list(range(1, NUM_STEPS + 1))
    np.testing.assert_allclose([loss for _, loss in shown], losses, rtol=1e-6)
    with Workdir(store, readonly=True) as workdir:
        assert workdir.has_saved()
        report = tiny_runs.evaluate_checkpoint(
            make_experiment(stored_data),
            workdir=workdir,
            strategy=mirrored(1),
            split="valid",
            checkpoint="latest",
        )
    assert report["loss_nats"] == pytest.approx(losses[-1], rel=1e-6)
    saved = open_checkpoint(store)
    np.testing.assert_array_equal(
        saved.read("tables/words/embedding"), stored_tensors(store, NUM_STEPS)["tables/words/embedding"]
    )
    assert saved.vocabulary_path("words").read_text() == (local_run / "vocab.txt").read_text()


def test_following_a_run_in_a_store(stored_data, mirrored, store):
    experiment = make_experiment(stored_data, keep_checkpoints=NUM_STEPS)
    summary = tiny_runs.train_here(experiment, workdir=store, strategy=mirrored(1))
    with Workdir(store) as workdir:
        workdir.mark_finished(step=NUM_STEPS, summary=summary)
    own = {line["step"]: line["valid/exact_loss_nats"] for line in read_metrics(f"{store}/eval")}
    for expected in (own, {}):
        with Follower(store, split="valid") as follower:
            workdir = follower.wait_for_run()
            with pytest.raises(ValueError, match="is in use by another evaluation"):
                Follower(store, split="valid").wait_for_run()
            found = {
                report["step"]: report["loss_nats"]
                for report in follower.reports(experiment, workdir=workdir, strategy=mirrored(1))
            }
        assert found == pytest.approx(expected, rel=1e-6)
    assert [line["step"] for line in read_metrics(f"{store}/eval_valid")] == list(own)


def test_the_command_takes_file_paths(data_dir, tmp_path):
    for workdir, data in ((tmp_path / "local", data_dir), (f"file://{tmp_path}/file", f"file://{data_dir}")):
        arguments = tiny_runs.train_arguments(workdir=workdir, data_dir=data, TRAIN_STEPS=20)
        code, _, stderr = tiny_runs.run_forked("lmscale.train", arguments, log=tmp_path / "log")
        assert code == 0, stderr
    tiny_runs.assert_same_bits(
        tiny_runs.tensors(tmp_path / "file", 20), tiny_runs.tensors(tmp_path / "local", 20)
    )


@pytest.mark.parametrize(
    ("module", "flag", "message"),
    [
        (
            "lmscale.evaluate",
            "--workdir=s3://bucket/run",
            "a store that TensorFlow knows: .*gs.* Received: s3://",
        ),
        (
            "lmscale.evaluate",
            "--workdir=file://host/run",
            "must be one of this machine.* Received: file://host/run",
        ),
        (
            "lmscale.prepare",
            "--output=gs://bucket/data",
            "must be a path of this machine. Received: gs://bucket/data",
        ),
    ],
)
def test_what_cannot_be_is_refused(module, flag, message, tmp_path):
    code, _, stderr = tiny_runs.run_forked(module, [flag], log=tmp_path / "log")
    assert code == 2
    assert re.search(message, stderr), stderr


# ----------------------------------------------------------------------------------------------------- Checkpoints


def rows(value):
    return array_parameters({"x": np.full([40, 3], value, np.float32)})


def restored(store, **kwargs):
    arrays = {"x": np.zeros([40, 3], np.float32)}
    metadata = Checkpoints(store).restore(array_parameters(arrays), **kwargs)
    return (metadata and metadata["step"]), float(arrays["x"][7, 2])


def test_a_save_that_is_killed_is_no_checkpoint(store):
    checkpoints = Checkpoints(store)
    checkpoints.save(1, rows(1.0), metadata={})
    checkpoints.save(2, rows(2.0), metadata={})
    gfile.remove(f"{store}/step_00000002/metadata.json")
    readonly = Checkpoints(store, readonly=True)
    assert (readonly.newest_step(), readonly.steps()) == (1, [1])
    assert gfile.exists(f"{store}/step_00000002")  # Another process may be writing it.
    assert restored(store) == (1, 1.0)
    assert not gfile.exists(f"{store}/step_00000002")


def test_settings_are_free_until_the_first_save_is_done(store):
    class Config:
        def refused_changes(self, text):
            return ["LEARNING_RATE"]

    Checkpoints(f"{store}/checkpoints").save(1, rows(1.0), metadata={})
    with Workdir(store) as workdir:
        workdir.write_config("x = 1\n")
        with pytest.raises(ValueError, match="goes on with the settings it started with"):
            check_same_run(Config(), workdir)
        gfile.remove(f"{store}/checkpoints/step_00000001/metadata.json")
        check_same_run(Config(), workdir)


def test_metadata_goes_first_and_comes_last(store, monkeypatch):
    checkpoints = Checkpoints(store, keep=1)
    checkpoints.save(1, rows(1.0), metadata={})

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints_directory.documents, "write", killed)
        patch.setattr(checkpoints_directory, "_remove_tree", lambda path: None)  # Nothing is tidied up.
        with pytest.raises(KeyboardInterrupt):
            checkpoints.save(2, rows(2.0), metadata={})
    assert gfile.exists(f"{store}/step_00000002/tensors.index")
    assert restored(store) == (1, 1.0)
    with monkeypatch.context() as patch:
        remove_tree = storage.RemotePath.remove_tree

        def killed_at_old(path):
            if path.name == "step_00000001":
                raise KeyboardInterrupt
            remove_tree(path)

        patch.setattr(storage.RemotePath, "remove_tree", killed_at_old)
        with pytest.raises(KeyboardInterrupt):
            Checkpoints(store, keep=1).save(2, rows(2.0), metadata={})
    assert gfile.exists(f"{store}/step_00000001/tensors.index")
    assert Checkpoints(store, readonly=True).steps() == [2]
    assert restored(store) == (2, 2.0)
    assert not gfile.exists(f"{store}/step_00000001")


def test_replacing_and_going_back(store):
    checkpoints = Checkpoints(store, keep=5)
    for step in (1, 2, 3):
        checkpoints.save(step, rows(float(step)), metadata={})
    assert restored(store, step=2) == (2, 2.0)
    checkpoints.save(2, rows(-2.0), metadata={})
    assert checkpoints.steps() == [1, 2]
    assert restored(store) == (2, -2.0)
    # What is set aside is kept, until its step comes again.
    assert gfile.exists(f"{store}/step_00000003/tensors.index")
    checkpoints.save(3, rows(-3.0), metadata={})
    assert restored(store) == (3, -3.0)


# --------------------------------------------------------------------------------------------------------- The owner


def test_one_owner(store):
    with Workdir(store) as first:
        with pytest.raises(ValueError, match=f"in use by another run: pid {os.getpid()} on "):
            Workdir(store)
        first.mark_saved()
        Workdir(store, readonly=True).close()
    with Workdir(store) as second:
        assert second.has_saved()


def test_an_owner_that_was_killed_is_waited_for(store, monkeypatch, caplog):
    monkeypatch.setattr(storage, "STALE_SECS", 0.3)
    gfile.makedirs(store)
    with gfile.GFile(f"{store}/.lock", "w") as file:
        file.write(json.dumps({"mark": "a", "owner": "pid 7 on elsewhere", "renewed": time.time() + 0.2}))
    with Workdir(store) as workdir:
        workdir.mark_saved()
    assert caplog.text.count("was in use by pid 7 on elsewhere a moment ago") == 1


def test_a_silent_owner_is_taken_over_and_finds_out(store, monkeypatch):
    monkeypatch.setattr(storage, "STALE_SECS", 600.0)  # It does not renew meanwhile.
    with Workdir(store) as first:
        document = json.loads(gfile.GFile(f"{store}/.lock").read())
        document["renewed"] -= storage.STALE_SECS + 1
        overwrite(f"{store}/.lock", json.dumps(document))
        with Workdir(store) as second:
            second.write_config("x = 1\n")
            with pytest.raises(ValueError, match="it was taken over by pid"):
                first.mark_saved()
            first.close()
            second.write_config("x = 2\n")  # It is still there.
    assert gfile.GFile(f"{store}/config.gin").read() == "x = 2\n"


def test_two_that_start_at_the_same_moment(store, monkeypatch):
    def other_writes(secs):
        document = json.loads(gfile.GFile(f"{store}/.lock").read())
        other = {**document, "mark": "another", "owner": "pid 7 on elsewhere"}
        overwrite(f"{store}/.lock", json.dumps(other))

    monkeypatch.setattr(storage.time, "sleep", other_writes)
    with pytest.raises(ValueError, match="taken over by pid 7 on elsewhere"):
        Workdir(store)


def test_the_owner_renews(store, monkeypatch):
    monkeypatch.setattr(storage, "STALE_SECS", 0.06)
    deadline = time.monotonic() + 60
    with Workdir(store):
        first = json.loads(gfile.GFile(f"{store}/.lock").read())["renewed"]
        while json.loads(gfile.GFile(f"{store}/.lock").read())["renewed"] == first:
            assert time.monotonic() < deadline
            time.sleep(0.01)


# ------------------------------------------------------------------------------------------------------------ Metrics


def test_metrics_in_parts(store, tmp_path):
    num_lines = 2500
    for directory in (store, tmp_path):
        with MetricsWriter(directory) as writer:
            for step in range(num_lines):
                writer.scalars(step, {"a_tag_of_some_length": step / 7})
        with MetricsWriter(directory, resume_step=1999) as writer:
            writer.scalars(2000, {"a_tag_of_some_length": -1.0})
    parts = sorted(name for name in gfile.listdir(store) if name.startswith("metrics."))
    assert len(parts) > 2
    lines = [json.loads(line) for part in parts for line in gfile.GFile(f"{store}/{part}")]
    assert [line["step"] for line in lines] == list(range(2001))
    expected = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for line in (*lines, *expected):
        del line["wall_time"]
    assert lines == expected
    assert [line["step"] for line in read_metrics(store)] == list(range(2001))


@pytest.mark.parametrize(("secs", "expected"), [(0.0, 4), (1e9, 1)])
def test_event_files_are_uploaded_now_and_then(secs, expected, store, monkeypatch):
    flushed = []
    monkeypatch.setattr(event_files, "STORE_SECS", secs)
    monkeypatch.setattr(storage._RemoteFile, "flush", lambda file: flushed.append(file))
    path = storage.as_path(store)
    path.mkdir()
    with event_files.EventFile(path) as file:
        for step in range(3):
            value = Summary.Value(tag="x", simple_value=step)
            file.add(Event(step=step, summary=Summary(value=[value])))
    assert len(flushed) == expected
    assert events(store) == [(step, {"x": step}) for step in range(3)]


# ------------------------------------------------------------------------------------------------------ Prepared data


def test_prepared_data(stored_data, data_dir):
    stored, local = PreparedData.open(stored_data), PreparedData.open(data_dir)
    assert stored.fingerprint == local.fingerprint
    for split in ("train", "valid", "test"):
        np.testing.assert_array_equal(stored.split(split), local.split(split))
        assert stored.split(split).dtype == local.split(split).dtype


def test_damaged_prepared_data(stored_data, store):
    gfile.makedirs(store)
    for name in gfile.listdir(stored_data):
        gfile.copy(f"{stored_data}/{name}", f"{store}/{name}")
    data = bytearray(gfile.GFile(f"{store}/valid.bin", "rb").read())
    data[5] ^= 1
    overwrite(f"{store}/valid.bin", bytes(data))
    with pytest.raises(ValueError, match=r"valid.bin: must have SHA-256"):
        PreparedData.open(store)
