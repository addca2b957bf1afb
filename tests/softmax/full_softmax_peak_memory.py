"""Prints peak memory and speed of the full softmax as one line of JSON.

    python tests/softmax/full_softmax_peak_memory.py evaluation|training VOCAB_SIZE TOKENS

One measurement per process: what earlier work leaves in allocators would hide what later work needs.
"""

import json
import sys
import time

import numpy as np
import tensorflow as tf

from lmscale.softmax import exact

EMBED_DIM = 256


def status_mib(key):
    """A size of this process in MiB: VmRSS, resident now, or VmHWM, its peak."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith(key + ":"))


def peak_above_start_mib(function):
    """Result of function, seconds it took, and peak resident size during it above that before it."""
    before = status_mib("VmRSS")
    try:
        with open("/proc/self/clear_refs", "w") as clear_refs:
            clear_refs.write("5")  # Resets the peak.
    except OSError:
        pass  # The peak then includes what went before: too large, never too small.
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start, status_mib("VmHWM") - before


def make_table(vocab_size):
    """A table written by scatter updates, as training does: reading such a variable whole would copy it."""
    table = tf.Variable(tf.zeros([vocab_size, EMBED_DIM]))
    for start in range(0, vocab_size, 50_000):
        ids = tf.range(start, min(start + 50_000, vocab_size))
        rows = tf.random.stateless_normal([len(ids), EMBED_DIM], [1, start], stddev=0.05)
        table.scatter_update(tf.IndexedSlices(rows, ids))
    return table


def product_gflop_per_sec(tokens):
    """Rate of tf.matmul itself on a block of the loss."""
    hidden, rows = tf.random.normal([tokens, EMBED_DIM]), tf.random.normal([4096, EMBED_DIM])
    secs = []
    for _ in range(6):
        start = time.perf_counter()
        tf.matmul(hidden, rows, transpose_b=True)
        secs.append(time.perf_counter() - start)
    return 2 * tokens * 4096 * EMBED_DIM / min(secs) / 1e9


def worst_error_nats(loss, hidden, labels, table, num_checked):
    """Largest difference of the first losses from float64 arithmetic."""
    hidden = hidden[:num_checked].numpy().astype(np.float64)
    logits = np.concatenate(
        [
            hidden @ tf.gather(table, ids).numpy().astype(np.float64).T
            for ids in np.array_split(np.arange(table.shape[0]), 16)
        ],
        axis=1,
    )
    expected = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(num_checked), labels[:num_checked]]
    return float(np.abs(loss[:num_checked].numpy() - expected).max())


def evaluation(vocab_size, tokens):
    table = make_table(vocab_size)
    hidden = tf.random.stateless_normal([tokens, EMBED_DIM], [2, 0])
    labels = tf.random.stateless_uniform([tokens], [3, 0], maxval=vocab_size, dtype=tf.int32)
    step = tf.function(
        lambda hidden, labels: exact.full_softmax_loss(
            hidden, labels=labels, rows=table, bias=None, num_valid_rows=vocab_size
        )
    )
    loss, secs, above_mib = peak_above_start_mib(lambda: step(hidden, labels))
    return {
        "table_mib": vocab_size * EMBED_DIM * 4 / 2**20,
        "peak_above_table_mib": above_mib,
        "secs": secs,
        "gflop_per_sec": 2 * tokens * vocab_size * EMBED_DIM / secs / 1e9,
        "matmul_gflop_per_sec": product_gflop_per_sec(tokens),
        "worst_error_nats": worst_error_nats(loss, hidden, labels.numpy(), table, num_checked=3),
    }


def training(vocab_size, tokens):
    table = make_table(vocab_size)
    hidden = tf.random.stateless_normal([tokens, EMBED_DIM], [2, 0])
    labels = tf.random.stateless_uniform([tokens], [3, 0], maxval=vocab_size, dtype=tf.int32)
    step = tf.function(
        lambda hidden, labels: exact.full_softmax_value_and_gradients(
            hidden,
            labels=labels,
            loss_weights=tf.fill([tokens], 1 / tokens),
            rows=table,
            bias=None,
            num_valid_rows=vocab_size,
        )
    )
    _, secs, above_mib = peak_above_start_mib(lambda: step(hidden, labels))
    return {
        "table_mib": vocab_size * EMBED_DIM * 4 / 2**20,
        "peak_above_table_mib": above_mib,
        "secs": secs,
        "gflop_per_sec": 4 * 2 * tokens * vocab_size * EMBED_DIM / secs / 1e9,
        "matmul_gflop_per_sec": product_gflop_per_sec(tokens),
    }


if __name__ == "__main__":
    measured = {"evaluation": evaluation, "training": training}[sys.argv[1]]
    print(json.dumps(measured(vocab_size=int(sys.argv[2]), tokens=int(sys.argv[3]))))
