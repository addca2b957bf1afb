"""soak.sh without its runs: which faults it chooses, what it counts as a problem, and its flags."""

import json
import runpy
from types import SimpleNamespace

import pytest
from launching import LAUNCH, run

SOAK = runpy.run_path(str(LAUNCH / "shared" / "soak.py"))
KINDS, LOST, STOPPED, KILLED = SOAK["KINDS"], 69, 75, -9


def printed(tmp_path, *flags):
    result = run("soak.sh", "--print", *flags, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_faults_are_those_of_the_seed_and_of_every_kind(tmp_path):
    plans = printed(tmp_path, "--faults=200", "--seed=7")
    assert plans == [SOAK["planned"](number, seed=7, sizes=[2, 4]) for number in range(200)]
    assert plans != printed(tmp_path, "--faults=200", "--seed=8")
    assert (
        printed(tmp_path, "--faults=50", "--seed=7") == plans[:50]
    )  # A longer soak begins like a shorter one.
    assert {plan["kind"] for plan in plans} == set(KINDS)
    assert {plan["processes"] for plan in plans} == {2, 4}
    for plan in plans:
        assert (plan["rank"] == 0) or "chief" not in plan["kind"]
        assert 0 <= plan["rank"] < plan["processes"]
        assert "other" not in plan["kind"] or plan["rank"] > 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "flag", ["--faults=0", "--faults=x", "--seed=-1", "--processes=1", "--folder=", "--no", "x"]
)
def test_wrong_flags(tmp_path, flag):
    result = run("soak.sh", "--print", flag, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert flag.partition("=")[2] in result.stderr


def problems(kind, codes, *, rank=1, expected=20, resumed=20, step=25, text=""):
    started = SimpleNamespace(printed=lambda: text, step=lambda: step, resumed_at=lambda: resumed)
    soak = SOAK["Soak"].__new__(SOAK["Soak"])
    return soak._problems(started, kind, rank, codes, expected, int(kind in SOAK["DAMAGES"]))


def test_what_is_as_promised_is_no_problem():
    assert problems("kill_other", [LOST, KILLED]) == []
    assert problems("stop_chief", [KILLED, LOST, LOST, LOST], rank=0) == []
    assert problems("term", [STOPPED, STOPPED]) == []
    assert problems("flip_bit", [STOPPED, STOPPED], text="DAMAGED CHECKPOINT: step 30") == []
    assert problems("kill_other", [0, 0], step=None, resumed=0) == []  # There was no step left to do.
    assert problems("kill_chief", [KILLED, LOST], rank=0, expected=0, resumed=0, text="starting over") == []


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"kind": "kill_other", "codes": [2, KILLED]}, "codes"),
        ({"kind": "kill_other", "codes": [KILLED, KILLED]}, "codes"),
        ({"kind": "term", "codes": [STOPPED, LOST]}, "codes"),
        ({"kind": "kill_other", "codes": [LOST, KILLED], "resumed": 10}, "resumed at 10 instead of 20"),
        ({"kind": "kill_other", "codes": [LOST, KILLED], "text": "starting over"}, "silent restart"),
        ({"kind": "truncate", "codes": [STOPPED, STOPPED]}, "0 damaged checkpoints"),
        ({"kind": "term", "codes": [STOPPED] * 2, "text": "DAMAGED CHECKPOINT"}, "1 damaged checkpoints"),
        ({"kind": "kill_other", "codes": [LOST, KILLED], "step": None}, "ended before its first step"),
    ],
)
def test_what_is_not_as_promised_is_a_problem(wrong, words):
    (problem,) = problems(**wrong)
    assert words in problem


@pytest.mark.parametrize("kind", SOAK["DAMAGES"])
def test_damage_is_done_to_the_newest_checkpoint_alone(tmp_path, kind):
    for step in (10, 20):
        directory = tmp_path / "checkpoints" / f"step_{step:08d}"
        directory.mkdir(parents=True)
        for name in ("metadata.json", "tensors.index", "tensors.data-00000-of-00001"):
            (directory / name).write_bytes(bytes(range(100)))
    SOAK["damage"](tmp_path, kind, 0.7)
    older, newer = (tmp_path / "checkpoints" / f"step_{step:08d}" for step in (10, 20))
    assert {path.read_bytes() for path in older.iterdir()} == {bytes(range(100))}
    assert SOAK["damaged_steps"](tmp_path) == [20]
    (newer / SOAK["MARK"]).unlink()
    changed = [path for path in newer.iterdir() if path.read_bytes() != bytes(range(100))]
    if kind == "lose_index":
        assert (changed, (newer / "tensors.index").exists()) == ([], False)
        return
    (path,) = changed
    content = path.read_bytes()
    if kind == "truncate":
        assert content == bytes(range(len(content)))
        assert len(content) < 100
    else:
        (difference,) = {a ^ b for a, b in zip(content, range(100), strict=True)} - {0}
        assert difference.bit_count() == 1


def test_the_summary_counts_what_must_be_0():
    line = {"fault": 1, "kind": "term", "finished": False, "problems": [], "ended_secs": 2.0, "secs": 9.0}
    late = line | {"fault": None, "finished": True, "secs": 11.0}
    found = SOAK["summary"]([line, late, line | {"problems": ["hang: [None]", "resumed at 1 instead of 2"]}])
    assert (found["faults"], found["finished_runs"], found["by_kind"]["term"]) == (2, 1, 2)
    assert (found["hangs"], found["wrong_resumes"], found["silent_restarts"], found["other_bits"]) == (
        1,
        1,
        0,
        0,
    )
    found = SOAK["summary"]([late | {"problems": ["other bits in x", "codes [1] instead of [2]"]}])
    assert (found["other_bits"], found["other_problems"], found["mean_secs"]) == (1, 1, 11.0)
