"""What a run reports while it goes: TensorBoard, metrics.jsonl, log lines, a progress bar."""

import contextlib
import io
import json
import logging
import math
import numbers
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tensorflow as tf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.text.summary_v2 import text_pb

from lmscale.event_files import SESSION, EventFile, event_files
from lmscale.paths import naming
from lmscale.storage import as_path, is_remote
from lmscale.workdir import replace_file

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
_WALL_TIME_DIGITS = 3


class MetricsWriter:
    """Writes scalars to TensorBoard and, under the same tags, to metrics.jsonl.

    metrics.jsonl holds one JSON object for each call of `scalars`: "step", "wall_time" (seconds since 1970)
    and a number for each tag. NaN and infinity are null there, since JSON lacks them; TensorBoard gets them.
    In a store, such as gs://bucket/run, it is in parts: metrics.000000.jsonl, metrics.000001.jsonl ...
    Wall times never go back, whatever the clock does: they go on from the latest.

    Everything of one writer is in one TensorBoard file, in order, and on its way to disk when a call
    returns: a run that is killed loses nothing that it reported. Use it as a context manager.
    """

    def __init__(self, directory, *, resume_step: int | None = None):
        """Opens the directory for appending.

        Args:
          directory: where to write; made if absent.
          resume_step: the run goes on from this step. What it wrote for later steps, before it was killed
            or went back, is removed from metrics.jsonl and hidden by TensorBoard. -1: it starts, and
            nothing that a run left here before its first checkpoint is kept. None: keep all.

        Raises:
          OSError: with the file's name, as from all methods, if the disk is full.
        """
        directory = as_path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / METRICS_FILE
        last_step = math.inf if resume_step is None else resume_step
        latest = max([0.0, *(_keep_lines(path, last_step=last_step) for path in _parts(directory))])
        self._clock = _Clock(latest + 10**-_WALL_TIME_DIGITS)  # It was rounded, perhaps down.
        is_first = len(event_files(directory)) == len(event_files(directory, ending=SESSION))
        self._lines: Any = (
            _StoredLines(directory) if is_remote(directory) else open(self._path, "a", encoding="utf-8")  # noqa: SIM115 (held until close)
        )
        self._events = EventFile(directory)
        # TensorBoard drops events of steps from this one on, which earlier files hold. It takes the first
        # START of a directory for the start, and only those after it for restarts.
        if is_first or resume_step is not None:
            first_step = 0 if resume_step is None else resume_step + 1
            start = SessionLog(status=SessionLog.START)
            self._events.add(Event(session_log=start, step=first_step, wall_time=self._clock()))

    def scalars(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Reports the metrics of one step.

        Args:
          step: int.
          metrics: TensorBoard tag to number: Python's, numpy's, or a scalar tensor.
        """
        wall_time = self._clock()
        values = {tag: _number(value) for tag, value in metrics.items()}
        # `simple_value`, not the tensors that tf.summary writes: TensorBoard's EventAccumulator, by which
        # scripts read event files, hides the later steps of a resumed run only for these.
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
        self._events.add(Event(summary=summary, step=step, wall_time=wall_time))
        line: dict[str, float | None] = {"step": int(step), "wall_time": round(wall_time, _WALL_TIME_DIGITS)}
        line |= {tag: value if math.isfinite(value) else None for tag, value in values.items()}
        with naming(self._path):
            self._lines.write(json.dumps(line) + "\n")
            self._lines.flush()

    def text(self, tag: str, markdown: str, *, step: int = 0) -> None:
        """Shows a text, in Markdown, on TensorBoard's Text tab: above those of earlier steps."""
        self._events.add(Event(summary=text_pb(tag, markdown), step=step, wall_time=self._clock()))

    def close(self) -> None:
        try:
            with naming(self._path):
                self._lines.close()
        finally:
            self._events.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def read_metrics(directory) -> list[dict]:
    """The objects of a directory's metrics.jsonl, in the order written. A last line cut short is left out."""
    return [line for path in _parts(as_path(directory)) for _, line in _lines(path) if line is not None]


def format_log_line(step: int, metrics: Mapping[str, Any]) -> str:
    """One line for people: `step 1,200  loss_nats 5.123  tokens_per_sec 12,345`. Order and names as given."""
    fields = [f"{name} {_format(_number(value))}" for name, value in metrics.items()]
    return "  ".join([f"step {step:,}", *fields])


class ProgressBar:
    """A line of the bars that `progress` shows; calling it with a step moves it there."""

    def __init__(self, bars: Progress | None, *, total: int, initial: int, description: str):
        self._bars = bars
        if bars is not None:
            self._task = bars.add_task(description, total=total, completed=initial)

    def __call__(self, step: int) -> None:
        if self._bars is not None:
            self._bars.update(self._task, completed=step)

    @contextlib.contextmanager
    def part(self, *, total: int, description: str) -> Iterator["ProgressBar"]:
        """Shows a second bar below, of a long piece of work within a step, until the block ends."""
        bar = ProgressBar(self._bars, total=total, initial=0, description=description)
        try:
            yield bar
        finally:
            if self._bars is not None:
                self._bars.remove_task(bar._task)


@contextlib.contextmanager
def progress(*, total: int, initial: int, description: str, is_shown: bool = True) -> Iterator[ProgressBar]:
    """Shows a progress bar on stderr while it is a terminal, and nothing otherwise.

    While the bar is shown, what is printed or logged appears above it. Lines that native code writes to the
    terminal by itself may be drawn over.

    Args:
      total: the last step.
      initial: the step from which the run goes on.
      description: shown before the bar.
      is_shown: False for none.

    Yields:
      `ProgressBar`.
    """
    if not is_shown or not sys.stderr.isatty():
        yield ProgressBar(None, total=total, initial=initial, description=description)
        return
    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(file=sys.stderr),
        redirect_stdout=sys.stdout.isatty(),
        refresh_per_second=2,
        transient=True,
    )
    terminal = sys.stderr
    with bars, _logging_to(terminal, instead=sys.stderr):
        yield ProgressBar(bars, total=total, initial=initial, description=description)


def device_memory_mib() -> dict[str, float]:
    """The most memory used so far, by device.

    Returns:
      {"gpu_0": ..., ...}: the peak that TensorFlow allocated on each GPU since the process started, in MiB.
      Without a GPU {"cpu": ...}: the process's peak resident memory, code and libraries included.
    """
    gpus = tf.config.list_logical_devices("GPU")
    if not gpus:
        return {"cpu": _peak_resident_bytes() / 2**20}
    return {
        f"gpu_{index}": tf.config.experimental.get_memory_info(gpu.name)["peak"] / 2**20
        for index, gpu in enumerate(gpus)
    }


# metrics.jsonl.


class _StoredLines:
    """Lines in a store, which cannot append: the last part is written anew with each line, until it is long enough."""

    _LONG_ENOUGH = 2**16  # Characters.

    def __init__(self, directory):
        self._directory = directory
        self._number = max([-1, *(int(path.name.split(".")[1]) for path in _parts(directory))]) + 1
        self._text = ""

    def write(self, line: str) -> None:
        if len(self._text) >= self._LONG_ENOUGH:
            self._number, self._text = self._number + 1, ""
        self._text += line
        (self._directory / f"metrics.{self._number:06d}.jsonl").write_text(self._text)

    def flush(self) -> None:
        pass

    close = flush


def _parts(directory: Path) -> list[Path]:
    """The files of a directory's metrics, in the order written."""
    if is_remote(directory):
        return sorted(directory.glob("metrics.[0-9]*.jsonl"))
    path = directory / METRICS_FILE
    return [path] if path.exists() else []


def _lines(path: Path) -> Iterator[tuple[str, dict | None]]:
    """Each line and its object; None for a line that is damaged or was cut short."""
    whole = io.BytesIO(path.read_bytes()) if is_remote(path) else open(path, "rb")  # noqa: SIM115 (closed below)
    with io.TextIOWrapper(whole, encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                line = json.loads(text)
            except ValueError:
                line = None
            is_whole = isinstance(line, dict) and isinstance(line.get("step"), int) and text.endswith("\n")
            yield text, line if is_whole else None


def _keep_lines(path: Path, *, last_step: float) -> float:
    """Drops the lines of later steps, and what is no line: a run that was killed may have cut its last.

    Returns:
      The latest wall time of the lines kept; 0 without any.
    """
    lines = list(_lines(path))
    kept = [(text, line) for text, line in lines if line is not None and line["step"] <= last_step]
    if len(kept) < len(lines):
        logger.info("Dropping %d of %d lines of %s.", len(lines) - len(kept), len(lines), path)
        replace_file(path, text="".join(text for text, _ in kept))
    return max((line.get("wall_time", 0.0) for _, line in kept), default=0.0)


class _Clock:
    """Seconds since 1970, from a clock that never goes back: instead, it runs on from the latest time."""

    def __init__(self, latest: float):
        self._latest = latest
        self._ahead = 0.0

    def __call__(self) -> float:
        self._ahead = max(self._ahead, self._latest - time.time())
        self._latest = max(self._latest, time.time() + self._ahead)
        return self._latest


# Numbers.


def _number(value: Any) -> float | int:
    if isinstance(value, tf.Tensor | tf.Variable):
        value = value.numpy()
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _format(value: float | int) -> str:
    """Four significant digits, and no fewer than all before the point: 0.0003, 5.123, 61.46, 12,345."""
    if isinstance(value, int) or 1000 <= abs(value) < 1e15:
        return f"{value:,.0f}"
    return f"{value:.4g}"


# The terminal, and memory.


@contextlib.contextmanager
def _logging_to(terminal, *, instead) -> Iterator[None]:
    """Has log handlers, which hold the stream that was stderr before, write to `instead` of `terminal`."""
    handlers = [getattr(handler, "python_handler", handler) for handler in logging.getLogger().handlers]
    moved = [
        handler
        for handler in handlers
        if isinstance(handler, logging.StreamHandler) and handler.stream is terminal
    ]
    for handler in moved:
        handler.setStream(instead)
    try:
        yield
    finally:
        for handler in moved:
            handler.setStream(terminal)


def _peak_resident_bytes() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        # Not getrusage: there, a process starts with the peak of the one that started it.
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
