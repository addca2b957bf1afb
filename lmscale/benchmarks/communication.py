"""The bytes that a step's rows move to a device, by every way to do it, beside what must move."""

import numpy as np
import tensorflow as tf

from lmscale.benchmarks.own_step import TABLE, sampled_softmax
from lmscale.benchmarks.peers.peer import ModelShape
from lmscale.benchmarks.synthetic import ZipfText
from lmscale.communication import row_bytes_received
from lmscale.data.batches import ContiguousBatches
from lmscale.distribution import collectives, ledger
from lmscale.distribution.strategies import make_strategy
from lmscale.tables.rows import Rows
from lmscale.tables.table import RowGradients, ShardedTable

WAYS = ("static", "all_to_all", "hidden")


def measure(*, shape, num_devices):
    """Counts what one step of a tied model moves, without its layers, in the graph that runs.

    Args:
      shape: fields of a `ModelShape`; batch_size is that of each device.
      num_devices: logical devices of the CPU.

    Returns:
      {"num_devices", "bytes": {way: of the device that receives most}, "must_move": {"all_to_all", "hidden": what the
      ids say, likewise}}.
    """
    shape = ModelShape(**shape)
    strategy = make_strategy(cpu_devices=num_devices)
    text = ZipfText(shape.vocab_size).split("train")
    batches = ContiguousBatches(
        text, global_batch_size=num_devices * shape.batch_size, window=shape.window, seed=0
    )
    ids = batches.at(0).features["ids"].reshape(num_devices, shape.batch_size, -1)
    head = sampled_softmax(shape, compute_dtype="float32")(
        table=TABLE, vocab_size=shape.vocab_size, counts=None
    )
    candidates = head.candidates(seed=tf.constant([0, 0]), labels=None)
    moved = {}
    for way in WAYS:
        with strategy.scope():
            table = ShardedTable(
                vocab_size=shape.vocab_size, embed_dim=shape.embed_dim, static_shapes=way == "static"
            )
        step = _hidden_step if way == "hidden" else _row_step
        moved[way] = _count(strategy, step, table=table, head=head, candidates=candidates, ids=ids)
    must_move = {
        way: row_bytes_received(
            ids.reshape(num_devices, -1),
            shared,
            placement=table.placement,
            row_bytes=4 * (shape.embed_dim + 1),
        )
        for way, shared in (
            ("all_to_all", candidates.sampled_ids.numpy()),
            ("hidden", np.zeros([0], np.int32)),
        )
    }
    per_token = head.hidden_bytes_per_token(embed_dim=shape.embed_dim, num_devices=num_devices)
    must_move["hidden"]["hidden_states"] = (num_devices - 1) * shape.tokens * per_token
    return {
        "num_devices": num_devices,
        "bytes": moved,
        "must_move": {way: int(np.max(sum(of_parts.values()))) for way, of_parts in must_move.items()},
    }


def _count(strategy, step, *, ids, candidates, **parts):
    """Bytes of the device that receives most in a step."""

    @tf.function(autograph=False)
    def run(ids, sampled_ids, log_expected_count):
        def replica_step():
            drawn = type(candidates)(sampled_ids, log_expected_count)
            with ledger.recording() as moved:
                step(ids[collectives.replica_id()], drawn, **parts)
            return tf.cast(sum(moved.received().values()), tf.int64)

        return strategy.run(replica_step)

    received = run(tf.constant(ids), candidates.sampled_ids, candidates.sampled_log_expected_count)
    return max(int(x) for x in strategy.experimental_local_results(received))


def _row_step(ids, candidates, *, table, head):
    """Rows of tokens and candidates here, and as many gradients back."""
    del head
    pulled = table.pull(ids, candidates.sampled_ids)
    gradients = {
        name: getattr(pulled, name) for name in ("embedding", "bias", "shared_embedding", "shared_bias")
    }
    table.collect(pulled, RowGradients(**gradients))


def _hidden_step(ids, candidates, *, table, head):
    """Rows of tokens here, their hidden states (here, rows) to the candidates, and gradients back."""
    pulled = table.pull(ids)
    labels = tf.reshape(ids[:, 1:], [-1])
    result = head.value_and_gradients(
        tf.reshape(pulled.embedding[:, :-1], [labels.shape[0], -1]),
        labels=labels,
        loss_weights=tf.ones(labels.shape),
        label_rows=Rows(
            tf.reshape(pulled.embedding[:, 1:], [labels.shape[0], -1]), tf.reshape(pulled.bias[:, 1:], [-1])
        ),
        candidate_rows=None,
        candidates=candidates,
        table=table,
    )
    table.collect(
        pulled,
        RowGradients(embedding=pulled.embedding, bias=pulled.bias),
        of_shard=[result.d_shard_rows],
    )
