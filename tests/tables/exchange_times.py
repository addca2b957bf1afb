"""Seconds of a step, everything to everyone (the static exchange) and all-to-all in turns, on the devices there are.

.venv/bin/python tests/tables/exchange_times.py                                  # 4 logical devices of one process
launch/local_workers.sh 2 -- .venv/bin/python tests/tables/exchange_times.py     # a device in each of 2 processes
"""

import statistics
import time

from lmscale.distribution.cluster import find_cluster
from lmscale.distribution.rendezvous import joined

VOCAB_SIZE, EMBED_DIM, NUM_SAMPLED = 100_000, 256, 2048
BATCH_SIZE, WINDOW, HIDDEN_DIM = 32, 35, 256  # Of each device.
LOGICAL_DEVICES, ROUNDS, WARM_UP_ROUNDS = 4, 20, 6

with joined(find_cluster()) as group:
    import numpy as np
    import tensorflow as tf

    from lmscale.benchmarks.own_step import make_trainer
    from lmscale.benchmarks.peers.peer import ModelShape
    from lmscale.distribution import collectives
    from lmscale.distribution.strategies import make_strategy
    from lmscale.parameters.update_rules import Adagrad
    from lmscale.tables.table import RowGradients, ShardedTable

    strategy = make_strategy(cpu_devices=1 if group.size > 1 else LOGICAL_DEVICES, group=group)
    num_devices = strategy.num_replicas_in_sync

    def exchange(*, static_shapes):
        """Pull, push and update of a step's rows, by themselves: a function of nothing."""
        with strategy.scope():
            table = ShardedTable(
                vocab_size=VOCAB_SIZE,
                embed_dim=EMBED_DIM,
                update_rule=Adagrad(learning_rate=0.1),
                static_shapes=static_shapes,
            )

        @tf.function(autograph=False)
        def step(ids, shared_ids):
            def replica_step():
                pulled = table.pull(ids[collectives.replica_id()], shared_ids)
                gradients = {name: getattr(pulled, name) for name in ("embedding", "shared_embedding")}
                table.push(pulled, RowGradients(**gradients), step=tf.constant(0))
                return tf.reduce_sum(pulled.embedding)

            return strategy.run(replica_step)

        generator = np.random.default_rng(0)  # The same in every process.

        def run():
            # Zipf's law by inverse CDF.
            sizes = ((num_devices, BATCH_SIZE * (WINDOW + 1)), (NUM_SAMPLED,))
            ids = (np.exp(generator.random(size) * np.log(VOCAB_SIZE)).astype(np.int32) - 1 for size in sizes)
            return strategy.experimental_local_results(step(*map(tf.constant, ids)))[0]

        return run

    def whole_step(*, static_shapes):
        """A step of the trainer, one LSTM layer and the sampled softmax: a function of nothing."""
        shape = ModelShape(
            vocab_size=VOCAB_SIZE,
            embed_dim=EMBED_DIM,
            hidden_dim=HIDDEN_DIM,
            num_layers=1,
            num_sampled=NUM_SAMPLED,
            batch_size=num_devices * BATCH_SIZE,
            window=WINDOW,
            dropout=0.0,
        )
        trainer = make_trainer(shape, strategy=strategy, static_shapes=static_shapes)
        return lambda: trainer.train_steps()["loss"][-1]

    for what, make in (("pull, push and update", exchange), ("whole step", whole_step)):
        runs = {"everything to everyone": make(static_shapes=True), "all-to-all": make(static_shapes=False)}
        seconds: dict = {name: [] for name in runs}
        for _ in range(ROUNDS):
            for name, run in runs.items():
                group.gather()
                start = time.perf_counter()
                float(run())
                seconds[name].append(time.perf_counter() - start)
        if group.is_chief:
            # The first rounds trace, and meet sizes for the first time.
            of_each = {name: statistics.median(times[WARM_UP_ROUNDS:]) for name, times in seconds.items()}
            print(
                f"{what}, {num_devices} devices in {group.size} processes:",
                ", ".join(f"{name} {1000 * value:.1f} ms" for name, value in of_each.items()),
                f"({of_each['everything to everyone'] / of_each['all-to-all']:.2f} times)",
            )
