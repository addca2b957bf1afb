"""What a step asks of a device: arithmetic, memory traffic, traffic between devices; and what bounds it.

Times are those of the rates alone: operations over the rate of matrix products, bytes over bandwidths, each resource by
itself. A real step takes longer; what is compared is which resource asks for most.
"""

import dataclasses
import functools
import math

import tensorflow as tf

from lmscale.communication import PARTS, row_bytes_received
from lmscale.planning.computation import row_update_cost
from lmscale.planning.graphs import cost_of
from lmscale.planning.memory import FLOAT_BYTES
from lmscale.softmax.exact import full_softmax_value_and_gradients

RESOURCES = ("compute", "memory bandwidth", "network")


_LEAST_RATE = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rates:
    """What a device can do in a second.

    Attributes:
      tflops: 10^12 floating-point operations of matrix products.
      memory_bandwidth_gbps: 10^9 bytes of its memory.
      bandwidth_gbps: 10^9 bytes that it receives from other devices.
    """

    tflops: float
    memory_bandwidth_gbps: float
    bandwidth_gbps: float

    def __post_init__(self):
        for name, value in vars(self).items():
            if not _LEAST_RATE <= value < math.inf:
                raise ValueError(
                    f"{name} must be finite and at least {_LEAST_RATE:g}. Received: {name}={value}. Give the rate of "
                    "a device."
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What is asked of one device.

    Attributes:
      product_flops: floating-point operations of matrix products.
      memory_bytes: read and written in its memory.
      network_bytes: received from other devices.
    """

    product_flops: float
    memory_bytes: float
    network_bytes: float

    def secs(self, rates):
        """{resource: seconds}."""
        return {
            "compute": self.product_flops / (rates.tflops * 1e12),
            "memory bandwidth": self.memory_bytes / (rates.memory_bandwidth_gbps * 1e9),
            "network": self.network_bytes / (rates.bandwidth_gbps * 1e9),
        }

    def bottleneck(self, rates):
        """The resource that asks for most time."""
        secs = self.secs(rates)
        return max(RESOURCES, key=lambda resource: secs[resource])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """A head with candidates beside the full softmax over its table: the vocabulary's part of a step.

    Attributes:
      sampled, full: `Work` of either.
      vocab_size: rows of the table.
      turns_at_by_flops: vocabulary below which the full softmax takes fewer operations.
      turns_at: vocabulary below which it takes no more time, by the rates; 0 if it never does.
    """

    sampled: Work
    full: Work
    vocab_size: int
    turns_at_by_flops: int
    turns_at: int

    @property
    def full_is_better(self):
        return self.vocab_size <= self.turns_at


def step_work(step):
    """`Work` of a whole step on the device that is asked for most.

    Args:
      step: `Step`.
    """
    training, update = step.training_cost, step.update_cost
    parts = step.num_parts
    return Work(
        product_flops=parts * sum(training.product_flops.values()),
        memory_bytes=parts * sum(training.moved_bytes.values())
        + sum(update.moved_bytes.values())
        + sum(_row_memory_bytes(use) for use in step.table_uses.values()),
        network_bytes=sum(network_bytes(step).values()),
    )


def network_bytes(step):
    """{part of `communication.PARTS`: bytes that the busiest device receives in a step}."""
    if step.num_devices == 1:
        return dict.fromkeys(PARTS, 0)
    return step.traffic.of_busiest_device(step.traffic.chosen(), layer_values=step.num_layer_values)


def compare_heads(step, rates):
    """{head: `Comparison`} of the heads with candidates.

    Args:
      step: `Step`.
      rates: `Rates`.
    """
    return {
        name: _compare(step, name, head, rates)
        for name, head in step.task.heads.items()
        if step.has_candidates(head)
    }


def _compare(step, name, head, rates):
    sampled, full = _sampled_work(step, head), _full_work(step, name, head)
    # Operations and memory traffic of the full softmax grow with the vocabulary; its network traffic does not.
    per_row = {"compute": full.product_flops, "memory bandwidth": full.memory_bytes}
    secs, full_secs = max(sampled.secs(rates).values()), full.secs(rates)
    vocab_size, turns_at = step.task.num_rows(head.table), 0
    if full_secs["network"] <= secs:
        turns_at = min(int(secs / full_secs[resource] * vocab_size) for resource in per_row)
    return Comparison(
        sampled=sampled,
        full=full,
        vocab_size=vocab_size,
        turns_at_by_flops=int(sampled.product_flops / full.product_flops * vocab_size),
        turns_at=turns_at,
    )


def _sampled_work(step, head):
    """Of the head alone, and of the rows of its table, which the inputs of a tied model share."""
    use = step.table_uses[head.table]
    update = row_update_cost(step, head.table, number=use.num_touched, is_dense=False)
    ids, shared_ids = step.ids[head.table]
    moved = row_bytes_received(
        ids, shared_ids, placement=step.placements[head.table], row_bytes=FLOAT_BYTES * use.row_values
    )
    cost = step.training_cost
    return Work(
        product_flops=step.num_parts * cost.product_flops.get("head", 0),
        memory_bytes=step.num_parts * cost.moved_bytes.get("head", 0)
        + sum(update.moved_bytes.values())
        + _row_memory_bytes(use),
        network_bytes=sum(int(of_devices.max()) for of_devices in moved.values()),
    )


def _full_work(step, name, head):
    """Of a full softmax in the place of the head, and of the update of every row that it asks for."""
    config = step.task.tables[head.table]
    tokens, rows = step.tokens[name] * step.num_devices, step.table_uses[head.table].held_rows
    specs = [
        tf.TensorSpec([tokens, config.embed_dim]),
        tf.TensorSpec([tokens], tf.int32),
        tf.TensorSpec([tokens]),
        tf.TensorSpec([rows, config.embed_dim]),
    ]
    loss = functools.partial(
        full_softmax_value_and_gradients,
        num_valid_rows=rows,
        compute_dtype=getattr(head, "compute_dtype", tf.float32),
    )
    cost = cost_of(
        lambda hidden, labels, loss_weights, rows: (
            loss(hidden, labels=labels, loss_weights=loss_weights, rows=rows, bias=None).d_hidden
        ),
        *specs,
        part_of=lambda name: "head",
    )
    update = row_update_cost(step, head.table, number=rows, is_dense=True)
    return Work(
        product_flops=cost.product_flops["head"],
        memory_bytes=cost.moved_bytes["head"] + sum(update.moved_bytes.values()),
        network_bytes=_hidden_bytes(step, name),
    )


def _hidden_bytes(step, name):
    """Of a full softmax over shards: hidden states, labels and weights to all; sums and d_hidden back."""
    others, tokens = step.num_devices - 1, step.tokens[name]
    width = step.task.tables[step.task.heads[name].table].embed_dim
    gathered = FLOAT_BYTES * tokens * (width + 2) + FLOAT_BYTES * tokens * step.num_devices
    # An all-reduce of what all devices' tokens get: 2 (N - 1) / N of its bytes.
    return others * gathered + 2 * others * FLOAT_BYTES * tokens * (width + 1)


def _row_memory_bytes(use):
    """Of rows that are gathered, of their gradients that are put side by side, and of new rows that are written."""
    pulled = 2 * (use.num_own + use.num_shared)
    pushed = 2 * 3 * (use.num_own + use.num_shared) + 2 * use.num_touched
    return FLOAT_BYTES * use.row_values * (pulled + (pushed if use.is_updated else 0))
