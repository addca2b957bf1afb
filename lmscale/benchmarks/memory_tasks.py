"""Memory: what each of N devices holds, what a step takes above it, and the largest vocabulary that trains."""

import dataclasses

import numpy as np

from lmscale.benchmarks.machine import reset_peak, resident_mib
from lmscale.benchmarks.peers.peer import ModelShape
from lmscale.distribution.strategies import make_strategy
from lmscale.parameters import update_rules
from lmscale.tables.table import table_layout

_SPARE_MIB = 256  # What building a large table takes beside it, a block of rows several times.


def measure_devices(*, shape, num_devices):
    """Builds a trainer on `num_devices` devices of the CPU and does steps.

    Returns:
      {"num_devices"; "device_mib": table and slots on each, as allocated; "whole_mib": what the rows themselves need;
      "over_1_nth": the largest device over 1/N of it; "first_step_mib": the peak of the first step, which traces and
      compiles, above table, slots and what the process was before them; "step_mib": of three later steps}.
    """
    from lmscale.benchmarks.own_step import TABLE, make_trainer

    strategy = make_strategy(cpu_devices=num_devices)
    before = resident_mib()[0]
    trainer = make_trainer(ModelShape(**shape), strategy=strategy)
    table = trainer.model.tables[TABLE]
    device_mib = np.zeros([num_devices])
    whole_mib = 0.0
    for variable in table.variables().values():
        for device, component in enumerate(strategy.experimental_local_results(variable)):
            size = int(np.prod(component.shape)) * component.dtype.size
            device_mib[device] += size / 2**20
        whole_mib += table.vocab_size * int(np.prod(variable.shape[1:])) * variable.dtype.size / 2**20
    before += device_mib.sum()
    return {
        "num_devices": num_devices,
        "device_mib": device_mib.tolist(),
        "whole_mib": whole_mib,
        "over_1_nth": float(device_mib.max() * num_devices / whole_mib),
        "first_step_mib": _peak_mib(trainer, steps=1) - before,
        "step_mib": _peak_mib(trainer, steps=3) - before,
    }


def measure_largest(*, shape, rule, options, limit_gib):
    """The largest vocabulary that fits under the limit beside everything else, tried out by training on it.

    Returns:
      {"rule", "options", "vocab_size", "row_bytes", "peak_gib": of the whole process, "limit_gib"}.

    Raises:
      ValueError: if training took more than the limit.
    """
    from lmscale.benchmarks.own_step import make_trainer

    strategy = make_strategy()
    update_rule = getattr(update_rules, rule)(learning_rate=0.001, **options)
    shape = ModelShape(**shape)
    # What everything but the table takes, measured on a small one.
    small = dataclasses.replace(shape, vocab_size=10 * shape.num_sampled)
    trainer = make_trainer(small, strategy=strategy, row_rule=update_rule)
    for _ in range(3):
        trainer.train_steps()
    overhead = (resident_mib()[1] + _SPARE_MIB) * 2**20
    del trainer
    row_bytes = sum(
        entry.dtype.size * int(np.prod(entry.row_shape))
        for entry in table_layout(
            vocab_size=1,
            embed_dim=shape.embed_dim,
            update_rules={"embedding": update_rule, "bias": update_rule},
        )
    )
    vocab_size = int((limit_gib * 2**30 - overhead) / row_bytes) // 1000 * 1000
    trainer = make_trainer(
        dataclasses.replace(shape, vocab_size=vocab_size), strategy=strategy, row_rule=update_rule
    )
    for _ in range(3):
        float(trainer.train_steps()["loss"][0])
    peak_gib = resident_mib()[1] / 1024
    if peak_gib > limit_gib:
        raise ValueError(
            f"{vocab_size:,} rows must train within {limit_gib} GiB. Received: a peak of {peak_gib:.2f}."
        )
    return {
        "rule": rule,
        "options": options,
        "vocab_size": vocab_size,
        "row_bytes": row_bytes,
        "peak_gib": peak_gib,
        "limit_gib": limit_gib,
    }


def measure_evaluation(*, shape, tokens):
    """Peak of an exact evaluation of `tokens` tokens above the table and what the process was before it, in MiB."""
    import tensorflow as tf

    from lmscale.softmax.exact import full_softmax_loss
    from lmscale.tables.table import ShardedTable

    shape = ModelShape(**shape)
    strategy = make_strategy()
    before = resident_mib()[0]
    with strategy.scope():
        table = ShardedTable(vocab_size=shape.vocab_size, embed_dim=shape.embed_dim)
    hidden = tf.random.stateless_normal([tokens, shape.embed_dim], [2, 0])
    labels = tf.random.stateless_uniform([tokens], [3, 0], maxval=shape.vocab_size, dtype=tf.int32)

    @tf.function(autograph=False)
    def evaluate():
        return strategy.run(
            lambda: full_softmax_loss(
                hidden,
                labels=labels,
                rows=table.local_parameter("embedding"),
                bias=table.local_parameter("bias"),
                num_valid_rows=table.num_valid_rows,
            )
        )

    for variable in table.variables().values():
        before += variable.dtype.size * int(np.prod(variable.shape)) / 2**20
    reset_peak()
    strategy.experimental_local_results(evaluate())[0].numpy()
    return {"tokens": tokens, "peak_above_mib": resident_mib()[1] - before}


def _peak_mib(trainer, *, steps):
    reset_peak()
    for _ in range(steps):
        float(trainer.train_steps()["loss"][0])
    return resident_mib()[1]
