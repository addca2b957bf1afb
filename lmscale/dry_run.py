"""What a run would do, without doing it: its parameters, the memory of each device, and what a step moves to it."""

import math

import numpy as np
from rich.console import Console

from lmscale import communication
from lmscale.assembly import check_treatments, make_task
from lmscale.data.prepared import open_prepared
from lmscale.model import layers_and_treatments
from lmscale.parameters.initializers import initial_rows, initial_values
from lmscale.parameters.report import as_table, parameter_lines
from lmscale.planning.report import memory_table
from lmscale.planning.step import Step
from lmscale.start import check_sources
from lmscale.tables.placement import Placement

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
    data = open_prepared(experiment.data_dir)
    task = make_task(experiment, data=data, num_replicas=num_devices)
    layers, treatments = layers_and_treatments(task, experiment.groups, num_replicas=num_devices)
    check_treatments(experiment, treatments)
    _check_initializers(treatments, task, layers, seed=experiment.seed)
    lines = parameter_lines(task, layers, treatments, num_devices=num_devices)
    tensors = {line.path: (line.shape, np.dtype(line.dtype)) for line in lines}
    check_sources(experiment, task, tensors)
    batches = task.training_batches()
    step = Step(experiment, task, layers, treatments, num_devices=num_devices)
    console = Console(width=_WIDTH)
    console.print(as_table(lines))

    console.print(memory_table(step.memory, num_devices=num_devices))
    if num_devices > 1:
        layer_values = communication.num_layer_values(layers, treatments)
        console.print(communication.as_table(step.traffic, step.traffic.chosen(), layer_values=layer_values))
    # Not the states of random number generators.
    num_parameters = sum(math.prod(line.shape) for line in lines if line.dtype == "float32")
    sizes = {name: len(words) for name, words in data.vocabularies.items()}
    padding = sum(
        Placement(vocab_size=size, num_shards=num_devices).allocated_rows * num_devices - size
        for size in sizes.values()
    )
    rows = ", ".join(f"{name} {size:,}" if len(sizes) > 1 else f"{size:,}" for name, size in sizes.items())
    console.print(
        f"{num_parameters:,} parameters; vocabulary {rows} rows, {padding:,} more as padding over "
        f"all devices; {batches.labels_per_step:,} tokens a step, {batches.steps_per_epoch:,} steps an epoch, "
        f"{experiment.train_steps / batches.steps_per_epoch:.2f} epochs"
    )


def _check_initializers(treatments, task, layers, *, seed):
    """Raises ValueError for an initialiser of a group that cannot fill what it is for."""
    for path, treatment in treatments.items():
        initializer, drawn = treatment.initializer, {"seed": seed, "path": path}
        if initializer is None:
            continue
        if path in layers.trainable_variables:
            initial_values(initializer, layers.trainable_variables[path].shape, **drawn)
        elif path.endswith("/bias"):
            initial_values(initializer, [task.num_rows(path.split("/")[1])], **drawn)
        else:
            table = path.split("/")[1]
            shape = {"vocab_size": task.num_rows(table), "embed_dim": task.tables[table].embed_dim}
            next(initial_rows(initializer, **shape, **drawn))
