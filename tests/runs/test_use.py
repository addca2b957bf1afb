"""The commands that use what was trained: what they print, on devices and in processes, and how they fail."""

import json

import numpy as np
import pytest
import tiny_runs
from test_bad_input import failure

from lmscale import configuration
from lmscale.data.token_files import PreparedData

TEXT = "word2 word5 word3\n\nword9 word700 word2 word4 nowhere\n"


@pytest.fixture(scope="module")
def trained(data_dir, mirrored, tmp_path_factory):
    """The work directory of a run of four steps."""
    workdir = tmp_path_factory.mktemp("use") / "run"
    changes = {"TRAIN_STEPS": 4, "SAVE_EVERY": 4, "EVAL_EVERY": 4}
    bindings = {"DATA_DIR": str(data_dir), **tiny_runs.TINY_MACROS, **changes}
    config = configuration.load(
        [str(tiny_runs.QUICKSTART)], [f"{name} = {value!r}" for name, value in bindings.items()]
    )
    tiny_runs.train_here(config.experiment, workdir=workdir, strategy=mirrored(1), config_text=config.text)
    return workdir


@pytest.fixture
def run(trained, tmp_path):
    """run(command, flag, ...): the JSON objects that a command prints, and its stderr."""

    def of_command(command, *flags, workdir=trained):
        code, stdout, stderr = tiny_runs.run_forked(
            f"lmscale.{command}", [f"--workdir={workdir}", *flags], log=tmp_path / command
        )
        assert code == 0, stderr
        return [json.loads(line) for line in stdout.splitlines()], stderr

    return of_command


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def assert_same(found, expected):
    """Two lists of JSON objects are equal, but for times, and for numbers by rounding."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for key in one.keys() - {"seconds", "tokens_per_sec", "num_devices"}:
            if isinstance(one[key], float) or key == "log_probs":
                np.testing.assert_allclose(one[key], other[key], rtol=1e-5, atol=1e-5, err_msg=key)
            else:
                assert one[key] == other[key], key


SCORE = ["--tokenized", "--batch_size=2"]
GENERATE = ["--tokenized", "--num_samples=2", "--max_tokens=7", "--top_p=0.9"]


def test_score(run, text, trained):
    (*lines, total), stderr = run("score", *SCORE, f"--input={text}")
    assert [line["tokens"] for line in lines] == [
        ["word2", "word5", "word3", "<eos>"],
        ["<eos>"],
        ["word9", "word700", "word2", "word4", "<unk>", "<eos>"],
    ]
    assert "1 of 11 tokens are not in the vocabulary" in stderr
    assert [line["line"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert line["log_prob"] == pytest.approx(sum(line["log_probs"]))
        assert line["num_tokens"] == len(line["log_probs"]) == len(line["tokens"])
    assert (total["lines"], total["tokens"], total["unknown_tokens"], total["step"]) == (3, 11, 1, 4)
    mean = -sum(line["log_prob"] for line in lines) / 11
    assert total["loss_nats"] == pytest.approx(mean)
    assert total["perplexity"] == pytest.approx(np.exp(mean))


def test_a_stream_scores_what_an_evaluation_does(run, data_dir, trained, mirrored, tmp_path):
    """The split again as text, by one lane."""
    data = PreparedData.open(data_dir)
    words = " ".join(data.vocabulary.tokens[token] for token in data.split("test"))
    text = tmp_path / "split.txt"
    text.write_text(words.replace(" <eos> ", "\n").removesuffix(" <eos>") + "\n")
    (*lines, total), _ = run("score", "--tokenized", "--context=stream", "--notokens", f"--input={text}")
    assert "tokens" not in lines[0]
    config = configuration.load([str(trained / "config.gin")], ["experiment.Experiment.eval_batch_size = 1"])
    with tiny_runs.Workdir(trained, readonly=True) as workdir:
        evaluated = tiny_runs.evaluate_checkpoint(
            config.experiment, workdir=workdir, strategy=mirrored(1), split="test", checkpoint="latest"
        )
    # The text ends with a line, and the split need not.
    added = total["tokens"] - evaluated["tokens"]
    assert added in (0, 1)
    last = lines[-1]["log_prob"] if added and lines[-1]["num_tokens"] == 1 else 0.0
    if not added or last:
        assert -(total["log_prob"] - last) == pytest.approx(
            evaluated["loss_nats"] * evaluated["tokens"], rel=1e-5
        )


def test_generate_on_devices_and_in_processes(run, trained, tmp_path):
    """Prompts from the command line, and from a file."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("word2 word5\n\n")
    processes = tiny_runs.start_processes(
        2, "lmscale.generate", [f"--workdir={trained}", f"--input={prompts}", *GENERATE], log=tmp_path / "two"
    )
    (*texts, total), _ = run("generate", "--prompt=word2 word5", "--prompt=", *GENERATE, "--cpu_devices=3")
    assert [(text["prompt"], text["sample"]) for text in texts] == [
        ("word2 word5", 0),
        ("word2 word5", 1),
        ("", 0),
        ("", 1),
    ]
    for text in texts:
        assert len(text["tokens"]) == 7 or text["is_finished"]
        assert text["text"].split() == [token for token in text["tokens"] if token != "<eos>"]
        assert text["log_prob"] == pytest.approx(sum(text["log_probs"]))
        assert "<unk>" not in text["tokens"]
    assert total["texts"] == 4
    assert total["tokens"] == sum(len(text["tokens"]) for text in texts)
    assert tiny_runs.wait_for_all(processes) == [0, 0], processes[0].stderr
    assert_same([json.loads(line) for line in processes[0].stdout.splitlines()], [*texts, total])
    assert processes[1].stdout == ""


def test_neighbors(run, tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("word2\nword77\n")
    found, _ = run("neighbors", f"--input={words}", "--k=3", "--cpu_devices=2")
    assert [line["word"] for line in found] == ["word2", "word77"]
    for line in found:
        cosines = [near["cosine"] for near in line["neighbors"]]
        assert len(cosines) == 3
        assert cosines == sorted(cosines, reverse=True)
        assert line["word"] not in [near["word"] for near in line["neighbors"]]


@pytest.mark.parametrize(
    ("command", "flags", "words"),
    [
        ("score", ["--tokenized", "--input=no/such"], ["no such file", "no/such"]),
        ("score", ["--tokenized", "--input={empty}"], ["is empty (0 bytes)"]),
        ("score", ["--tokenized"], ["text on stdin", "0 bytes"]),
        ("score", ["--input={text}"], ["must tell its tokenizer", "Received: None", "--tokenized"]),
        ("generate", ["--prompt=word2"], ["must tell its tokenizer"]),
        ("generate", ["--top_p=0"], ["top_p must be above 0 and at most 1", "0.0"]),
        ("generate", ["--temperature=-1"], ["temperature", "-1.0"]),
        ("generate", ["--top_k=0"], ["top_k must be at least 1"]),
        ("generate", ["--prompt=a", "--input=b"], ["one place", "--input=b"]),
        ("generate", ["--num_samples=0"], ["num_samples"]),
        ("neighbors", [], ["A word is needed"]),
        ("neighbors", ["--k=0", "word2"], ["--k=0"]),
        ("neighbors", ["word2", "Word7"], ["'Word7' (did you mean word7", "5,003 words"]),
        ("neighbors", ["--table=rows", "word2"], ["one of the run's, words", "rows"]),
    ],
)
def test_mistakes(trained, text, tmp_path, command, flags, words):
    empty = tmp_path / "empty.txt"
    empty.touch()
    flags = [flag.format(text=text, empty=empty) for flag in flags]
    message = failure(f"lmscale.{command}", [f"--workdir={trained}", *flags], log=tmp_path / "log")
    for word in words:
        assert word in message
