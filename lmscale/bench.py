"""Measures lmscale beside its peers and beside the machine: python -m lmscale.bench [--full]

Writes results.json, report.md and plots into --output, and prints the report; the last line on stdout is the JSON.
Sections that an earlier call has left in --output stay, each with the date and command of its own; one that fails does
not replace them, and makes the exit code 1.
Each side of a comparison is a process of its own; they take turns on the same machine, with the same shapes and data,
and ratios are medians over the rounds. PyTorch's sides need the extra "bench".

Quick by default: a few minutes. --full measures every size; time_to_quality and samples train for hours, and go on
where they were cut off if they are started again with the same --output.
"""

import json
import sys
from pathlib import Path

from absl import flags

from lmscale import paths
from lmscale.command_line import DEFINE_path, DEFINE_paths, run_main

_SECTIONS = (
    "step_time",
    "limits",
    "startup",
    "communication",
    "memory",
    "time_to_quality",
    "samples",
    "word2vec",
)

_FULL = flags.DEFINE_bool("full", False, "Every size and every section.")
_SECTIONS_FLAG = flags.DEFINE_list(
    "sections", None, f"Of {', '.join(_SECTIONS)}; by default all with --full, else the first four."
)
_OUTPUT = DEFINE_path("output", "runs/bench", "Folder for results, report, plots and logs.")
_VOCAB_SIZES = flags.DEFINE_list(
    "vocab_sizes",
    None,
    "Rows of the tables of step_time, by default by --full; limits and memory have the last, or 793,470 with --full.",
)
_SIDES = flags.DEFINE_list("sides", None, "Sides of step_time; by default all that are installed.")
# The sizes are those of step_time, limits and memory.
_EMBED_DIM = flags.DEFINE_integer("embed_dim", 256, "Width of the table and the LSTM layers.", lower_bound=1)
_NUM_LAYERS = flags.DEFINE_integer("num_layers", 2, "LSTM layers.", lower_bound=1)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Examples a step.", lower_bound=1)
_WINDOW = flags.DEFINE_integer("window", 35, "Time steps of an example.", lower_bound=1)
_NUM_SAMPLED = flags.DEFINE_integer("num_sampled", 2048, "Sampled negatives.", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 7, "Rounds of step_time and limits.", lower_bound=1)
_LIMIT_GIB = flags.DEFINE_float(
    "limit_gib", 20.0, "Memory for the largest vocabulary, which --full measures.", lower_bound=1.0
)
_DATA_DIR = DEFINE_path("data_dir", "runs/data/wikitext-2", "Prepared data for time_to_quality and samples.")
_WORD2VEC_DATA_DIR = DEFINE_path(
    "word2vec_data_dir",
    "runs/data/wikitext-2-lower",
    "Prepared data for word2vec, as its configuration says.",
)
_SIMILARITY = DEFINE_paths("similarity", [], "Files of word pairs with scores, by which word2vec is judged.")
_ROUNDS = flags.DEFINE_integer("word2vec_rounds", 3, "Turns of each side of word2vec.", lower_bound=1)
_SUBSAMPLING = flags.DEFINE_float(
    "gensim_subsampling",
    1e-3,
    "Of word2vec: gensim's threshold for frequent words; 1e-3 is its default.",
    lower_bound=0.0,
)

_QUICK_SIZES, _FULL_SIZES = "10000 33278", "10000 33278 100000 267735 472706 793470 1000000 10000000"


def main(argv):
    """Runs the sections one after the other; the report is rewritten after each."""
    del argv
    from lmscale.benchmarks import machine, report, word_vectors
    from lmscale.benchmarks.peers.peer import ModelShape
    from lmscale.benchmarks.sides import SIDES
    from lmscale.data.token_files import PreparedData

    sections = _SECTIONS_FLAG.value or _SECTIONS[: None if _FULL.value else 4]
    _check_names("--sections", sections, _SECTIONS)
    sides = _SIDES.value or list(SIDES)
    _check_names("--sides", sides, SIDES)
    # Before hours of the other sections.
    if {"time_to_quality", "samples"} & set(sections):
        PreparedData.open(_DATA_DIR.value)
    if "time_to_quality" in sections and not SIDES["pytorch_full"].is_installed():
        raise ValueError(
            "time_to_quality needs PyTorch. Received: no module torch. Install the extra 'bench', or leave the section "
            "out of --sections."
        )
    if "word2vec" in sections:
        PreparedData.open(_WORD2VEC_DATA_DIR.value)
        if not word_vectors.gensim_is_installed():
            raise ValueError(
                "word2vec needs gensim. Received: no module gensim. Install the extra 'vectors-test', or leave the "
                "section out of --sections."
            )
    shape = ModelShape(
        vocab_size=0,
        embed_dim=_EMBED_DIM.value,
        hidden_dim=_EMBED_DIM.value,
        num_layers=_NUM_LAYERS.value,
        batch_size=_BATCH_SIZE.value,
        window=_WINDOW.value,
        num_sampled=_NUM_SAMPLED.value,
    )
    vocab_sizes = sorted({_vocab_size(text) for text in _VOCAB_SIZES.value or _default_sizes().split()})
    output = Path(_OUTPUT.value)
    # Before hours of the other sections, too: there are runs below it.
    paths.check_checkpoint_path(output, what="--output")
    output.mkdir(parents=True, exist_ok=True)
    measured, failed = report.read(output), []
    for name in _SECTIONS:
        if name in sections:
            section = _measure(name, shape, vocab_sizes, sides, output) | {"environment": machine.describe()}
            failed += [name] if "failed" in section else []
            if name not in failed or "failed" in measured.get(name, section):
                measured[name] = section
            report.write(measured, output)
    print((output / "report.md").read_text(encoding="utf-8"))
    print(json.dumps(json.loads((output / "results.json").read_text(encoding="utf-8"))))
    return 1 if failed else 0


def _measure(section, shape, vocab_sizes, sides, output):
    """The results of one section; those of a section that cannot run say why."""
    from lmscale.benchmarks import memory, startup, step_time, time_to_quality, word_vectors
    from lmscale.benchmarks.sides import SideFailedError
    from lmscale.benchmarks.task import TaskFailedError, run_task

    config = Path(paths.CONFIGS) / "wikitext2_fast.gin"
    try:
        if section == "step_time":
            return step_time.measure(
                shape,
                vocab_sizes=vocab_sizes,
                sides=sides,
                repeats=_REPEATS.value,
                log_dir=output / "logs",
                say=_say,
            )
        if section == "limits":
            vocab_size = 793_470 if _FULL.value else vocab_sizes[-1]
            _say(f"limits, vocabulary {vocab_size:,}")
            common = {"shape": vars(shape) | {"vocab_size": vocab_size}, "repeats": _REPEATS.value}
            limits = run_task(
                "lmscale.benchmarks.limits:measure",
                common | {"evaluation_tokens": 4096 if _FULL.value else shape.tokens},
                log=output / "logs" / "limits.log",
            )
            exchanges = [
                run_task(
                    "lmscale.benchmarks.limits:measure_exchanges",
                    common | {"num_devices": num_devices},
                    log=output / "logs" / f"exchanges_{num_devices}.log",
                )
                for num_devices in (1, 4)
            ]
            return limits | {"exchanges": exchanges}
        if section == "startup":
            _say("start-up")
            return startup.measure(repeats=3 if _FULL.value else 1)
        if section == "communication":
            sized = vars(shape) | {"vocab_size": vocab_sizes[-1]}
            _say(f"communication, vocabulary {sized['vocab_size']:,}")
            counts = [
                run_task(
                    "lmscale.benchmarks.communication:measure",
                    {"shape": sized, "num_devices": num_devices},
                    log=output / "logs" / f"communication_{num_devices}.log",
                )
                for num_devices in (2, 4, 8, 16)
            ]
            return {"shape": sized, "counts": counts}
        if section == "memory":
            return memory.measure(
                shape,
                vocab_size=793_470 if _FULL.value else vocab_sizes[-1],
                limit_gib=_LIMIT_GIB.value if _FULL.value else None,
                log_dir=output / "logs",
                say=_say,
            )
        if section == "time_to_quality":
            return time_to_quality.measure(
                data_dir=_DATA_DIR.value, config=config, output=output / section, epochs=6, say=_say
            )
        if section == "word2vec":
            return word_vectors.measure(
                data_dir=_WORD2VEC_DATA_DIR.value,
                config=config.with_name("wikitext2_word2vec.gin"),
                similarity=_SIMILARITY.value,
                rounds=_ROUNDS.value,
                gensim_subsampling=_SUBSAMPLING.value,
                log_dir=output / "logs",
                say=_say,
            )
        return time_to_quality.measure_samples(
            data_dir=_DATA_DIR.value,
            config=config,
            output=output / section,
            nums_sampled=[256, 512, 1024, 2048, 4096, 8192],
            epochs=1,
            say=_say,
        )
    except (TaskFailedError, SideFailedError) as error:
        _say(f"{section}: {error}")
        return {"failed": str(error)}


def _say(line):
    """Where the benchmark is, on stderr: stdout is for the report."""
    print(f"[bench] {line}", file=sys.stderr, flush=True)


def _default_sizes():
    return _FULL_SIZES if _FULL.value else _QUICK_SIZES


def _check_names(flag, names, known):
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"{flag} must be of {', '.join(known)}. Received: {', '.join(unknown)}.")


def _vocab_size(text):
    try:
        size = int(text)
    except ValueError:
        size = 0
    if size < _NUM_SAMPLED.value:
        raise ValueError(
            "Each of --vocab_sizes must be a whole number, at least --num_sampled. Received: "
            f"{text!r}, num_sampled={_NUM_SAMPLED.value}."
        )
    return size


def run():
    """Console script lmscale-bench."""
    run_main(main)


if __name__ == "__main__":
    run()
