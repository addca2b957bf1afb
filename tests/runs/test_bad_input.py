"""A user's mistake costs seconds and nothing else: exit code 2, one message with what was received and what to do."""

import json
import re
import resource
import shutil

import numpy as np
import pytest
import tiny_runs

from lmscale.data.token_files import file_sha256
from lmscale.workdir import Workdir

EXIT_USAGE = 2
NO_BINDINGS: dict = {}


def failure(module, arguments, *, log):
    """The message of a command that must fail as a user's mistake."""
    code, stdout, stderr = tiny_runs.run_forked(module, arguments, log=log)
    assert code == EXIT_USAGE, f"exit code {code}\n{stdout}\n{stderr}"
    assert "Traceback" not in stderr
    assert stdout == ""
    # Before it, TensorFlow may say that its CUDA finds no GPU, which contains "error: " too.
    messages = re.findall(r"^error: (.*)", stderr, re.MULTILINE | re.DOTALL)
    assert len(messages) == 1, stderr
    assert "\nerror: " not in messages[0]
    return messages[0]


@pytest.fixture
def train_failure(data_dir, tmp_path):
    """train_failure(flag, ..., NAME=value): the message with which `lmscale.train` fails."""

    def run(
        *flags, workdir=None, data_dir=data_dir, gin_file=tiny_runs.QUICKSTART, cpu_devices=2, **bindings
    ):
        arguments = tiny_runs.train_arguments(
            workdir=workdir or tmp_path / "run",
            data_dir=data_dir,
            gin_file=gin_file,
            cpu_devices=cpu_devices,
            **bindings,
        )
        return failure("lmscale.train", [*arguments, *flags], log=tmp_path / "log")

    return run


@pytest.fixture
def unfinished_run(reference_run, tmp_path):
    """The work directory of a run of 200 steps on 2 devices, as it was after step 100."""
    return tiny_runs.go_back(reference_run(2).result(), tmp_path / "unfinished", step=100)


# ------------------------------------------------------------------------------------------------ The configuration


@pytest.mark.parametrize(
    ("binding", "words"),
    [
        ("experiment.Experiment.no_such = 1", ["Experiment", "no parameter 'no_such'"]),
        ("experiment.Experiment.train_stps = 1", ["no parameter 'train_stps'", "Did you mean train_steps"]),
        ("TRAIN_STEPS = 'many'", ["train_steps must be of type int", "'many' (str)", "TRAIN_STEPS"]),
        ("DROPOUT = '0.5'", ["dropout must be of type float", "'0.5' (str)", "DROPOUT"]),
        ("GLOBAL_BATCH_SIZE = 24.0", ["global_batch_size must be of type int", "24.0 (float)"]),
        ("STEPS = 5", ["macro STEPS", "nothing uses %STEPS", "Did you mean"]),
        ("lstm.lstm_body.num_layers = %LAYERS", ["LAYERS", "no such macro"]),
        ("TRAIN_STEPS 5", ["binding 'TRAIN_STEPS 5'", "NAME = value"]),
        ("TRAIN_STEPS = many", ["'TRAIN_STEPS = many': Failed to parse token 'many'", "text in quotes"]),
        (
            "next_token.NextToken.head = @sampled.SampledSoftmax()",
            [
                "head must be of type Callable[..., Head]",
                "write next_token.NextToken.head = @sampled.SampledSoftmax.",
            ],
        ),
        ("TRAIN_STEPS = 0", ["schedules.CosineDecay(", "decay_steps=0"]),
        ("DROPOUT = 1.0", ["dropout must be in [0, 1)", "1.0", "DROPOUT"]),
        ("LEARNING_RATE = 1e999", ["LEARNING_RATE must be finite", "inf"]),
        ("NUM_LAYERS = 0", ["num_layers", "at least 1", "num_layers=0"]),
        ("SEED = -1", ["seed must be in [0, 2**31)", "seed=-1"]),
        ("words/table_config.TableConfig.bias = 'log'", ["bias must be of type", "'log' (str)"]),
        ("next_token.NextToken.inputs = 'word'", ["inputs='word', outputs='words'", "missing: word"]),
        (
            "rows/groups.Group.pattern = 'table/.*'",
            ["Every parameter needs a group", "none for tables/words/embedding", "'layers/.*'"],
        ),
        (
            "layers/groups.Group.pattern = 'tables/words/bias|layers/lstm_.*'",
            ["none for layers/projection/", "'tables/.*'", "Never()"],
        ),
        (
            "experiment.Experiment.eval_tokens = 0",
            ["eval_tokens must be at least 1 or None", "eval_tokens=0"],
        ),
        ("experiment.Experiment.evaluate_averages = True", ["averages.Averaged", "Received: none"]),
        (
            "experiment.Experiment.gradient_accumulation_steps = 5",
            ["devices=2 x 5 gradient_accumulation_steps", "Set GLOBAL_BATCH_SIZE to a multiple of 10"],
        ),
        ("NUM_SAMPLED = 5004", ["num_sampled=5004, vocab_size=5003", "Set NUM_SAMPLED to at most 5003"]),
        (
            "GLOBAL_BATCH_SIZE = 25",
            ["global_batch_size=25, devices=2", "Set GLOBAL_BATCH_SIZE to a multiple of 2"],
        ),
        ("GLOBAL_BATCH_SIZE = 2000", ["needs 12,000 tokens", "Received: 6,007 tokens"]),
    ],
)
def test_settings(train_failure, tmp_path, binding, words):
    message = train_failure(f"--gin_param={binding}")
    for word in words:
        assert word in message
    assert {path.name for path in (tmp_path / "run").glob("*")} <= {".lock"}


def test_macro_without_value(train_failure, data_dir, tmp_path):
    config = tmp_path / "short.gin"
    shared = tiny_runs.REPOSITORY / "configs" / "shared" / "lstm.gin"
    lines = [f"{name} = {value!r}" for name, value in tiny_runs.TINY_MACROS.items() if name.isupper()]
    config.write_text(
        "\n".join([f"include '{shared}'", f"DATA_DIR = '{data_dir}'", *lines]).replace("WINDOW = 5", "")
    )
    arguments = tiny_runs.train_arguments(workdir=tmp_path / "run", gin_file=config, bindings=NO_BINDINGS)
    message = failure("lmscale.train", arguments, log=tmp_path / "log")
    assert "The macro WINDOW, which next_token.NextToken.window uses, must have a value" in message
    assert "Add the line WINDOW = ..." in message


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--workdir=", ["--workdir=: a path must not be empty"]),
        ("--workdir=other", ["--workdir must be given once", "/run and other"]),
        ("--gpu_memory_mib=100", ["gpu_memory_mib is for runs on GPUs", "cpu_devices=2"]),
        ("--gin_file=configs/no_such.gin", ["The gin file must exist", "configs/no_such.gin"]),
        ("--cpu_devices=0", ["cpu_devices must be at least 1", "cpu_devices=0"]),
        ("--cpu_devices=two", ["--cpu_devices", "two", "--help"]),
        ("--train_steps=5", ["train_steps", "--help"]),
        ("train_steps=5", ["flags only", "train_steps=5"]),
        ("--seed=1", ["The seed must be given once", "seed=1", "SEED = 5"]),
    ],
)
def test_flags(train_failure, tmp_path, flag, words):
    message = train_failure(flag)
    for word in words:
        assert word in message
    assert {path.name for path in (tmp_path / "run").glob("*")} <= {".lock"}


def test_workdir_that_tensorflow_takes_for_a_pattern(train_failure):
    message = train_failure(workdir="runs/lr[0.004]")
    assert "The working directory must not have square brackets" in message
    assert "runs/lr[0.004]" in message


# ---------------------------------------------------------------------------------------------------------- The data


def copied_data(data_dir, tmp_path):
    return shutil.copytree(data_dir, tmp_path / "data")


def test_data_that_is_not_there(train_failure, tmp_path):
    message = train_failure(data_dir=tmp_path / "nowhere")
    assert f"{tmp_path / 'nowhere' / 'manifest.json'}: no such directory" in message
    assert "python -m lmscale.prepare" in message
    (tmp_path / "empty").mkdir()
    assert f"{tmp_path / 'empty' / 'manifest.json'}: no such file" in train_failure(
        data_dir=tmp_path / "empty"
    )


def test_token_file_that_does_not_match_its_manifest(train_failure, data_dir, tmp_path):
    data = copied_data(data_dir, tmp_path)
    tokens = np.fromfile(data / "valid.bin", "<u2")
    tokens[17] ^= 1
    tokens.tofile(data / "valid.bin")
    message = train_failure(data_dir=data)
    assert str(data / "valid.bin") in message
    assert file_sha256(data / "valid.bin") in message
    assert "prepare again" in message
    tokens[:-1].tofile(data / "valid.bin")
    message = train_failure(data_dir=data)
    assert "must have 1,402 bytes" in message
    assert "Received: 1,400 bytes" in message


def test_id_out_of_range(train_failure, data_dir, tmp_path):
    """In files that agree with each other."""
    data = copied_data(data_dir, tmp_path)
    tokens = np.fromfile(data / "train.bin", "<u2")
    tokens[1234] = tiny_runs.VOCAB_SIZE
    tokens.tofile(data / "train.bin")
    manifest = json.loads((data / "manifest.json").read_text())
    manifest["splits"]["train"]["sha256"] = file_sha256(data / "train.bin")
    (data / "manifest.json").write_text(json.dumps(manifest))
    message = train_failure(data_dir=data)
    assert f"{data / 'train.bin'}: ids must be in 0 .. 5002. Received: 5003 at position 1,234" in message


# ------------------------------------------------------------------------------------------------ The work directory


def test_workdir_that_cannot_be_written(train_failure, tmp_path):
    """A file in its place, or above it: also root cannot write there."""
    file = tmp_path / "file"
    file.write_text("mine")
    for workdir in (file, file / "run"):
        message = train_failure(workdir=workdir)
        assert "working directory" in message
        assert f"Received: {workdir}" in message
    assert file.read_text() == "mine"


def test_workdir_in_use(train_failure, unfinished_run):
    before = tiny_runs.snapshot(unfinished_run)
    with Workdir(unfinished_run):
        message = train_failure(workdir=unfinished_run)
    assert f"{unfinished_run} is in use by another run: pid " in message
    assert tiny_runs.snapshot(unfinished_run) == before


def test_run_of_other_settings(train_failure, unfinished_run):
    before = tiny_runs.snapshot(unfinished_run)
    message = train_failure(workdir=unfinished_run, HIDDEN_DIM=13, DROPOUT=0.4)
    assert "HIDDEN_DIM: 12 -> 13" in message
    assert "DROPOUT: 0.3 -> 0.4" in message
    assert "another --workdir" in message
    assert tiny_runs.snapshot(unfinished_run) == before


def test_checkpoint_of_another_body(train_failure, unfinished_run):
    """Where no config.gin tells it, the checkpoint does."""
    (unfinished_run / "config.gin").unlink()
    before = tiny_runs.snapshot(unfinished_run)
    message = train_failure(workdir=unfinished_run, HIDDEN_DIM=13)
    assert (
        f"The checkpoint {unfinished_run / 'checkpoints' / 'step_00000100'} does not fit the model" in message
    )
    assert "shape (12, 48) in the checkpoint, (13, 52) requested" in message
    assert "another working directory" in message
    assert tiny_runs.snapshot(unfinished_run) == before


def test_checkpoint_of_another_vocabulary(train_failure, unfinished_run, tmp_path):
    other = tiny_runs.write_data(tmp_path / "other", vocab_size=499)
    before = tiny_runs.snapshot(unfinished_run)
    message = train_failure(workdir=unfinished_run, data_dir=other)
    assert "tables/words/embedding: shape (5003, 8) in the checkpoint, (499, 8) requested" in message
    assert tiny_runs.snapshot(unfinished_run) == before


def test_checkpoint_of_other_data_of_the_same_size(train_failure, unfinished_run, tmp_path):
    other = tiny_runs.write_data(tmp_path / "other", seed=1)
    before = tiny_runs.snapshot(unfinished_run)
    message = train_failure(workdir=unfinished_run, data_dir=other)
    assert "must go on with the data it started with" in message
    assert f"Received: {other}" in message
    assert tiny_runs.snapshot(unfinished_run) == before


def test_no_checkpoint_is_readable(train_failure, unfinished_run):
    """A run that has something to lose never starts over."""
    for path in (unfinished_run / "checkpoints").glob("step_*/tensors.data-*"):
        path.write_bytes(path.read_bytes()[:-1])
    before = tiny_runs.snapshot(unfinished_run)
    message = train_failure(workdir=unfinished_run)
    assert "No checkpoint in" in message
    assert all(f"step {step}: " in message for step in (20, 40, 60, 80, 100))
    assert tiny_runs.snapshot(unfinished_run) == before


def test_checkpoints_that_are_gone(train_failure, unfinished_run):
    shutil.rmtree(unfinished_run / "checkpoints")
    before = tiny_runs.snapshot(unfinished_run)
    message = train_failure(workdir=unfinished_run)
    assert "has saved checkpoints" in message
    assert f"none in {unfinished_run / 'checkpoints'}" in message
    assert tiny_runs.snapshot(unfinished_run) == before


def test_fewer_steps_than_done(train_failure, unfinished_run):
    assert "train_steps=50, 100 steps done" in train_failure(workdir=unfinished_run, TRAIN_STEPS=50)


def test_a_start_that_failed_claims_no_directory(train_failure, data_dir, tmp_path):
    """Another setting may follow: there is nothing yet that could go on with the old one."""
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "config.gin").write_text("LEARNING_RATE = None\n")
    message = train_failure(workdir=workdir, data_dir=tmp_path / "nowhere")
    assert "no such directory" in message


def test_finished_run_keeps_its_mark_when_more_steps_cannot_be_done(train_failure, reference_run, tmp_path):
    finished = shutil.copytree(reference_run(2).result(), tmp_path / "finished")
    before = tiny_runs.snapshot(finished)
    train_failure(workdir=finished, TRAIN_STEPS=300, data_dir=tmp_path / "nowhere")
    assert tiny_runs.snapshot(finished) == before


# -------------------------------------------------------------------------------------------------------- Evaluation


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], ["--workdir is required"]),
        (["--workdir={missing}"], ["There is no working directory", "{missing}"]),
        (["--workdir={empty}"], ["No run has started in {empty}"]),
        (["--workdir={run}", "--split=dev"], ["split", "dev", "train", "valid", "test"]),
        (["--workdir={run}", "--checkpoint=150"], ["no checkpoint of step 150", "20, 40, 60, 80, 100"]),
        (["--workdir={run}", "--checkpoint=last"], ["a step, `latest` or `best`", "last"]),
        (["--workdir={run}", "--gin_param=DATA_DIR = '{missing}'"], ["{missing}", "no such directory"]),
    ],
)
def test_evaluate(unfinished_run, tmp_path, flags, words):
    places = {"missing": tmp_path / "missing", "empty": tmp_path, "run": unfinished_run}
    before = tiny_runs.snapshot(unfinished_run)
    message = failure("lmscale.evaluate", [flag.format(**places) for flag in flags], log=tmp_path / "log")
    for word in words:
        assert word.format(**places) in message
    assert tiny_runs.snapshot(unfinished_run) == before


def test_evaluate_with_another_vocabulary_of_the_same_size(unfinished_run, tmp_path):
    other = tiny_runs.write_data(tmp_path / "other", seed=1)
    arguments = [f"--workdir={unfinished_run}", f"--gin_param=DATA_DIR = '{other}'"]
    message = failure("lmscale.evaluate", arguments, log=tmp_path / "log")
    assert "vocabulary it was trained with" in message
    assert str(other) in message


# ------------------------------------------------------------------------------------------------------- How quickly


def test_within_seconds(data_dir, tmp_path):
    """`python -m` and all. Measured: 5 s, which are the import of TensorFlow; CPU time, as others may be busy."""
    arguments = tiny_runs.train_arguments(workdir=tmp_path / "run", data_dir=data_dir, NUM_SAMPLED=5004)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = tiny_runs.Process("lmscale.train", arguments, log=tmp_path / "log")
    assert process.wait() == EXIT_USAGE
    assert "error: num_sampled" in process.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 20
