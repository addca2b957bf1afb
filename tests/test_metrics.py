import contextlib
import json
import logging
import math
import os
import pty
import re
import sys
import time

import numpy as np
import pytest
import tensorflow as tf
from boards import LOADERS, Board
from tensorboard.backend.event_processing import event_accumulator, plugin_event_accumulator
from tensorboard.util import tensor_util

from lmscale.metrics import (
    MetricsWriter,
    device_memory_mib,
    format_log_line,
    progress,
    read_metrics,
)


def scalars_of_scripts(directory):
    """What scripts read: {tag: [(step, value), ...]}."""
    events = event_accumulator.EventAccumulator(str(directory), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def tensorboard_scalars(directory):
    """What TensorBoard itself shows."""
    events = plugin_event_accumulator.EventAccumulator(str(directory), size_guidance={"tensors": 0})
    events.Reload()
    return {
        tag: [(e.step, tensor_util.make_ndarray(e.tensor_proto).item()) for e in events.Tensors(tag)]
        for tag in events.Tags()["tensors"]
        if events.SummaryMetadata(tag).plugin_data.plugin_name == "scalars"
    }


def write_steps(directory, steps, *, value, **kwargs):
    with MetricsWriter(directory, **kwargs) as writer:
        for step in steps:
            writer.scalars(step, {"train/loss_nats": value, "train/tokens": step * 7})


def test_scalars_reach_both_files_under_the_same_tags(tmp_path):
    before = time.time()
    with MetricsWriter(tmp_path) as writer:
        writer.scalars(10, {"train/loss_nats": tf.constant(2.5), "tokens": np.int64(2**40), "ok": 1})
        writer.scalars(20, {"train/loss_nats": np.float32(0.1)})
        # Before it is closed: a process that is killed loses nothing.
        first, second = read_metrics(tmp_path)
        shown = tensorboard_scalars(tmp_path)
    assert before - 1 < first.pop("wall_time") <= second.pop("wall_time") <= time.time() + 1
    assert first == {"step": 10, "train/loss_nats": 2.5, "tokens": 2**40, "ok": 1}
    assert second == {"step": 20, "train/loss_nats": float(np.float32(0.1))}
    assert shown == {
        "train/loss_nats": [(10, 2.5), (20, float(np.float32(0.1)))],
        "tokens": [(10, float(2**40))],
        "ok": [(10, 1.0)],
    }


def test_not_a_number_is_null_in_json(tmp_path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    with MetricsWriter(tmp_path) as writer:
        writer.scalars(1, {"a": math.nan, "b": tf.constant(math.inf), "c": -math.inf, "d": 1.5})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    values = json.loads(line, parse_constant=refuse)
    assert [values[tag] for tag in "abcd"] == [None, None, None, 1.5]
    shown = tensorboard_scalars(tmp_path)
    assert math.isnan(shown["a"][0][1])
    assert shown["b"] == [(1, math.inf)]


def test_resume_removes_later_steps(tmp_path):
    """Killed after step 50 with a checkpoint of step 30, then twice more: no step is doubled, none lost."""
    write_steps(tmp_path, [10, 20, 30, 40, 50], value=1.0)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 60, "train/lo')
    write_steps(tmp_path, [40, 50], value=2.0, resume_step=30)
    write_steps(tmp_path, [], value=3.0, resume_step=40)
    write_steps(tmp_path, [45], value=4.0, resume_step=40)
    expected = [(10, 1.0), (20, 1.0), (30, 1.0), (40, 2.0), (45, 4.0)]
    assert [(line["step"], line["train/loss_nats"]) for line in read_metrics(tmp_path)] == expected
    for shown in (tensorboard_scalars(tmp_path), scalars_of_scripts(tmp_path)):
        assert shown["train/loss_nats"] == expected
        assert shown["train/tokens"] == [(step, 7.0 * step) for step, _ in expected]


def test_resume_from_the_start(tmp_path):
    write_steps(tmp_path, [0, 10], value=1.0)
    write_steps(tmp_path, [20], value=2.0, resume_step=0)
    assert [line["step"] for line in read_metrics(tmp_path)] == [0, 20]
    assert tensorboard_scalars(tmp_path)["train/loss_nats"] == [(0, 1.0), (20, 2.0)]
    write_steps(tmp_path, [0], value=3.0, resume_step=-1)
    assert [line["train/loss_nats"] for line in read_metrics(tmp_path)] == [3.0]
    assert tensorboard_scalars(tmp_path)["train/loss_nats"] == [(0, 3.0)]


def test_without_resume_step_everything_is_kept(tmp_path):
    for value in (1.0, 2.0):
        write_steps(tmp_path, [10], value=value)
    assert [line["train/loss_nats"] for line in read_metrics(tmp_path)] == [1.0, 2.0]
    assert tensorboard_scalars(tmp_path)["train/loss_nats"] == [(10, 1.0), (10, 2.0)]


def test_a_line_cut_short_does_not_spoil_the_next(tmp_path):
    write_steps(tmp_path, [10], value=1.0)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + path.read_text().rstrip("\n"))
    assert len(read_metrics(tmp_path)) == 1
    write_steps(tmp_path, [20], value=2.0)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [10, 20]


def test_read_metrics_of_an_empty_directory(tmp_path):
    assert read_metrics(tmp_path) == []


def test_text_tells_what_runs_from_a_step_on(tmp_path):
    """Three starts; the second and third from the same checkpoint."""
    for resume_step, text in ((-1, "    A = 1"), (30, "    A = 2"), (30, "    A = 3")):
        with MetricsWriter(tmp_path / "train", resume_step=resume_step) as writer:
            writer.text("config", text, step=resume_step + 1)
    for loader in LOADERS:
        assert Board(tmp_path, loader=loader).texts("train") == [(0, "    A = 1"), (31, "    A = 3")]


def test_format_log_line():
    line = format_log_line(
        1200,
        {
            "loss": tf.constant(5.12345),
            "rate": 3e-4,
            "ppl": 167.913,
            "tokens/s": 12345.6,
            "tokens": 1234567,
            "bad": math.nan,
            "worse": math.inf,
            "zero": 0.0,
        },
    )
    assert line == (
        "step 1,200  loss 5.123  rate 0.0003  ppl 167.9  tokens/s 12,346  tokens 1,234,567"
        "  bad nan  worse inf  zero 0"
    )


def screen(output):
    """The lines that a terminal shows after `output`: carriage returns, cursor up and erase line."""
    lines, row, column = [""], 0, 0
    for token in re.findall(r"\x1b\[[?\d;]*[A-Za-z]|.", output, re.DOTALL):
        if token == "\r":
            column = 0
        elif token == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif token == "\x1b[2K":
            lines[row] = ""
        elif re.fullmatch(r"\x1b\[\d*A", token):
            row -= int(token[2:-1] or 1)
        elif not token.startswith("\x1b"):
            lines[row] = lines[row][:column].ljust(column) + token + lines[row][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines if line.strip()]


@contextlib.contextmanager
def terminal(monkeypatch):
    """Makes stderr a terminal of 100 columns. Yields a function that returns what has been written to it."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    controller, device = pty.openpty()
    os.set_blocking(controller, False)

    def read():
        sys.stderr.flush()
        output = b""
        with contextlib.suppress(BlockingIOError):
            while True:
                output += os.read(controller, 1 << 16)
        return output.decode()

    with open(device, "w", buffering=1) as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        yield read
        monkeypatch.undo()
    os.close(controller)


def test_progress_on_a_terminal_stays_below_the_log(monkeypatch):
    log = logging.getLogger("tests.progress")
    lines = [format_log_line(step, {"loss_nats": 5.0}) for step in range(100, 140, 10)]
    with terminal(monkeypatch) as read:
        handler = logging.StreamHandler()
        logging.getLogger().addHandler(handler)
        try:
            with progress(total=140, initial=100, description="training") as update:
                for step, line in zip(range(100, 140, 10), lines, strict=True):
                    update(step)
                    log.warning(line)
                time.sleep(0.6)
                during = read()
                with update.part(total=9, description="evaluating valid") as update_part:
                    update_part(4)
                    time.sleep(0.6)
                    during_part = read()
            log.warning("after")
        finally:
            logging.getLogger().removeHandler(handler)
        after = read()
    shown = screen(during)
    assert shown[:-1] == lines
    assert re.match(r"training .*130/140", shown[-1])
    shown = screen(during + during_part)
    assert re.match(r"training .*130/140", shown[-2])
    assert re.match(r"evaluating valid .*4/9", shown[-1])
    assert screen(during + during_part + after) == [*lines, "after"]


def test_progress_is_silent_elsewhere(capsys):
    with progress(total=10, initial=0, description="training") as update:
        update(5)
    assert capsys.readouterr() == ("", "")


def test_device_memory_of_a_cpu():
    if tf.config.list_logical_devices("GPU"):
        pytest.skip("this machine has a GPU")
    before = device_memory_mib()["cpu"]
    block = np.ones(2**26, np.uint8)
    after = device_memory_mib()
    assert list(after) == ["cpu"]
    assert 50 < before <= after["cpu"] + 2, "the kernel counts with a slack"
    del block
    assert device_memory_mib()["cpu"] > after["cpu"] - 2, "a peak, not what is used now"
