"""One of several processes of a MultiWorkerMirroredStrategy: pulls and pushes rows, prints what it saw as JSON.

Arguments: index of the process, then the address of each.
"""

import json
import os
import sys

INDEX, WORKERS = int(sys.argv[1]), sys.argv[2:]
os.environ["TF_CONFIG"] = json.dumps(
    {"cluster": {"worker": WORKERS}, "task": {"type": "worker", "index": INDEX}}
)

import tensorflow as tf  # noqa: E402

from lmscale.parameters.update_rules import SGD  # noqa: E402
from lmscale.tables.table import RowGradients, ShardedTable  # noqa: E402

strategy = tf.distribute.MultiWorkerMirroredStrategy()
with strategy.scope():
    table = ShardedTable(vocab_size=11, embed_dim=3, update_rule=SGD(learning_rate=1.0), seed=5)


@tf.function
def step(own_ids, shared_ids):
    def replica_step():
        rows = table.pull(own_ids, shared_ids)
        gradients = RowGradients(
            embedding=tf.ones_like(rows.embedding), shared_embedding=tf.ones_like(rows.shared_embedding)
        )
        table.push(rows, gradients, step=tf.constant(0))
        return rows.embedding, rows.shared_embedding, table.pull(tf.range(11)).embedding

    return strategy.run(replica_step)


own_ids = tf.constant([[1, 4], [4, 10]][INDEX])
rows, shared, after = (strategy.experimental_local_results(x)[0] for x in step(own_ids, tf.constant([0, 4])))
print(
    json.dumps(
        {"rows": rows.numpy().tolist(), "shared": shared.numpy().tolist(), "after": after.numpy().tolist()}
    )
)
