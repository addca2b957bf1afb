"""What a run would do, without doing it: its parameters, and the memory that each device would hold."""

import numpy as np
import tensorflow as tf
from rich.console import Console
from rich.table import Table

from lmscale import keras_settings
from lmscale.data.token_files import PreparedData
from lmscale.model import make_encoder
from lmscale.softmax.streamed import default_block_rows
from lmscale.tables.placement import Placement
from lmscale.tables.table import table_layout
from lmscale.trainer import training_batches

_FLOAT_BYTES = 4


def print_report(experiment, *, num_devices):
    """Prints the parameter table and the memory of a device. Allocates the body, not the vocabulary.

    Args:
      experiment: `Experiment`.
      num_devices: devices that the table would be sharded over.

    Raises:
      ValueError: if the experiment does not fit its data or the devices.
    """
    experiment.check_devices(num_devices)
    experiment.check_learning_rates()
    data = PreparedData.open(experiment.data_dir)
    loss = experiment.loss(vocab_size=data.vocab_size, counts=data.counts)
    keras_settings.reset(seed=experiment.seed, compute_dtype=experiment.compute_dtype)
    encoder = make_encoder(experiment, num_replicas=num_devices)
    batches = training_batches(experiment, body=encoder.body, tokens=data.split("train"))
    placement = Placement(vocab_size=data.vocab_size, num_shards=num_devices)
    console = Console(width=110)

    table = Table(title="Parameters and optimizer state", title_justify="left", show_footer=True)
    rows = []
    num_parameters = 0
    for entry in table_layout(
        vocab_size=data.vocab_size,
        embed_dim=experiment.embed_dim,
        optimizer=experiment.row_optimizer,
        bias=experiment.softmax_bias,
    ):
        shape = (data.vocab_size, *entry.row_shape)
        num_parameters += 0 if entry.is_slot else int(np.prod(shape))
        rows.append(
            (f"table/{entry.name}", shape, entry.dtype.name, "sharded", entry.bytes_on_shard(placement))
        )
    for name, variable in encoder.variables.items():
        size = int(np.prod(variable.shape))
        dtype = tf.as_dtype(variable.dtype)
        num_parameters += size if dtype.is_floating else 0  # Not the states of random number generators.
        where = "replicated" if variable.trainable else "replicated, not trained"
        rows.append((f"body/{name}", tuple(variable.shape), dtype.name, where, size * dtype.size))
        for slot_name, slot in experiment.body_optimizer.slots.items() if variable.trainable else ():
            shape = tuple(variable.shape) if slot.per_element else ()
            slot_bytes = (size if slot.per_element else 1) * slot.dtype.size
            rows.append((f"body_slots/{name}/{slot_name}", shape, slot.dtype.name, "replicated", slot_bytes))
    state_bytes = sum(row[-1] for row in rows)
    for title, footer, justify in (
        ("name", "", "left"),
        ("shape", "", "right"),
        ("dtype", "", "left"),
        ("placement", "all", "left"),
        ("MiB a device", _mib(state_bytes), "right"),
    ):
        table.add_column(title, footer=footer, justify=justify)
    for name, shape, dtype, where, size in rows:
        table.add_row(name, " x ".join(f"{n:,}" for n in shape) or "scalar", dtype, where, _mib(size))
    console.print(table)

    sharded = sum(row[-1] for row in rows if row[3] == "sharded")
    padding = placement.allocated_rows * num_devices - data.vocab_size
    tokens = experiment.global_batch_size * experiment.window
    pulled, logits = _step_bytes(experiment, loss=loss, num_devices=num_devices, placement=placement)
    memory = Table(
        title=f"Memory of each of {num_devices} device(s)", title_justify="left", show_header=False
    )
    memory.add_row("table and its slots, 1/N of the rows", f"{_mib(sharded)} MiB")
    memory.add_row("body and its slots, a copy on each", f"{_mib(state_bytes - sharded)} MiB")
    memory.add_row("rows pulled for a step and their gradients (estimate)", f"{_mib(pulled)} MiB")
    memory.add_row("logits of a step and their gradients (estimate)", f"{_mib(logits)} MiB")
    memory.add_row("in all, without the body's activations", f"{_mib(state_bytes + pulled + logits)} MiB")
    console.print(memory)
    console.print(
        f"{num_parameters:,} parameters; vocabulary {data.vocab_size:,} rows, {padding:,} more as padding over all "
        f"devices; {tokens:,} tokens a step, {batches.steps_per_epoch:,} steps an epoch, "
        f"{experiment.train_steps / batches.steps_per_epoch:.2f} epochs"
    )


def _step_bytes(experiment, *, loss, num_devices, placement):
    """Estimates (bytes of the pulled rows and their gradients, bytes of the logits and theirs) on one device."""
    global_tokens = experiment.global_batch_size * experiment.window
    num_shared = loss.num_shared_rows(global_tokens=global_tokens)
    pulled = experiment.global_batch_size * (experiment.window + 1) + num_shared
    if num_shared:
        num_logits = global_tokens // num_devices * num_shared
    else:
        # Every row has a gradient: as the loss gives it, and merged with those of the inputs.
        pulled += placement.allocated_rows
        num_logits = global_tokens * default_block_rows(
            tokens=global_tokens, embed_dim=experiment.embed_dim, shard_rows=placement.allocated_rows
        )
    return 2 * pulled * (experiment.embed_dim + 1) * _FLOAT_BYTES, 2 * num_logits * _FLOAT_BYTES


def _mib(num_bytes):
    return f"{num_bytes / 2**20:,.2f}"
