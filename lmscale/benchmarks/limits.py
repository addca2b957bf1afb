"""The vocabulary's part of a step, and the exact evaluation, beside what the machine's arithmetic and memory allow.

A part's limit is the larger of flops / matrix_rate and bytes / copy_bandwidth, both rates measured in the same process:
the rate of a square product of 2,048 in the part's dtype, and the bandwidth of a copy out of cache. The bytes are those
that no implementation avoids: each distinct row and its second moment in and out of the table; not copies of them, nor
the logits.
"""

import time

import numpy as np
import tensorflow as tf

from lmscale.benchmarks.machine import copy_bandwidth, fastest
from lmscale.benchmarks.own_step import TABLE, LmscaleBody, make_trainer, sampled_softmax
from lmscale.benchmarks.peers.peer import ModelShape
from lmscale.benchmarks.synthetic import ZipfText
from lmscale.data.batches import ContiguousBatches
from lmscale.distribution import collectives
from lmscale.distribution.strategies import make_strategy
from lmscale.parameters.update_rules import Adam
from lmscale.reading import StepRows
from lmscale.softmax.exact import full_softmax_loss
from lmscale.tables.rows import Rows
from lmscale.tables.table import RowGradients, ShardedTable

_SQUARE = 2048
_WHOLE = "pull, loss, push, update"
_DTYPES = ("float32", "bfloat16")


def matrix_rate(dtype, *, repeats=8):
    """Floating-point operations a second of a square matrix product of 2,048."""
    matrix = tf.cast(tf.random.normal([_SQUARE, _SQUARE]), dtype)
    product = tf.function(lambda x: tf.matmul(x, x)[0, 0], autograph=False)
    return 2 * _SQUARE**3 / fastest(lambda: product(matrix).numpy(), repeats=repeats)


def measure(*, shape, evaluation_tokens, repeats):
    """Times the parts of a step and of an evaluation in turn.

    Args:
      shape: fields of a `ModelShape`.
      evaluation_tokens: tokens of an exact evaluation step.
      repeats: rounds.

    Returns:
      {"matrix_flops_per_sec": {dtype: rate}, "copy_bytes_per_sec", "parts": [{"name", "dtype", "secs", "flops",
      "bytes", "limit_secs", "achieved"}], "body_secs": {dtype: seconds}, "vocabulary_over_body": {dtype: seconds of
      the vocabulary's part of a step over them}}.
    """
    shape = ModelShape(**shape)
    strategy = make_strategy()
    model = make_trainer(shape, strategy=strategy).model
    parts = []
    for dtype in _DTYPES:
        parts += _step_parts(shape, model, dtype)
        parts.append(_evaluation(shape, model, dtype, evaluation_tokens))
    bodies = {dtype: LmscaleBody(shape, compute_dtype=dtype) for dtype in _DTYPES}
    body_secs = {dtype: [] for dtype in _DTYPES}
    seconds = [[] for _ in parts]
    rates = dict.fromkeys(_DTYPES, 0.0)
    bandwidth = 0.0
    calls = [_call(strategy, part.pop("function")) for part in parts]
    for i in range(repeats + 1):
        # The rates in every round as well, and their best: the limit is what the machine can do.
        rates = {dtype: max(rates[dtype], matrix_rate(dtype, repeats=2)) for dtype in _DTYPES}
        bandwidth = max(bandwidth, copy_bandwidth(repeats=2))
        for dtype, body in bodies.items():
            for _ in range(5):
                start = time.perf_counter()
                body.train_step(None)
                if i:
                    body_secs[dtype].append(time.perf_counter() - start)
        for part, call, list_of_seconds in zip(parts, calls, seconds, strict=True):
            for j in range(1 if part["name"] == "exact evaluation" else 5):
                start = time.perf_counter()
                call(i * 5 + j)
                if i:
                    list_of_seconds.append(time.perf_counter() - start)
    for part, list_of_seconds in zip(parts, seconds, strict=True):
        part["secs"] = float(np.median(list_of_seconds))
        part["limit_secs"] = max(part["flops"] / rates[part["dtype"]], part["bytes"] / bandwidth)
        part["achieved"] = part["limit_secs"] / part["secs"]
    whole = {part["dtype"]: part["secs"] for part in parts if part["name"] == _WHOLE}
    return {
        "shape": vars(shape),
        "evaluation_tokens": evaluation_tokens,
        "matrix_flops_per_sec": rates,
        "copy_bytes_per_sec": bandwidth,
        "parts": parts,
        "body_secs": {dtype: float(np.median(body_secs[dtype])) for dtype in _DTYPES},
        "vocabulary_over_body": {
            dtype: whole[dtype] / float(np.median(body_secs[dtype])) for dtype in _DTYPES
        },
    }


def measure_exchanges(*, shape, num_devices, repeats):
    """Times pull, push and update by the exchange of static shapes and by the one that a strategy gets, in turn.

    Args:
      shape: fields of a `ModelShape`; batch_size is that of each device.
      num_devices: logical devices of the CPU.
      repeats: rounds, of 10 steps by either.

    Returns:
      {"num_devices", "secs": {"static", "chosen": median seconds of a step}, "speedup": the one over the other}.
    """
    shape = ModelShape(**shape)
    strategy = make_strategy(cpu_devices=num_devices)
    text = ZipfText(shape.vocab_size).split("train")
    batches = ContiguousBatches(
        text, global_batch_size=num_devices * shape.batch_size, window=shape.window, seed=0
    )
    head = sampled_softmax(shape, compute_dtype="float32")(
        table=TABLE, vocab_size=shape.vocab_size, counts=None
    )
    steps = {}
    for name, static_shapes in (("static", True), ("chosen", False)):
        with strategy.scope():
            table = ShardedTable(
                vocab_size=shape.vocab_size,
                embed_dim=shape.embed_dim,
                update_rule=Adam(learning_rate=0.001, beta_1=0.0),
                static_shapes=static_shapes,
            )
        steps[name] = _exchange_step(strategy, table, batch_size=shape.batch_size)
    secs = {name: [] for name in steps}
    for i in range(repeats + 1):
        batch = tf.constant(batches.at(i).features["ids"])
        labels = tf.reshape(batch[:, 1:], [-1])
        sampled_ids = tf.identity(head.candidates(seed=tf.constant([0, i]), labels=labels).sampled_ids)
        for j in range(10):
            for name, step in steps.items():
                start = time.perf_counter()
                results = step(batch, sampled_ids, tf.constant(10 * i + j))
                for result in strategy.experimental_local_results(results):
                    result.numpy()
                if i:
                    secs[name].append(time.perf_counter() - start)
    medians = {name: float(np.median(x)) for name, x in secs.items()}
    return {
        "num_devices": num_devices,
        "secs": medians,
        "speedup": medians["static"] / medians["chosen"],
    }


def _exchange_step(strategy, table, *, batch_size):
    """A compiled pull, push and update; the gradients are the rows themselves."""

    @tf.function(autograph=False)
    def step(batch, sampled_ids, number):
        def replica_step():
            first = collectives.replica_id() * batch_size
            return _exchange(table, batch[first : first + batch_size], sampled_ids, number)

        return strategy.run(replica_step)

    return step


def _exchange(table, ids, sampled_ids, number):
    """Pull, push and update, on one replica; returns the squared norm over all of them."""
    pulled = table.pull(ids, sampled_ids)
    gradients = RowGradients(
        embedding=pulled.embedding,
        bias=pulled.bias,
        shared_embedding=pulled.shared_embedding,
        shared_bias=pulled.shared_bias,
    )
    collected = table.collect(pulled, gradients)
    squared_norm = collectives.all_reduce_sum(tf.add_n(list(collected.squared_norm.values())))
    table.apply(collected, step=number, scale=1e-6, keep=tf.math.is_finite(squared_norm))
    return squared_norm


def _call(strategy, function):
    """Calls it under the strategy and waits for everything that it computes."""
    step = tf.function(lambda number: strategy.run(function, args=(number,)), autograph=False)

    def call(number):
        for result in tf.nest.flatten(step(tf.constant(number))):
            strategy.experimental_local_results(result)[0].numpy()

    return call


def _step_parts(shape, model, dtype):
    """The sampled loss alone; the exchange with the table alone; both as in a step."""
    head = sampled_softmax(shape, compute_dtype=dtype)(table=TABLE, vocab_size=shape.vocab_size, counts=None)
    ((name, _),) = model.task.heads.items()
    table, generator = model.tables[TABLE], tf.random.Generator.from_seed(0)
    text = ZipfText(shape.vocab_size).split("train")
    batches = ContiguousBatches(text, global_batch_size=shape.batch_size, window=shape.window, seed=0)
    features = {"ids": tf.constant(batches.at(0).features["ids"])}
    ids = features["ids"]
    labels = model.task.labels(features)[name].ids
    hidden = generator.normal([shape.tokens, shape.embed_dim])
    label_rows = Rows(0.05 * generator.normal([shape.tokens, shape.embed_dim]))
    candidate_rows = Rows(0.05 * generator.normal([shape.num_sampled, shape.embed_dim]))
    weights = tf.fill([shape.tokens], 1 / shape.tokens)

    def candidates(number):
        return head.candidates(seed=tf.stack([0, number]), labels=labels)

    def value_and_gradients(drawn, label_rows, candidate_rows):
        return head.value_and_gradients(
            hidden,
            labels=labels,
            loss_weights=weights,
            label_rows=label_rows,
            candidate_rows=candidate_rows,
            candidates=drawn,
            table=table,
        )

    def loss_alone(number):
        loss = value_and_gradients(candidates(number), label_rows, candidate_rows)
        rows = [loss.d_label_rows, loss.d_candidate_rows]
        return [loss.loss, loss.d_hidden, *(x for r in rows for x in (r.embedding, r.bias))]

    def exchange_alone(number):
        return _exchange(table, ids, candidates(number).sampled_ids, number)

    def all_of_it(number):
        reading = model.read(features, 0, step=number)
        loss = value_and_gradients(
            reading.candidates[name], reading.rows.labels[name], reading.rows.candidates[name]
        )
        # The gradient of the hidden states in place of one that has gone through the body.
        d_inputs = {
            role: Rows(tf.reshape(loss.d_hidden, r.embedding.shape)) for role, r in reading.rows.roles.items()
        }
        d_rows = StepRows(
            roles=d_inputs, labels={name: loss.d_label_rows}, candidates={name: loss.d_candidate_rows}
        )
        collected = model.collect(reading, d_rows, d_shards={})[TABLE]
        squared_norm = collectives.all_reduce_sum(tf.add_n(list(collected.squared_norm.values())))
        table.apply(
            collected,
            step=number,
            scale=1e-6,
            keep=tf.math.is_finite(tf.reduce_sum(loss.loss) + squared_norm),
        )
        return squared_norm, loss.d_hidden

    flops = 3 * 2 * shape.tokens * shape.num_sampled * shape.embed_dim
    rows = len(np.union1d(ids, candidates(0).sampled_ids))
    # Read as it is pulled; weight and second moment read and written as it is updated.
    exchanged = rows * shape.embed_dim * 4 * (1 + 4)
    # Hidden states, labels' rows and sampled rows in, their gradients out.
    loss_bytes = 4 * shape.embed_dim * 2 * (2 * shape.tokens + shape.num_sampled)
    listed = [{"name": "sampled loss", "function": loss_alone, "flops": flops, "bytes": loss_bytes}]
    if dtype == "float32":
        listed.append(
            {"name": "pull, push, update", "function": exchange_alone, "flops": 0, "bytes": exchanged}
        )
    listed.append(
        {
            "name": _WHOLE,
            "function": all_of_it,
            "flops": flops,
            "bytes": exchanged,
        }
    )
    return [part | {"dtype": dtype} for part in listed]


def _evaluation(shape, model, dtype, tokens):
    """An exact evaluation of so many tokens."""
    table = model.tables[TABLE]
    hidden = tf.random.Generator.from_seed(1).normal([tokens, shape.embed_dim])
    labels = tf.constant(np.random.default_rng(1).integers(0, shape.vocab_size, [tokens], np.int32))

    def evaluate(number):
        return tf.reduce_sum(
            full_softmax_loss(
                hidden + 0.0 * tf.cast(number, tf.float32),
                labels=labels,
                rows=table.local_parameter("embedding"),
                bias=table.local_parameter("bias"),
                num_valid_rows=table.num_valid_rows,
                compute_dtype=dtype,
            )
        )

    return {
        "name": "exact evaluation",
        "dtype": dtype,
        "function": evaluate,
        "flops": 2 * tokens * shape.vocab_size * shape.embed_dim,
        "bytes": 4 * shape.vocab_size * shape.embed_dim,
    }
