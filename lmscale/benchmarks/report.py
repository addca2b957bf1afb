"""The results as files: results.json, report.md, and plots where a curve is the answer."""

import collections
import json

from lmscale.benchmarks.sides import PEERS, SIDES
from lmscale.benchmarks.step_time import OURS
from lmscale.paths import naming
from lmscale.workdir import replace_file

_WAYS = ("static", "all_to_all", "hidden")
_FORMAT = 1  # of results.json: another one when a section changes what it holds.


def read(output):
    """The sections that earlier calls have measured, {name: section}; {} where there are none.

    Raises:
      ValueError: if results.json is not of this benchmark, or of an older one.
    """
    path = output / "results.json"
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        sections = results["sections"]
        if results["format"] != _FORMAT:
            raise ValueError(f"format {results['format']} is not {_FORMAT}")
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} must hold the results of an earlier call. Received: {error!r} on reading it. Move it away, or "
            "give another --output."
        ) from error
    return {name: sections[name] for name in _SECTIONS if name in sections}


def write(sections, output):
    """Writes everything; plots only where matplotlib is installed.

    Args:
      sections: {name: what was measured, with the "environment" it was measured in, or why it "failed"}.
      output: folder.
    """
    replace_file(
        output / "results.json",
        text=json.dumps({"format": _FORMAT, "sections": sections}, indent=1) + "\n",
    )
    plots = _plot(sections, output)
    lines = ["# lmscale, measured"]
    for name in _SECTIONS:
        if name not in sections:
            continue
        section = sections[name]
        if "failed" in section:
            lines += ["", f"## {name}", "", f"Failed: {section['failed']}"]
        else:
            lines += ["", *_SECTIONS[name](section)]
        lines += ["", _environment(section["environment"])]
        if name in plots:
            lines += ["", f"![{name}]({plots[name]})"]
    replace_file(output / "report.md", text="\n".join(lines) + "\n")


def _environment(environment):
    versions = ", ".join(f"{name} {environment[name]}" for name in ("tensorflow", "keras", "torch"))
    return (
        f"Measured on {environment['date']} by `{environment['command']}` on {environment['cores']} cores of "
        f"{environment['processor']} ({', '.join(environment['instructions'])}), "
        f"{environment['memory_gib']} GiB{''.join('; ' + gpu for gpu in environment['gpus'])}; "
        f"{versions}, Python {environment['python']}."
    )


def _table(header, rows):
    """A Markdown table: the first column to the left, numbers to the right."""
    return [
        "| " + " | ".join(header) + " |",
        "|" + "|".join([":--"] + ["--:"] * (len(header) - 1)) + "|",
        *("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows),
    ]


def _number(value, digits=2):
    return "" if value is None else f"{value:,.{digits}f}"


def _step_time(section):
    shape = section["shape"]
    lines = [
        "## Training step against the vocabulary",
        "",
        f"{shape['batch_size']} x {shape['window']} tokens, embed_dim {shape['embed_dim']}, {shape['num_layers']} LSTM "
        f"layers of {shape['hidden_dim']}, {shape['num_sampled']} samples. Medians; a ratio is the median over rounds "
        "in which the sides took turns: how many times as long as lmscale's step.",
        "",
    ]
    rows = []
    for size in section["sizes"]:
        for name, result in size["sides"].items():
            times = [_number(result["times_ours"].get(ours)) for ours in OURS]
            rows.append(
                [
                    SIDES[name].title,
                    f"{size['vocab_size']:,}",
                    _number(result["median"] * 1e3, 1),
                    f"{result['min'] * 1e3:,.1f} to {result['max'] * 1e3:,.1f}",
                    _number(result["tokens_per_sec"], 0),
                    *times,
                    _number(result.get("over_smallest")),
                ]
            )
    header = ["side", "vocabulary", "step, ms", "min to max", "tokens/s"]
    header += [f"times {SIDES[ours].title}" for ours in OURS] + ["times itself at the smallest"]
    lines += _table(header, rows)
    sizes_of = collections.defaultdict(list)
    for entry in section["not_run"]:
        sizes_of[entry["side"], entry["reason"]].append(f"{entry['vocab_size']:,}")
    lines += [""] if sizes_of else []
    return lines + [
        f"- Not run: {SIDES[side].title} at {' / '.join(sizes)}: {reason}."
        for (side, reason), sizes in sizes_of.items()
    ]


def _limits(section):
    rates = section["matrix_flops_per_sec"]
    return [
        "## Beside the machine's limit",
        "",
        f"Vocabulary {section['shape']['vocab_size']:,}, evaluations of {section['evaluation_tokens']:,} tokens. "
        "Matrix products "
        + ", ".join(f"{dtype} {rate / 1e9:,.0f} GFLOP/s" for dtype, rate in rates.items())
        + f"; copies {section['copy_bytes_per_sec'] / 1e9:,.1f} GB/s. Limit: the larger of operations over the "
        "one and bytes over the other.",
        "",
        *_table(
            ["part", "dtype", "GFLOP", "MB", "limit, ms", "measured, ms", "achieved"],
            [
                [
                    part["name"],
                    part["dtype"],
                    _number(part["flops"] / 1e9, 1),
                    _number(part["bytes"] / 1e6, 0),
                    _number(part["limit_secs"] * 1e3, 1),
                    _number(part["secs"] * 1e3, 1),
                    f"{part['achieved']:.0%}",
                ]
                for part in section["parts"]
            ],
        ),
        "",
        "The vocabulary's part of a step over the body's: "
        + ", ".join(
            f"{dtype} {ratio:.2f} (body {section['body_secs'][dtype] * 1e3:.1f} ms)"
            for dtype, ratio in section["vocabulary_over_body"].items()
        )
        + ".",
        # A file from before they were measured has none.
        *(_exchanges(section) if "exchanges" in section else []),
    ]


def _exchanges(section):
    shape = section["shape"]
    return [
        "",
        "Pull, push, update over logical devices of the CPU, "
        f"{shape['batch_size']} x {shape['window']} tokens on each, {shape['num_sampled']:,} samples:",
        "",
        *_table(
            ["devices", "static shapes, ms", "as chosen, ms", "times faster"],
            [
                [
                    exchange["num_devices"],
                    _number(exchange["secs"]["static"] * 1e3, 1),
                    _number(exchange["secs"]["chosen"] * 1e3, 1),
                    _number(exchange["speedup"], 2),
                ]
                for exchange in section["exchanges"]
            ],
        ),
    ]


def _startup(section):
    seconds = ", ".join(_number(x, 1) for x in section["secs"])
    return ["## Start-up", "", f"Quickstart, 4 devices, from the command to the first step: {seconds} s."]


def _communication(section):
    shape = section["shape"]

    def row(count):
        moved, least = count["bytes"], min(count["must_move"].values())
        kib = [_number(x / 2**10, 0) for x in (*(moved[way] for way in _WAYS), least)]
        return [count["num_devices"], *kib, _number(min(moved.values()) / least, 2)]

    return [
        "## Communication",
        "",
        f"KiB that a step moves to the device that receives most, for ids, rows and hidden states: vocabulary "
        f"{shape['vocab_size']:,}, {shape['batch_size']} x {shape['window']} tokens on each device, embed_dim "
        f"{shape['embed_dim']}, {shape['num_sampled']:,} samples, in one process.",
        "",
        *_table(
            [
                "devices",
                "everything to everyone",
                "rows, all-to-all",
                "hidden states",
                "must move",
                "least moved over must",
            ],
            [row(count) for count in section["counts"]],
        ),
    ]


def _memory(section):
    lines = [
        "## Memory",
        "",
        f"Vocabulary {section['vocab_size']:,}; table and slots need {section['devices'][0]['whole_mib']:,.0f} MiB.",
        "",
        *_table(
            [
                "devices",
                "largest device, MiB",
                "over 1/N",
                "first step, MiB",
                "later steps, MiB",
                f"at {section['small_vocab_size']:,} rows: first step",
                "later steps",
            ],
            [
                [
                    entry["num_devices"],
                    _number(max(entry["device_mib"]), 1),
                    f"{entry['over_1_nth']:.4f}",
                    _number(entry["first_step_mib"], 0),
                    _number(entry["step_mib"], 0),
                    _number(entry["small"]["first_step_mib"], 0),
                    _number(entry["small"]["step_mib"], 0),
                ]
                for entry in section["devices"]
            ],
        ),
        "",
        "Steps: the process's peak above table, slots and what it was before them, code, graphs and compiled programs "
        "included. "
        f"An exact evaluation of {section['evaluation']['tokens']:,} tokens, likewise: "
        f"{section['evaluation']['peak_above_mib']:,.0f} MiB, with {section['small_vocab_size']:,} rows "
        f"{section['evaluation']['small']['peak_above_mib']:,.0f} MiB.",
    ]
    for entry in section["largest"]:
        name = entry["rule"] + "".join(f", {k}={v:g}" for k, v in entry["options"].items())
        if "failed" in entry:
            lines.append(f"- Largest vocabulary, {name}: failed: {entry['failed']}")
        else:
            lines.append(
                f"- Largest vocabulary at embed_dim 128 in {entry['limit_gib']:g} GiB, {name}: "
                f"{entry['vocab_size']:,} rows of {entry['row_bytes']} bytes, peak {entry['peak_gib']:.2f} GiB."
            )
    return lines


def _time_to_quality(section):
    return [
        "## Time to quality",
        "",
        f"PyTorch: {section['peer_recipe']}. lmscale: {section['our_recipe']}. Seconds of training until the exact "
        "validation perplexity of each epoch of PyTorch: steps times the median step of the fastest epoch, "
        "without start-up and evaluations; "
        f"beside them, by the clock, of lmscale with {section['startup_secs']:.0f} s of start-up.",
        "",
        *_table(
            [
                "epoch of PyTorch",
                "perplexity",
                "PyTorch, s",
                "by the clock",
                "lmscale, s",
                "by the clock",
                "epochs of lmscale",
                "fraction of the time",
            ],
            [
                [
                    entry["peer_epoch"],
                    _number(entry["perplexity"], 1),
                    _number(entry["peer_secs"], 0),
                    _number(entry["peer_clock_secs"], 0),
                    _number(entry["our_secs"], 0),
                    _number(entry["our_clock_secs"], 0),
                    _number(entry["our_epoch"], 1),
                    _number(entry["fraction"], 3),
                ]
                for entry in section["reached"]
            ],
        ),
    ]


def _samples(section):
    return [
        "## Quality against the number of samples",
        "",
        *_table(
            ["samples", "exact validation perplexity", "over the full softmax", "training, s"],
            [
                [
                    f"{entry['num_sampled']:,}",
                    _number(entry["perplexity"], 1),
                    f"{entry['over_full']:.3f}",
                    _number(entry["train_secs"], 0),
                ]
                for entry in section["results"]
            ],
        ),
    ]


def _word2vec(section):
    files = list(section["rounds"][0]["lmscale"]["spearman"])
    rows = [
        [
            str(number),
            side,
            f"{result['words_per_sec']:,.0f}",
            f"{section['words'] * section['epochs'] / result['cpu_secs']:,.0f}",
            *(_number(result["spearman"][name], 3) for name in files),
        ]
        for number, turn in enumerate(section["rounds"], start=1)
        for side, result in turn.items()
    ]
    return [
        "## Word vectors, beside gensim",
        "",
        f"Skip-gram, {section['epochs']} epochs of {section['words']:,} words, {section['workers']} workers of "
        f"gensim, in turns. lmscale does {section['ratio']:.2f} times gensim's words per second, and "
        f"{section['cpu_ratio']:.2f} times its words per second of the processor (medians over the rounds).",
        "",
        *_table(["round", "side", "words/s", "words/s of one core", *files], rows),
    ]


_SECTIONS = {
    "step_time": _step_time,
    "limits": _limits,
    "startup": _startup,
    "communication": _communication,
    "memory": _memory,
    "time_to_quality": _time_to_quality,
    "samples": _samples,
    "word2vec": _word2vec,
}


def _plot(sections, output):
    """Draws what is there; {section: file name}."""
    try:
        import matplotlib
    except ImportError:
        return {}
    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawings = {"step_time": _draw_steps, "time_to_quality": _draw_quality, "samples": _draw_samples}
    files = {}
    for name, draw in drawings.items():
        if name in sections and "failed" not in sections[name]:
            figure, axes = pyplot.subplots(figsize=(9, 6), layout="constrained")
            draw(sections[name], axes)
            axes.grid(alpha=0.3, which="both")
            figure.legend(loc="outside lower center", ncols=2, fontsize="small")
            files[name] = f"{name}.png"
            with naming(output / files[name]):
                figure.savefig(output / files[name], dpi=110)
            pyplot.close(figure)
    return files


def _draw_steps(section, axes):
    for i, name in enumerate(SIDES):
        points = [
            (size["vocab_size"], size["sides"][name]["median"] * 1e3)
            for size in section["sizes"]
            if name in size["sides"]
        ]
        if points:
            style = "--" if SIDES[name].factory.startswith(PEERS) else "-"
            axes.plot(
                *zip(*points, strict=True),
                style,
                color=f"C{i % 10}",
                marker="os^"[i // 10],
                label=SIDES[name].title,
            )
    axes.set(xscale="log", yscale="log", xlabel="vocabulary", ylabel="training step, ms")


def _draw_quality(section, axes):
    points = [(entry["peer_secs"], entry["perplexity"]) for entry in section["reached"]]
    axes.plot(*zip(*points, strict=True), marker="o", label="PyTorch, full softmax")
    ours = [(entry["secs"], entry["perplexity"]) for entry in section["ours"]]
    axes.plot(*zip(*ours, strict=True), marker=".", label="lmscale")
    axes.set(xlabel="training, s", ylabel="exact validation perplexity", xscale="log")


def _draw_samples(section, axes):
    points = [(entry["num_sampled"], entry["perplexity"]) for entry in section["results"]]
    axes.plot(*zip(*points[:-1], strict=True), marker="o", label="sampled")
    axes.axhline(points[-1][1], color="gray", label="full softmax")
    axes.axhline(points[-1][1] * 1.02, color="gray", linestyle=":", label="full softmax + 2%")
    axes.set(xlabel="samples", ylabel="exact validation perplexity")
    axes.set_xscale("log", base=2)
    axes.set_xticks([x for x, _ in points[:-1]], labels=[f"{x:,}" for x, _ in points[:-1]])
