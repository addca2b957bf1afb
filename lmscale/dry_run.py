"""What a run would do, without doing it: its parameters, the memory of each device, and what a step moves to it."""

import math

import numpy as np
from rich.console import Console
from rich.table import Table

from lmscale import communication
from lmscale.data.token_files import PreparedData
from lmscale.model import layers_and_treatments
from lmscale.parameters.initializers import initial_rows, initial_values
from lmscale.parameters.report import as_table, mib, parameter_lines
from lmscale.softmax.streamed import default_block_rows
from lmscale.start import check_sources
from lmscale.tables.placement import Placement
from lmscale.trainer import check_treatments, make_task, step_traffic

_FLOAT_BYTES = 4
_WIDTH = 140


def print_report(experiment, *, num_devices):
    """Prints the parameter table, the memory of a device and what a step moves to it.

    Allocates the layers, of tables a block of rows at most.

    Args:
      experiment: `Experiment`.
      num_devices: devices that the tables would be sharded over.

    Raises:
      ValueError: if the experiment does not fit its data or the devices, or what it would start from is not there.
    """
    experiment.check_devices(num_devices)
    data = PreparedData.open(experiment.data_dir)
    task = make_task(experiment, data=data, num_replicas=num_devices)
    layers, treatments = layers_and_treatments(task, experiment.groups, num_replicas=num_devices)
    check_treatments(experiment, treatments)
    _check_initializers(treatments, task, layers, vocab_size=data.vocab_size, seed=experiment.seed)
    lines = parameter_lines(task, layers, treatments, vocab_size=data.vocab_size, num_devices=num_devices)
    tensors = {line.path: (line.shape, np.dtype(line.dtype)) for line in lines}
    check_sources(experiment, task, tensors, vocabulary=data.vocabulary)
    batches = task.training_batches()
    console = Console(width=_WIDTH)
    console.print(as_table(lines))

    placement = Placement(vocab_size=data.vocab_size, num_shards=num_devices)
    state = sum(line.all_bytes_per_device for line in lines)
    sharded = sum(line.all_bytes_per_device for line in lines if line.sharded)
    pulled, logits = _step_bytes(task, batches, num_devices=num_devices, placement=placement)
    memory = Table(
        title=f"Memory of each of {num_devices} device(s)", title_justify="left", show_header=False
    )
    memory.add_row("tables and their slots, 1/N of the rows", f"{mib(sharded)} MiB")
    memory.add_row("layers and their slots, a copy on each", f"{mib(state - sharded)} MiB")
    memory.add_row("rows pulled for a step and their gradients (estimate)", f"{mib(pulled)} MiB")
    memory.add_row("logits of a step and their gradients (estimate)", f"{mib(logits)} MiB")
    memory.add_row("in all, without the activations of the layers", f"{mib(state + pulled + logits)} MiB")
    console.print(memory)
    if num_devices > 1:
        traffic = step_traffic(
            experiment,
            task,
            batches,
            treatments=treatments,
            vocab_size=data.vocab_size,
            num_devices=num_devices,
        )
        layer_values = communication.num_layer_values(layers, treatments)
        console.print(communication.as_table(traffic, traffic.chosen(), layer_values=layer_values))
    # Not the states of random number generators.
    num_parameters = sum(math.prod(line.shape) for line in lines if line.dtype == "float32")
    padding = placement.allocated_rows * num_devices - data.vocab_size
    console.print(
        f"{num_parameters:,} parameters; vocabulary {data.vocab_size:,} rows, {padding:,} more as padding over all "
        f"devices; {batches.labels_per_step:,} tokens a step, {batches.steps_per_epoch:,} steps an epoch, "
        f"{experiment.train_steps / batches.steps_per_epoch:.2f} epochs"
    )


def _check_initializers(treatments, task, layers, *, vocab_size, seed):
    """Raises ValueError for an initialiser of a group that cannot fill what it is for."""
    for path, treatment in treatments.items():
        initializer, drawn = treatment.initializer, {"seed": seed, "path": path}
        if initializer is None:
            continue
        if path in layers.trainable_variables:
            initial_values(initializer, layers.trainable_variables[path].shape, **drawn)
        elif path.endswith("/bias"):
            initial_values(initializer, [vocab_size], **drawn)
        else:
            embed_dim = task.tables[path.split("/")[1]].embed_dim
            next(initial_rows(initializer, vocab_size=vocab_size, embed_dim=embed_dim, **drawn))


def _step_bytes(task, batches, *, num_devices, placement):
    """Estimates (bytes of the pulled rows and their gradients, bytes of the logits and theirs) on one device."""
    features = batches.at(0).features
    labels = {name: int(label.ids.shape.num_elements()) for name, label in task.labels(features).items()}
    values = num_logits = 0
    for lookup in task.lookups(features).values():
        values += lookup.ids.size // num_devices * (task.tables[lookup.table].embed_dim + 1)
    for name, head in task.heads.items():
        width = task.tables[head.table].embed_dim + 1
        num_candidates = head.num_candidates(global_tokens=labels[name])
        if head.needs_label_rows and not head.candidates_are_labels:
            values += labels[name] // num_devices * width
        values += num_candidates * width
        num_logits += labels[name] // num_devices * num_candidates
        if not num_candidates:
            # Every row has a gradient: as the head gives it, and together with those of the inputs.
            values += placement.allocated_rows * width
            num_logits += labels[name] * default_block_rows(
                tokens=labels[name], embed_dim=width - 1, shard_rows=placement.allocated_rows
            )
    return 2 * values * _FLOAT_BYTES, 2 * num_logits * _FLOAT_BYTES
