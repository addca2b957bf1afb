"""Prints, as one line of JSON, the peak memory of causal attention, forward and backward, above what was there before.

    python tests/bodies/attention_peak_memory.py TIME plain|blocks

One measurement a process: what earlier work leaves in allocators would hide what later work needs.
"""

import json
import sys

import tensorflow as tf

from lmscale.bodies.attention import BLOCK, causal_attention

BATCH, HEADS, DIM = 1, 2, 32


def status_mib(key):
    """A size of this process in MiB: VmRSS, resident now, or VmHWM, its peak."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith(key + ":"))


def main(time, block):
    @tf.function(autograph=False)
    def step(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            total = tf.reduce_sum(tf.sin(causal_attention(*x, block=block)))
        return tape.gradient(total, x)

    def inputs(steps):
        return [tf.random.stateless_normal([BATCH, HEADS, steps, DIM], [1, i]) for i in range(3)]

    step(inputs(2 * BLOCK + 1))  # What the first run of anything takes.
    x = inputs(time)
    step.get_concrete_function(x)
    before = status_mib("VmRSS")
    step(x)
    return {
        "peak_mib": status_mib("VmHWM") - before,
        "arguments_mib": 3 * x[0].shape.num_elements() * 4 / 2**20,
    }


if __name__ == "__main__":
    steps = int(sys.argv[1])
    print(json.dumps(main(steps, {"plain": steps, "blocks": BLOCK}[sys.argv[2]])))
