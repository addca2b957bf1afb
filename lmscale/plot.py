"""Draws the curve of runs: python -m lmscale.plot --workdir=runs/wikitext2 --output=curve.png

Exact validation perplexity and training loss by epoch, from the runs' metrics.jsonl, and the loss of the last
evaluation by how frequent the labels are. --evaluations adds points from files to which the last lines of
lmscale.evaluate were appended. Needs matplotlib (pip install 'lmscale[plot]').
"""

import json
import math
import re
from pathlib import Path

from lmscale import paths
from lmscale.command_line import DEFINE_path, DEFINE_paths, run_main

_LARGEST_LOSS_NATS = 700  # exp of more overflows

_PLACE_OF_UNKNOWN = 11  # Behind the ten deciles.

_WORKDIR = DEFINE_paths("workdir", [], "Work directories of the runs to draw.")
_EVALUATIONS = DEFINE_paths(
    "evaluations", [], "Files of JSON lines printed by lmscale.evaluate on the first run."
)
_OUTPUT = DEFINE_path("output", "curve.png", "Picture to write; the ending decides the format.")


def main(argv):
    """Reads the metrics, draws, saves."""
    del argv
    if not _WORKDIR.value:
        raise ValueError("--workdir is required. Received: none. Pass the work directory of a run.")
    if Path(_OUTPUT.value).is_dir():
        raise ValueError(f"--output must be a file. Received: {_OUTPUT.value}, a directory.")
    if not Path(_OUTPUT.value).suffix:  # matplotlib would choose one, and write to another file.
        raise ValueError(
            f"--output must end in the picture's format. Received: {_OUTPUT.value}. Write {_OUTPUT.value}.png, say."
        )
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError(
            "lmscale.plot needs matplotlib. Install it with: pip install 'lmscale[plot]'."
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    workdirs = [Path(path) for path in _WORKDIR.value]
    by_frequency = [_by_frequency(_metrics(workdir / "eval")) for workdir in workdirs]
    has_frequencies = any(by_frequency)
    figure, (loss_axes, perplexity_axes, *others) = pyplot.subplots(
        1, 3 if has_frequencies else 2, figsize=(16 if has_frequencies else 11, 4.2), layout="constrained"
    )
    for number, (workdir, name) in enumerate(zip(workdirs, _names(workdirs), strict=True)):
        train = _metrics(workdir / "train")
        epochs_per_step = train[-1]["epoch"] / train[-1]["step"]
        loss_tag = next(
            tag for tag in ("sampled_loss_nats", "exact_loss_nats", *train[-1]) if tag in train[-1]
        )
        evaluations = _metrics(workdir / "eval")
        epochs = [line["step"] * epochs_per_step for line in evaluations]
        loss_axes.plot(
            [line["epoch"] for line in train],
            [_plotted(line.get(loss_tag)) for line in train],
            label=f"{name}: train, {loss_tag}",
        )
        valid = [_plotted(line.get("valid/exact_loss_nats")) for line in evaluations]
        loss_axes.plot(epochs, valid, marker=".", label=f"{name}: valid, exact")
        perplexity_axes.plot(epochs, [math.exp(x) for x in valid], marker=".", label=f"{name}: valid, exact")
        for frequency_axes in others:
            groups = by_frequency[number]
            places = [_PLACE_OF_UNKNOWN if group == "unknown" else int(group) for group in groups]
            losses = [_plotted(x) for x in groups.values()]
            frequency_axes.plot(places, losses, marker="o", label=f"{name}: valid, exact")
        if number == 0:
            points = [point for path in _EVALUATIONS.value for point in _evaluations(Path(path))]
            for split in sorted({point["split"] for point in points}):
                mine = sorted((p["step"], _plotted(p["loss_nats"])) for p in points if p["split"] == split)
                perplexity_axes.plot(
                    [step * epochs_per_step for step, _ in mine],
                    [math.exp(loss) for _, loss in mine],
                    marker="x",
                    label=f"{name}: {split}, exact",
                )
    loss_axes.set(xlabel="epoch", ylabel="loss, nats a token")
    for frequency_axes in others:
        frequency_axes.set(
            xlabel="decile of training frequency, the most frequent first", ylabel="loss, nats a token"
        )
        ticks = range(1, _PLACE_OF_UNKNOWN + 1)
        frequency_axes.set_xticks(ticks, [*map(str, ticks[:-1]), "<unk>"])
    perplexity_axes.set(xlabel="epoch", ylabel="perplexity", yscale="log")
    for axis_ticks in (perplexity_axes.yaxis.set_major_formatter, perplexity_axes.yaxis.set_minor_formatter):
        axis_ticks("{x:,.0f}")
    for axes in (loss_axes, perplexity_axes, *others):
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize="small")
    with paths.naming(_OUTPUT.value):
        figure.savefig(_OUTPUT.value, dpi=110)
    print(_OUTPUT.value)
    return 0


def _by_frequency(evaluations):
    """{"1", ..., "10" or "unknown": loss} of the last evaluation that tells of one head; empty if none does."""
    pattern = re.compile(r"valid/by_frequency/(?:decile_0?)?(\w+)_loss_nats")
    for line in reversed(evaluations):
        if found := {match[1]: line[match[0]] for match in map(pattern.fullmatch, line) if match}:
            return found
    return {}


def _names(workdirs):
    """What the legend calls each: the directory's name, or its path where others have the same name."""
    names = [Path(workdir).resolve().name for workdir in workdirs]
    return [workdir if names.count(name) > 1 else name for workdir, name in zip(workdirs, names, strict=True)]


def _plotted(value):
    """A loss as it can be drawn: NaN, a gap, for one that JSON has no number for or whose perplexity overflows."""
    return value if value is not None and value < _LARGEST_LOSS_NATS else math.nan


def _metrics(directory):
    """The lines of a run's metrics.jsonl."""
    from lmscale.metrics import read_metrics

    lines = read_metrics(directory)
    if not lines:
        raise ValueError(
            f"{directory}/metrics.jsonl must have at least one line. Received: none. Let the run log a step first."
        )
    return lines


def _evaluations(path):
    """The JSON objects of a file to which lines of `lmscale.evaluate` were appended."""
    try:
        points = [
            json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line[:1] == "{"
        ]
    except ValueError as error:
        problem = str(error)
    else:
        if points and all(map(_is_evaluation, points)):
            return points
        problem = "a line without split, step or loss_nats" if points else "none"
    raise ValueError(f"{path} must hold lines printed by lmscale.evaluate. Received: {problem}.")


def _is_evaluation(point):
    split, step, loss_nats = (point.get(name) for name in ("split", "step", "loss_nats"))
    is_loss = "loss_nats" in point and isinstance(loss_nats, float | None)
    return isinstance(split, str) and isinstance(step, int) and is_loss


def run():
    """Console script lmscale-plot."""
    run_main(main)


if __name__ == "__main__":
    run()
