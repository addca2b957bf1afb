"""The report of a first hour with GPUs: its commands are those of the launch folder, and no part stops another."""

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PARTS = [
    "machine",
    "tensorflow",
    "losses",
    "steps_per_call",
    "step_time",
    "peers",
    "memory",
    "profile",
    "nccl",
]


@pytest.fixture(scope="module")
def gpu_report():
    path = ROOT / "launch" / "shared" / "gpu_report.py"
    spec = importlib.util.spec_from_file_location("gpu_report", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def show(*flags):
    """What --print prints: [(part, words)]."""
    script = ROOT / "launch" / "shared" / "gpu_report.py"
    command = [sys.executable, script, "--print", *flags]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True, timeout=60)
    _, *found = re.split(r"^(\w+): ", result.stdout, flags=re.MULTILINE)
    return [(name, shlex.split(words)) for name, words in zip(found[::2], found[1::2], strict=True)]


@pytest.mark.parametrize("flags", [(), ("--cpu",)])
def test_commands_have_flags_and_scripts_that_exist(flags):
    shown = show(*flags)
    assert list(dict.fromkeys(name for name, _ in shown)) == PARTS
    for name, words in shown:
        # On GPUs each command is told which, but for those that look for them.
        assert (words[0] == "env") == (not flags and name not in ("machine", "tensorflow")), name
        for module in (word.removeprefix("lmscale.") for word in words if word.startswith("lmscale.")):
            source = (ROOT / "lmscale" / f"{module}.py").read_text()
            for other in re.findall(r"adopt_module_key_flags\((\w+)\)", source):
                source += (ROOT / "lmscale" / f"{other}.py").read_text()
            used = {word[2:].partition("=")[0] for word in words if word.startswith("--")} - {""}
            assert used <= set(re.findall(r"DEFINE_\w+\(\s*\"(\w+)\"", source)), words
            if module == "train":
                assert ("--cpu_devices=1" in words or "--cpu_devices=2" in words) == (
                    bool(flags) or any(word.endswith("cpu_float32") for word in words)
                )
    assert (ROOT / "launch" / "local_workers.sh").exists()
    assert [name for name, _ in show("--parts=nccl,memory", *flags)] == ["nccl"] * 3 + ["memory"]


def test_what_fails_is_told_and_stops_nothing(gpu_report, tmp_path, monkeypatch, capsys):
    """By stand-ins: a part that works, one whose command fails, one that is not there, one that leaves rubbish."""

    def python(code):
        return {"run": [sys.executable, "-c", code]}

    def part(name, commands, read=lambda logs: logs["run"].read_text(), **more):
        return gpu_report.Part(name, commands, read, **more)

    parts = [
        part("works", python("import os; print(os.environ['SEEN'])"), variables={"SEEN": "it"}),
        part("fails", python("import sys; sys.exit('| no device')")),
        part("absent", {"run": ["/no/such/command"]}),
        part("rubbish", python("print('{')"), read=lambda logs: json.loads(logs["run"].read_text())),
        part("left_out", {}, skipped="one GPU"),
        part("last", python("print(7)")),
    ]
    monkeypatch.setattr(gpu_report.Parts, "all", lambda self: parts)
    monkeypatch.setattr(gpu_report.Parts, "data", lambda self: [sys.executable, "-c", ""])
    monkeypatch.setattr(sys, "argv", ["gpu_report.py", "--cpu", f"--output={tmp_path}"])
    assert gpu_report.main() == 1
    report = json.loads((tmp_path / "report.json").read_text())["parts"]
    statuses = {name: part["status"] for name, part in report.items()}
    failed = dict.fromkeys(("fails", "absent", "rubbish"), "failed")
    assert statuses == {"works": "ok", **failed, "left_out": "skipped", "last": "ok"}
    assert report["works"]["results"] == "it\n"
    assert "ended with 1: | no device" in report["fails"]["reason"]
    assert "No such file" in report["absent"]["reason"]
    assert report["rubbish"]["reason"].startswith("JSONDecodeError: ")
    text = (tmp_path / "report.md").read_text()
    assert "a rehearsal on the CPU" in text
    assert r"\| no device" in text
    assert capsys.readouterr().out == text + "\n"


def line(step, loss, **tags):
    return {"step": step, "sampled_loss_nats": loss, "step_secs": 0.1 * step, "skipped_steps": 0, **tags}


def test_losses_that_differ_fail_the_part(gpu_report, tmp_path):
    """float32 to 1e-3, narrow ones to 2e-2; a step that overflowed has no loss to compare."""
    (part,) = (p for p in gpu_report.Parts(output=tmp_path, cpu=True, num_gpus=0).all() if p.name == "losses")

    def read(**runs):
        for name in part.commands:
            folder = tmp_path / "losses" / name / "train"
            folder.mkdir(parents=True, exist_ok=True)
            lines = runs.get(name, [line(1, 4.0), line(2, 2.0)])
            (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
        return part.read(dict.fromkeys(part.commands))

    scaled = [
        line(1, None, loss_scale=4.0, overflowed_steps=1),
        line(2, 2.01, loss_scale=2.0, overflowed_steps=0),
    ]
    results = read(float16=scaled)
    assert results["float16"]["steps_compared"] == 1
    assert results["float16"]["largest_difference"] == pytest.approx(0.005)
    assert (results["float16"]["loss_scale"], results["float16"]["overflowed_steps"]) == (2.0, 1)
    with pytest.raises(gpu_report.PartFailedError, match="the losses of float32 are not"):
        read(float32=[line(1, 4.0), line(2, 2.01)])
