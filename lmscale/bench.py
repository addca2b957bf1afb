"""Step time against vocabulary: python -m lmscale.bench --vocab_sizes=10000,100000,1000000

Trains on synthetic Zipf-distributed text, all vocabulary sizes in one process, their steps taken in turn, so that a
slow moment of the machine falls on all of them alike. Prints a Markdown table; the last line on stdout is JSON.
"""

import dataclasses
import functools
import json
import os
import platform
import statistics
import time

import numpy as np
from absl import flags

from lmscale.command_line import run_main

_VOCAB_SIZES = flags.DEFINE_list(
    "vocab_sizes", ["10000", "100000", "1000000"], "Rows of the tables to compare."
)
_EMBED_DIM = flags.DEFINE_integer("embed_dim", 128, "Width of the table.", lower_bound=1)
_HIDDEN_DIM = flags.DEFINE_integer("hidden_dim", 128, "Width of the LSTM layers.", lower_bound=1)
_NUM_LAYERS = flags.DEFINE_integer("num_layers", 2, "LSTM layers.", lower_bound=1)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Examples a step.", lower_bound=1)
_WINDOW = flags.DEFINE_integer("window", 32, "Time steps of an example.", lower_bound=1)
_NUM_SAMPLED = flags.DEFINE_integer("num_sampled", 2048, "Sampled negatives.", lower_bound=1)
_OPTIMIZER = flags.DEFINE_enum(
    "optimizer", "Adam", ["SGD", "Adagrad", "RowWiseAdagrad", "Adam"], "Rule for rows and body."
)
_REPEATS = flags.DEFINE_integer("repeats", 30, "Timed steps of each table.", lower_bound=1)
_CPU_DEVICES = flags.DEFINE_integer("cpu_devices", None, "As for lmscale.train.")

_WARM_UP_STEPS = 3
_NUM_TOKENS = 200_000  # of synthetic text


def main(argv):
    """Builds a trainer for each vocabulary size, times their steps in turn, prints ratios to the smallest."""
    del argv
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from lmscale.distribution.strategies import make_strategy

    vocab_sizes = [_vocab_size(text) for text in _VOCAB_SIZES.value]
    strategy = make_strategy(cpu_devices=_CPU_DEVICES.value)
    trainers = {v: _trainer(v, strategy=strategy) for v in vocab_sizes}
    seconds = {v: [] for v in vocab_sizes}
    for repeat in range(_WARM_UP_STEPS + _REPEATS.value):
        for v, trainer in trainers.items():
            start = time.perf_counter()
            float(strategy.experimental_local_results(trainer.train_step()["loss"])[0])
            if repeat >= _WARM_UP_STEPS:
                seconds[v].append(time.perf_counter() - start)
    rows = [
        {
            "vocab_size": v,
            "step_secs_median": statistics.median(seconds[v]),
            "step_secs_min": min(seconds[v]),
            "step_secs_max": max(seconds[v]),
            # Step by step, so that both sides of a ratio saw the same moment.
            "ratio_to_first": statistics.median(
                mine / first for mine, first in zip(seconds[v], seconds[vocab_sizes[0]], strict=True)
            ),
            "table_mib_per_device": sum(trainers[v].model.table.bytes_per_shard().values()) / 2**20,
        }
        for v in vocab_sizes
    ]
    print(
        "| vocabulary | step, ms: median (min to max) | ratio to the first | table and slots, MiB a device |"
    )
    print("|---:|---:|---:|---:|")
    for row in rows:
        low, middle, high = (row[f"step_secs_{name}"] * 1e3 for name in ("min", "median", "max"))
        print(
            f"| {row['vocab_size']:,} | {middle:.1f} ({low:.1f} to {high:.1f}) | {row['ratio_to_first']:.2f} "
            f"| {row['table_mib_per_device']:,.0f} |"
        )
    settings = {
        flag.name: flag.value
        for flag in (
            _EMBED_DIM,
            _HIDDEN_DIM,
            _NUM_LAYERS,
            _BATCH_SIZE,
            _WINDOW,
            _NUM_SAMPLED,
            _OPTIMIZER,
            _REPEATS,
        )
    }
    print(json.dumps({"settings": settings, "processor": _processor(), "steps": rows}))
    return 0


@dataclasses.dataclass(frozen=True)
class _ZipfText:
    """Synthetic text in place of a prepared directory: ids by Zipf's law, the same number whatever the vocabulary."""

    vocab_size: int
    eos_id = 0
    counts = None

    def split(self, name):
        del name
        uniform = np.random.default_rng(0).random(_NUM_TOKENS)
        ids = np.exp(uniform * np.log(self.vocab_size + 1)).astype(np.int64) - 1
        return np.minimum(ids, self.vocab_size - 1)


def _trainer(vocab_size, *, strategy):
    """A trainer on synthetic text of `vocab_size` types."""
    from lmscale.experiment import Experiment
    from lmscale.losses.sampled import SampledSoftmax
    from lmscale.models.lstm import lstm_body
    from lmscale.trainer import Trainer
    from lmscale.vocabulary import row_optimizers
    from lmscale.vocabulary.samplers import LogUniformSampler

    optimizer = getattr(row_optimizers, _OPTIMIZER.value)
    experiment = Experiment(
        data_dir="",
        train_steps=_WARM_UP_STEPS + _REPEATS.value,
        global_batch_size=_BATCH_SIZE.value,
        window=_WINDOW.value,
        embed_dim=_EMBED_DIM.value,
        body=functools.partial(lstm_body, num_layers=_NUM_LAYERS.value, hidden_dim=_HIDDEN_DIM.value),
        loss=functools.partial(
            SampledSoftmax, sampler=functools.partial(LogUniformSampler, num_sampled=_NUM_SAMPLED.value)
        ),
        row_optimizer=optimizer(learning_rate=0.001),
        body_optimizer=optimizer(learning_rate=0.001),
        clip_norm=1.0,
        seed=0,
        log_every=1,
        eval_every=1,
        save_every=1,
    )
    return Trainer(experiment, data=_ZipfText(vocab_size), strategy=strategy)


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


def _processor():
    """Model name of the processor, as Linux tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"


def run():
    """Console script lmscale-bench."""
    run_main(main)


if __name__ == "__main__":
    run()
