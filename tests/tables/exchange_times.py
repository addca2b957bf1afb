"""Seconds of pull, push and update in several processes, the static exchange and the all-to-all in turns.

launch/local_workers.sh 2 -- .venv/bin/python tests/tables/exchange_times.py
"""

import statistics
import time

from lmscale.distribution.cluster import find_cluster
from lmscale.distribution.rendezvous import joined

VOCAB_SIZE, EMBED_DIM, NUM_IDS, NUM_SAMPLED, ROUNDS = 100_000, 256, 32 * 36, 2048, 15

with joined(find_cluster()) as group:
    import numpy as np
    import tensorflow as tf

    from lmscale.distribution.strategies import make_strategy
    from lmscale.parameters.update_rules import Adagrad
    from lmscale.tables.table import RowGradients, ShardedTable

    strategy = make_strategy(cpu_devices=1, group=group)

    def make_step(*, static_shapes):
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
                pulled = table.pull(ids, shared_ids)
                gradients = {name: getattr(pulled, name) for name in ("embedding", "shared_embedding")}
                table.push(pulled, RowGradients(**gradients), step=tf.constant(0))
                return tf.reduce_sum(pulled.embedding)

            return strategy.run(replica_step)

        return step

    steps = {"static": make_step(static_shapes=True), "all-to-all": make_step(static_shapes=False)}
    seconds: dict = {name: [] for name in steps}
    for number in range(ROUNDS):
        # Zipf's law by inverse CDF; the samples are the same in every process.
        own, shared = (np.random.default_rng([number, rank]) for rank in (group.rank, group.size))
        ids, shared_ids = (
            tf.constant(np.exp(generator.random(size) * np.log(VOCAB_SIZE)).astype(np.int32) - 1)
            for generator, size in ((own, NUM_IDS), (shared, NUM_SAMPLED))
        )
        for name, step in steps.items():
            group.gather()
            start = time.perf_counter()
            float(strategy.experimental_local_results(step(ids, shared_ids))[0])
            seconds[name].append(time.perf_counter() - start)
    if group.is_chief:
        # The first rounds trace, and meet sizes for the first time.
        of_each = {name: statistics.median(times[5:]) for name, times in seconds.items()}
        for name, value in of_each.items():
            print(f"{name}: {1000 * value:.1f} ms")
        print(f"{of_each['static'] / of_each['all-to-all']:.2f} times")
