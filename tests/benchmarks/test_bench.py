"""The benchmark runs, at sizes that take seconds, and its report has its shape. Times are not tested."""

import dataclasses
import importlib.util
import json
import math
import os
import pathlib
import re
import subprocess
import sys

import pytest

from lmscale.benchmarks import report, sides, step_time, task, time_to_quality
from lmscale.benchmarks.peers.peer import ModelShape

REPOSITORY = pathlib.Path(__file__).parents[2]
HAS_TORCH = importlib.util.find_spec("torch") is not None
HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None
TINY = ["--embed_dim=16", "--num_layers=1", "--batch_size=8", "--window=5", "--num_sampled=64", "--repeats=2"]


def bench(*arguments, output):
    completed = subprocess.run(
        [sys.executable, "-m", "lmscale.bench", f"--output={output}", *arguments],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    return completed


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    output = tmp_path_factory.mktemp("bench")
    arguments = ["--vocab_sizes=2001,500", "--sections=memory,limits,communication,startup,step_time", *TINY]
    arguments.append("--sides=lmscale,lmscale_body,pytorch_full,keras_full,tensorflow_adagrad")
    completed = bench(*arguments, output=output)
    assert completed.returncode == 0, completed.stderr
    assert all(line.startswith("[bench] ") for line in completed.stderr.splitlines()), completed.stderr
    return output, completed.stdout


def test_results_are_on_stdout_and_in_files(results):
    output, stdout = results
    last = json.loads(stdout.splitlines()[-1])
    assert last == json.loads((output / "results.json").read_text())
    assert (output / "report.md").read_text() in stdout
    assert list(last["sections"]) == ["step_time", "limits", "startup", "communication", "memory"]
    for section in last["sections"].values():
        assert {"date", "processor", "command", "tensorflow", "cores"} <= section["environment"].keys()
        assert "failed" not in section, section
    assert (output / "step_time.png").exists() == HAS_MATPLOTLIB


def test_every_side_is_timed_at_every_size_and_compared(results):
    output, _ = results
    section = json.loads((output / "results.json").read_text())["sections"]["step_time"]
    assert [size["vocab_size"] for size in section["sizes"]] == [500, 2001]
    expected = {"lmscale", "lmscale_body", "keras_full", "tensorflow_adagrad"}
    expected |= {"pytorch_full"} if HAS_TORCH else set()
    assert {n["side"] for n in section["not_run"]} == (set() if HAS_TORCH else {"pytorch_full"})
    assert all("not installed" in n["reason"] for n in section["not_run"])
    for size in section["sizes"]:
        assert set(size["sides"]) == expected
        for name, result in size["sides"].items():
            assert 0 < result["min"] <= result["median"] <= result["max"]
            assert result["rounds"] == 2
            assert result["tokens_per_sec"] == pytest.approx(40 / result["median"])
            assert set(result["times_ours"]) == {"lmscale"}
            assert (result["times_ours"]["lmscale"] == 1) == (name == "lmscale")
        assert "over_smallest" in size["sides"]["lmscale"]
    assert section["sizes"][0]["sides"]["lmscale"]["over_smallest"] == 1


def test_parts_are_compared_with_the_machine(results):
    output, _ = results
    section = json.loads((output / "results.json").read_text())["sections"]["limits"]
    rates = section["matrix_flops_per_sec"]
    assert set(rates) == {"float32", "bfloat16"}
    for part in section["parts"]:
        limit = max(part["flops"] / rates[part["dtype"]], part["bytes"] / section["copy_bytes_per_sec"])
        assert part["limit_secs"] == pytest.approx(limit)
        assert part["achieved"] == pytest.approx(limit / part["secs"])
    by_name = {(part["name"], part["dtype"]): part for part in section["parts"]}
    for dtype, ratio in section["vocabulary_over_body"].items():
        whole = by_name["pull, loss, push, update", dtype]["secs"]
        assert ratio == pytest.approx(whole / section["body_secs"][dtype])
    # tokens * samples * embed_dim, twice for multiply and add, three products.
    assert by_name["sampled loss", "bfloat16"]["flops"] == 40 * 64 * 16 * 2 * 3
    assert by_name["exact evaluation", "float32"]["flops"] == 40 * 2001 * 16 * 2
    assert by_name["exact evaluation", "float32"]["bytes"] == 2001 * 16 * 4
    # Hidden states and labels' rows of 40 tokens, 64 sampled rows; their gradients.
    assert by_name["sampled loss", "float32"]["bytes"] == (40 + 40 + 64) * 16 * 4 * 2
    # Distinct rows read for the pull; weight and moment read and written for the update.
    for name in ("pull, push, update", "pull, loss, push, update"):
        rows, rest = divmod(by_name[name, "float32"]["bytes"], 16 * 4 * 5)
        assert rest == 0
        assert 64 < rows < 8 * 6 + 64


def test_exchanges_are_compared(results):
    output, stdout = results
    section = json.loads((output / "results.json").read_text())["sections"]["limits"]
    assert [exchange["num_devices"] for exchange in section["exchanges"]] == [1, 4]
    for exchange in section["exchanges"]:
        assert exchange["speedup"] == pytest.approx(exchange["secs"]["static"] / exchange["secs"]["chosen"])
    assert "as chosen, ms" in stdout


def test_bytes_are_counted_beside_what_must_move(results):
    output, stdout = results
    section = json.loads((output / "results.json").read_text())["sections"]["communication"]
    assert [count["num_devices"] for count in section["counts"]] == [2, 4, 8, 16]
    for count in section["counts"]:
        # In one process nothing is padded.
        for way, least in count["must_move"].items():
            assert count["bytes"][way] == least > 0
        assert count["bytes"]["static"] > 1.5 * min(count["must_move"].values())
    assert "| everything to everyone |" in stdout


def test_start_up_and_memory_are_measured(results):
    output, _ = results
    sections = json.loads((output / "results.json").read_text())["sections"]
    assert len(sections["startup"]["secs"]) == 1
    assert sections["startup"]["secs"][0] > 0
    # 2,001 rows of 16 weights and as many second moments, a bias and its own, and the step of either: floats.
    whole = 2001 * (2 * 16 + 2 + 2) * 4 / 2**20
    for entry in sections["memory"]["devices"]:
        n = entry["num_devices"]
        assert entry["whole_mib"] == pytest.approx(whole)
        assert len(entry["device_mib"]) == n
        # One scratch row a device, and at most one of rounding up.
        assert 1 < entry["over_1_nth"] <= 1 + 2 * n / 2001
        assert entry["first_step_mib"] > 0
        assert entry["small"]["whole_mib"] == pytest.approx(whole * 320 / 2001)
    assert [entry["num_devices"] for entry in sections["memory"]["devices"]] == [1, 2, 4, 8]
    assert sections["memory"]["evaluation"]["peak_above_mib"] > 0


def test_the_largest_vocabulary(tmp_path):
    shape = ModelShape(
        vocab_size=0, embed_dim=64, hidden_dim=8, num_layers=1, batch_size=2, window=3, num_sampled=11
    )
    measured = task.run_task(
        "lmscale.benchmarks.memory_tasks:measure_largest",
        {"shape": vars(shape), "rule": "Adam", "options": {"beta_1": 0.0}, "limit_gib": 2.0},
        log=tmp_path / "log",
    )
    # Weight and second moment of row and bias, and the step of either.
    assert measured["row_bytes"] == 4 * (2 * 64 + 2 + 2)
    assert measured["vocab_size"] > 10_000
    assert measured["vocab_size"] * measured["row_bytes"] / 2**30 < measured["peak_gib"] <= 2.0


def test_a_section_that_fails_keeps_what_was_measured(tmp_path):
    def call(section):
        code = f"from lmscale import bench; bench._measure = lambda *_: {section}; bench.run_main(bench.main)"
        return subprocess.run(
            [sys.executable, "-c", code, f"--output={tmp_path}", "--sections=startup"],
            env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            text=True,
            check=False,
        )

    assert call({"failed": "too early"}).returncode == 1
    assert "Failed: too early" in (tmp_path / "report.md").read_text()
    assert call({"secs": [7.5]}).returncode == 0
    assert call({"failed": "too late"}).returncode == 1
    assert "step: 7.5 s" in (tmp_path / "report.md").read_text()
    (tmp_path / "results.json").write_text('{"sections": {"startup": {"secs": [1.0]}}}')
    completed = call({"secs": [8.5]})
    assert completed.returncode == 2
    assert "results.json must hold" in completed.stderr


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--vocab_sizes=10", "--num_sampled. Received: '10', num_sampled=64"),
        ("--vocab_sizes=many", "Received: 'many'"),
        ("--sections=speed", "--sections must be of step_time, "),
        ("--sides=jax", "--sides must be of lmscale, "),
        ("--sections=samples", "runs/none"),
    ],
)
def test_bad_input(tmp_path, argument, message):
    completed = bench(*TINY, argument, "--data_dir=runs/none", output=tmp_path / "out")
    assert completed.returncode == 2
    assert message in completed.stderr
    assert not (tmp_path / "out").exists()


class FakeProcess:
    def __init__(self, name, seconds):
        self.name, self._seconds = name, iter(seconds)

    def turn(self):
        return next(self._seconds)


def test_sides_take_turns_and_slow_ones_fewer():
    processes = [
        FakeProcess("fast", [9.0, 1.0, 2.0, 3.0, 1.0, 1.0]),
        FakeProcess("slow", [5.0, 6.0, 7.0, 8.0]),
    ]
    seconds, died = sides.take_turns(processes, repeats=5)
    assert seconds == {"fast": [1.0, 2.0, 3.0, 1.0, 1.0], "slow": [6.0, 7.0, 8.0]}
    assert not died
    assert sides.paired_ratio(seconds["slow"], seconds["fast"]) == 3.5
    assert sides.summary([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0, "rounds": 3}


def test_a_side_that_dies_on_the_way_does_not_take_the_others_with_it(tmp_path, monkeypatch):
    class Dying(FakeProcess):
        def turn(self):
            raise sides.SideFailedError("killed")

    seconds, died = sides.take_turns([Dying("dying", []), FakeProcess("fast", [1.0, 2.0])], repeats=1)
    assert seconds == {"fast": [2.0]}
    assert died == {"dying": "killed"}
    # A real one, killed while it is idle.
    shape = ModelShape(
        vocab_size=100, embed_dim=4, hidden_dim=4, num_layers=1, batch_size=2, window=3, num_sampled=11
    )
    process = sides.SideProcess("keras_full", shape, log_dir=tmp_path)
    process._process.kill()
    process._process.wait()
    with pytest.raises(sides.SideFailedError, match="keras_full ended with exit code -9"):
        process.turn()
    process.close()


def test_a_turn_is_half_a_second(monkeypatch):
    process = object.__new__(sides.SideProcess)
    process.name, process._process = "fake", subprocess.Popen(["cat"], stdin=subprocess.PIPE, text=True)
    answers = iter([(9.0, 0.9), (0.2, 0.02), (0.3, 0.04), (0.4, 0.03)])
    monkeypatch.setattr(
        process, "_answer", lambda: dict(zip(("call_secs", "step_secs"), next(answers), strict=True))
    )
    assert process.turn() == 0.02  # Two calls at least, the first not counted, however long it took.
    assert process.turn() == 0.03
    process.close()


def test_groups_fit_into_memory_and_each_has_our_sides(monkeypatch):
    shape = ModelShape(
        vocab_size=1_000_000,
        embed_dim=256,
        hidden_dim=256,
        num_layers=2,
        batch_size=32,
        window=35,
        num_sampled=2048,
    )
    names = ["lmscale", "lmscale_bfloat16", "pytorch_adaptive", "tensorflow_adagrad", "tensorflow_adam"]
    small = dataclasses.replace(shape, vocab_size=10_000)
    for gib in (16, 20, 24):
        room = gib * 2**30
        monkeypatch.setattr(step_time, "available_bytes", lambda room=room: room)
        groups = step_time._groups(names, shape, small)
        assert len(groups) > 1
        for group in groups:
            needed = sum(sides.SIDES[name].memory_bytes(shape) for name in group)
            if len(group) > 1:
                assert group[:2] == ["lmscale", "lmscale_bfloat16"]
                needed += sum(sides.SIDES[name].memory_bytes(small) for name in group[:2])
            assert needed <= room
        assert {name for group in groups for name in group} == set(names)
    monkeypatch.setattr(step_time, "available_bytes", lambda: 10 * 2**30)
    assert step_time._groups(names[:2], shape, small) == [["lmscale"], ["lmscale_bfloat16"]]


def test_a_side_that_dies_says_why(tmp_path):
    shape = ModelShape(
        vocab_size=10, embed_dim=4, hidden_dim=4, num_layers=1, batch_size=2, window=3, num_sampled=11
    )
    with pytest.raises(sides.SideFailedError, match=r"num_sampled must be .* at most vocab_size"):
        sides.SideProcess("lmscale", shape, log_dir=tmp_path)


def test_when_quality_is_reached():
    peer = [
        {"epoch": i + 1, "steps": 100, "step_secs_median": secs, "valid_loss_nats": math.log(perplexity)}
        | {"train_secs": 60.0}
        for i, (perplexity, secs) in enumerate([(200.0, 0.6), (150.0, 0.5), (120.0, 0.7)])
    ]
    ours = [
        {"epoch": i + 1, "secs": 10.0 * (i + 1), "clock_secs": 11.0 * (i + 1), "perplexity": perplexity}
        for i, perplexity in enumerate([210.0, 160.0, 149.0])
    ]
    first, second, third = time_to_quality._reached(peer, ours, startup_secs=7.0)
    assert (first["peer_secs"], first["our_secs"], first["our_epoch"]) == (50.0, 20.0, 2)
    assert (second["peer_secs"], second["our_secs"], second["fraction"]) == (100.0, 30.0, 0.3)
    assert (second["peer_clock_secs"], second["our_clock_secs"]) == (120.0, 40.0)
    assert third["our_secs"] is None
    assert third["fraction"] is None


def test_seconds_are_those_of_the_fastest_epoch(tmp_path):
    train = [(10, 0.5, 4.0), (20, 1.0, 2.0), (30, 1.5, 2.0), (40, 2.0, 3.0)]  # step, epoch, step_secs
    lines = {
        "train": [{"step": step, "epoch": epoch, "step_secs": secs} for step, epoch, secs in train],
        "eval": [{"step": step, "valid/exact_loss_nats": math.log(7.0)} for step in (20, 40)],
    }
    for name, entries in lines.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(map(json.dumps, entries)))
    first, second = time_to_quality._evaluations(tmp_path)
    assert first == {"epoch": 1.0, "secs": 50.0, "clock_secs": 60.0, "perplexity": pytest.approx(7.0)}
    assert second == {"epoch": 2.0, "secs": 100.0, "clock_secs": 110.0, "perplexity": pytest.approx(7.0)}


def test_an_output_below_which_no_run_could_be(tmp_path):
    completed = bench("--sections=startup", output=tmp_path / "lr[1]")
    assert completed.returncode == 2
    assert completed.stderr.startswith("error: --output must not have square brackets around characters")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named(tmp_path):
    (tmp_path / "results.json.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as caught:
        report.write({}, tmp_path)
    assert caught.value.filename == str(tmp_path / "results.json.tmp")


def test_report_of_the_sections_that_take_long(tmp_path):
    devices = [
        {
            "num_devices": n,
            "device_mib": [80.0 / n] * n,
            "whole_mib": 80.0,
            "over_1_nth": 1.0,
            "step_mib": 5.0,
            "first_step_mib": 9.0,
            "small": {"first_step_mib": 8.0, "step_mib": 4.0},
        }
        for n in (1, 2)
    ]
    reached = {"peer_epoch": 1, "perplexity": 200.0, "peer_secs": 50.0, "our_secs": None, "our_epoch": None}
    reached |= {"peer_clock_secs": 60.0, "our_clock_secs": None}
    environment = dict.fromkeys(("date", "command", "cores", "processor", "memory_gib", "python"), "x")
    environment["gpus"] = ["a GPU, 1.0"]
    environment |= {"instructions": ["avx2"], "tensorflow": "1", "keras": "2", "torch": None}
    sections = {
        "startup": {"secs": [9.5, 10.0]},
        "memory": {
            "vocab_size": 1000,
            "devices": devices,
            "small_vocab_size": 500,
            "evaluation": {"tokens": 40, "peak_above_mib": 12.0, "small": {"peak_above_mib": 11.0}},
            "largest": [
                {"rule": "Adam", "options": {"beta_1": 0.0}, "failed": "no room"},
                {"rule": "SGD", "options": {}, "vocab_size": 77_000, "row_bytes": 516, "peak_gib": 1.5}
                | {"limit_gib": 2.0},
            ],
        },
        "time_to_quality": {
            "peer": [{"steps": 100, "step_secs_median": 0.5, "valid_loss_nats": 5.0}],
            "ours": [{"epoch": 1, "secs": 10.0, "perplexity": 210.0}],
            "reached": [reached | {"fraction": None}],
            "startup_secs": 7.0,
            "peer_recipe": "SGD",
            "our_recipe": "Adam",
        },
        "samples": {
            "train_steps": 10,
            "results": [
                {"num_sampled": 8, "perplexity": 110.0, "train_secs": 1.0, "over_full": 1.1},
                {"num_sampled": 99, "perplexity": 100.0, "train_secs": 9.0, "over_full": 1.0},
            ],
        },
    }
    for section in sections.values():
        section["environment"] = environment
    report.write(sections, tmp_path)
    text = (tmp_path / "report.md").read_text()
    for part in (
        "first step: 9.5, 10.0 s",
        "x GiB; a GPU, 1.0; tensorflow 1",
        "| 2 | 40.0 | 1.0000 | 9 | 5 | 8 | 4 |",
        "12 MiB, with 500 rows 11 MiB",
        "Adam, beta_1=0: failed: no room",
        "77,000 rows of 516 bytes, peak 1.50 GiB",
        "| 1 | 200.0 | 50 | 60 |  |  |  |  |",
        "| 8 | 110.0 | 1.100 | 1 |",
    ):
        assert part in text
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1, table
    assert report.read(tmp_path) == sections
    if HAS_MATPLOTLIB:
        assert {path.name for path in tmp_path.glob("*.png")} == {"time_to_quality.png", "samples.png"}
