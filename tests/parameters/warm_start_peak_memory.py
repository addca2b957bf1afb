"""Prints speed and peak memory of a warm start by words, from a saved checkpoint into a table, as one line of JSON.

    python tests/parameters/warm_start_peak_memory.py OLD_ROWS NEW_ROWS EMBED_DIM DEVICES WHAT [FOLDER]

WHAT is `parameters`, `slots` for both, or `pieces` for parameters whose new rows are the mean of the old words that
spell theirs, instead of that of all.

A tenth of the old words is not among the new; both vocabularies are shuffled. The checkpoint, which was just written,
is still in the page cache. One measurement per process: what earlier work leaves in allocators would hide what later
work needs.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import tensorflow as tf

sys.path.insert(0, str(Path(__file__).parents[1]))

from array_parameters import callback_parameter

from lmscale.benchmarks import machine
from lmscale.checkpoints.directory import Checkpoints
from lmscale.data.vocab import EOS, UNK, Vocabulary
from lmscale.distribution.strategies import mirrored_strategy
from lmscale.parameters.update_rules import Adam
from lmscale.parameters.warm_start import WarmStart
from lmscale.tables.table import ShardedTable


def make_vocabulary(numbers):
    """A vocabulary of numbers, in their order; 0 and 1 are <unk> and <eos>."""
    tokens = tuple({0: UNK, 1: EOS}.get(number, str(number)) for number in numbers.tolist())
    return Vocabulary(tokens=tokens, counts=np.arange(len(tokens), 0, -1))


def table_parameters(table):
    """The `Parameter`s of a table, which are those of `tables/words`."""

    def parameter(name, variable):
        return callback_parameter(
            f"{'slots/' if '/' in name else ''}tables/words/{name}",
            (table.vocab_size, *variable.shape[1:]),
            variable.dtype.as_numpy_dtype,
            read=lambda start, stop: table.read_rows(name, start, stop),
            write=lambda start, rows: table.write_rows(name, start, rows),
            scatter=lambda ids, rows: table.write_ids(name, ids, rows),
            sharded=True,
        )

    return [parameter(name, variable) for name, variable in table.variables().items()]


def save_run(workdir, numbers, parameters):
    """A run whose rows hold the number of their word, in the same columns and slots as the new run's."""

    def numbered(parameter):
        def read(start, stop):
            column = numbers[start:stop].astype(np.float32).reshape([-1] + [1] * (len(parameter.shape) - 1))
            return np.broadcast_to(column, (stop - start, *parameter.shape[1:]))

        shape = (len(numbers), *parameter.shape[1:])
        return callback_parameter(parameter.path, shape, parameter.dtype, read=read, write=None)

    Checkpoints(workdir / "checkpoints").save(1, [numbered(p) for p in parameters], metadata={})
    (workdir / "vocab.txt").write_text(make_vocabulary(numbers).to_text())


def worst_error(parameters, numbers, num_old, *, slots):
    """Largest difference of the rows of kept words from the number of the word."""
    worst = 0.0
    for parameter in parameters:
        if parameter.path.startswith("slots/") and not slots:
            continue
        for start in range(0, len(numbers), 50_000):
            expected = numbers[start : start + 50_000]
            rows = parameter.read(start, start + len(expected)).reshape([len(expected), -1])
            error = np.abs(rows - (expected[:, np.newaxis]))[expected < num_old]
            worst = max(worst, float(error.max()))
    return worst


def main(num_old, num_new, embed_dim, num_devices, what, folder):
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * num_devices)
    rng = np.random.default_rng(0)
    old = rng.permutation(num_old)
    num_removed = num_old // 10
    kept = np.concatenate([[0, 1], 2 + rng.permutation(num_old - 2)[num_removed:]])
    new = rng.permutation(np.concatenate([kept, np.arange(num_old, num_old + num_new - len(kept))]))
    strategy = mirrored_strategy(tuple(f"CPU:{i}" for i in range(num_devices)))
    with strategy.scope():
        rule = Adam(learning_rate=0.1, beta_1=0.0)
        table = ShardedTable(vocab_size=num_new, embed_dim=embed_dim, update_rule=rule)
    parameters = table_parameters(table)
    for parameter in parameters:
        # Logical devices of one CPU share the initial values of a slot until the first write to their shards.
        parameter.write(0, parameter.read(0, num_devices))
    save_run(folder, old, parameters)
    vocabulary = make_vocabulary(new)
    warm_start = WarmStart(
        checkpoint=str(folder),
        slots=what == "slots",
        rows_by_word=True,
        new_rows="pieces" if what == "pieces" else "mean",
    )
    before, _ = machine.resident_mib()
    machine.reset_peak()
    start = time.perf_counter()
    report = warm_start.apply(parameters, vocabularies={"words": vocabulary})
    secs = time.perf_counter() - start
    _, peak = machine.resident_mib()
    (embedding,) = (entry for entry in report.loaded if entry.path == "tables/words/embedding")
    return {
        "secs": secs,
        "peak_above_start_mib": peak - before,
        "matrix_mib": num_old * embed_dim * 4 / 2**20,
        "num_loaded": len(report.loaded),
        "rows": [embedding.rows_kept, embedding.new_rows, embedding.removed_rows],
        "worst_error": worst_error(parameters, new, num_old, slots=what == "slots"),
    }


if __name__ == "__main__":
    *sizes, what = sys.argv[1:6]
    with tempfile.TemporaryDirectory(dir=sys.argv[6] if len(sys.argv) > 6 else None) as folder:
        print(json.dumps(main(*map(int, sizes), what, Path(folder))))
