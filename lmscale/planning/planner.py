"""A plan: memory, work and bottleneck of a step on N devices, and the fewest devices whose memory is enough."""

import math

from lmscale.assembly import check_treatments, make_task
from lmscale.data.prepared import open_prepared
from lmscale.metrics import device_memory_mib
from lmscale.model import layers_and_treatments
from lmscale.planning.memory import LASTING, PASSING
from lmscale.planning.step import Step
from lmscale.planning.work import compare_heads, network_bytes, step_work


def make_step(experiment, *, data, num_devices):
    """The `Step` of an experiment on N devices, whose layers it makes, and no table.

    Raises:
      ValueError: if the experiment does not fit the devices or its data.
    """
    experiment.check_devices(num_devices)
    task = make_task(experiment, data=data, num_replicas=num_devices)
    layers, treatments = layers_and_treatments(task, experiment.groups, num_replicas=num_devices)
    check_treatments(experiment, treatments)
    return Step(experiment, task, layers, treatments, num_devices=num_devices)


def make_plan(experiment, *, num_devices, device_memory_gib, rates):
    """Everything that is told of N devices, as what JSON can hold.

    Args:
      experiment: `Experiment`.
      num_devices: N.
      device_memory_gib: memory of a device.
      rates: `Rates`.

    Returns:
      ({"devices", "device_memory_gib", "fits", "fewest_devices", "memory_mib", "largest_phase", "code_mib", "work",
      "network_bytes", "secs", "bottleneck", "heads", "rates"}, as docs/plan.md tells; `DeviceMemory`).

    Raises:
      ValueError: as of `make_step`; if the memory is not positive and finite.
    """
    if not 0 < device_memory_gib < math.inf:
        raise ValueError(
            f"device_memory_gib must be positive and finite. Received: {device_memory_gib}. Give the memory of one "
            "device."
        )
    data = open_prepared(experiment.data_dir)
    step = make_step(experiment, data=data, num_devices=num_devices)
    memory, work = step.memory, step_work(step)
    limit = device_memory_gib * 2**30
    heads = {
        name: {
            "vocab_size": comparison.vocab_size,
            "sampled": vars(comparison.sampled),
            "full": vars(comparison.full),
            "turns_at_rows_by_flops": comparison.turns_at_by_flops,
            "turns_at_rows": comparison.turns_at,
            "full_is_better": comparison.full_is_better,
        }
        for name, comparison in compare_heads(step, rates).items()
    }
    plan = {
        "devices": num_devices,
        "vocab_sizes": {name: len(words) for name, words in data.vocabularies.items()},
        "device_memory_gib": device_memory_gib,
        "fits": memory.peak_bytes <= limit,
        "fewest_devices": _fewest_devices(experiment, data=data, step=step, limit=limit),
        "memory_mib": {
            "lasting": {part: memory.lasting[part] / 2**20 for part in LASTING},
            "phases": {
                phase: {part: of[part] / 2**20 for part in PASSING if of.get(part)}
                for phase, of in memory.phases.items()
            },
            "step": memory.step_bytes / 2**20,
            "evaluation": memory.evaluation_bytes / 2**20,
            "peak": memory.peak_bytes / 2**20,
        },
        "largest_phase": memory.largest_of_step,
        "code_mib": sum(device_memory_mib().values()),
        "has_unknown_sizes": step.training_cost.has_unknown_sizes or step.evaluation_cost.has_unknown_sizes,
        "work": vars(work),
        "network_bytes": network_bytes(step),
        "secs": work.secs(rates),
        "bottleneck": work.bottleneck(rates),
        "heads": heads,
        "rates": vars(rates),
    }
    return plan, memory


def _fewest_devices(experiment, *, data, step, limit):
    """The fewest devices that the batch can be divided over and whose memory is enough; None if there are none."""
    parts = experiment.global_batch_size // experiment.gradient_accumulation_steps
    replicated = step.memory.lasting["layers"] + step.memory.lasting["layer_slots"]
    sharded = step.num_devices * (step.memory.lasting["table_rows"] + step.memory.lasting["table_slots"])
    for num_devices in range(1, parts + 1):
        if experiment.global_batch_size % (num_devices * experiment.gradient_accumulation_steps):
            continue
        # Rows that no device has twice, before their padding: with fewer devices there is no need to look further.
        rows = sharded * min(_share_of_rows(placement) for placement in step.placements.values())
        if replicated + rows / num_devices > limit:
            continue
        other = step
        if num_devices != step.num_devices:
            other = make_step(experiment, data=data, num_devices=num_devices)
        if other.memory.peak_bytes <= limit:
            return num_devices
    return None


def _share_of_rows(placement):
    """How much of what all devices hold of a table is no padding."""
    return placement.vocab_size / (placement.allocated_rows * placement.num_shards)
