"""GPUs of a process, where several on a host see the same ones."""

import re
from collections.abc import Mapping, Sequence
from typing import TypeVar

from lmscale.distribution.clusters.description import Cluster

Entry = TypeVar("Entry")


def visible_gpus(environment: Mapping[str, str]) -> tuple[str, ...] | None:
    """Entries of CUDA_VISIBLE_DEVICES as CUDA takes them: up to the first that is no GPU's.

    They are names, of any form (`0`, `GPU-...`, `MIG-...`): TensorFlow calls the first of them GPU:0.

    Returns:
      A tuple; None if the variable is not set, and every GPU is visible.
    """
    text = environment.get("CUDA_VISIBLE_DEVICES")
    if text is None:
        return None
    entries: list[str] = []
    for entry in text.split(","):
        if not re.fullmatch(r"[0-9]+|(?:MIG-)?GPU-[0-9A-Za-z/-]+|MIG-[0-9A-Za-z/-]+", entry.strip()):
            break
        entries.append(entry.strip())
    return tuple(entries)


def gpus_of_process(environment: Mapping[str, str], cluster: Cluster) -> tuple[str, ...] | None:
    """The entries of CUDA_VISIBLE_DEVICES that are for this process.

    All of them, but where several processes of a host see the same list: then an equal share, by local rank. Where the
    cluster does not know about the processes of a host, there is taken to be one.

    Args:
      environment: {name: value}.
      cluster: Cluster.

    Returns:
      A tuple, empty for no GPU; or None if the variable is not set: `share_of_process` divides what TensorFlow sees.

    Raises:
      ValueError: if a list that processes share cannot be divided among them.
    """
    entries = visible_gpus(environment)
    if entries is None or not _is_shared(entries, environment, cluster):
        return entries
    return share_of_process(entries, cluster)


def share_of_process(gpus: Sequence[Entry], cluster: Cluster) -> tuple[Entry, ...]:
    """This process's part of GPUs that all processes of its host see, in the same order.

    Args:
      gpus: GPUs, of whatever type.
      cluster: Cluster. Where it does not know about the processes of a host, there is taken to be one.

    Returns:
      A tuple.

    Raises:
      ValueError: if there are not equally many for each process.
    """
    local_size, local_rank = cluster.local_size or 1, cluster.local_rank or 0
    if len(gpus) % local_size:
        raise ValueError(
            "The GPUs of a host must be a multiple of its processes, each of which takes as many. Received: "
            f"{len(gpus)} GPUs, {local_size} processes ({cluster.source}). Start another number of processes, or "
            "set CUDA_VISIBLE_DEVICES for each."
        )
    count = len(gpus) // local_size
    return tuple(gpus[local_rank * count : (local_rank + 1) * count])


def _is_shared(entries, environment, cluster):
    """Whether the processes of this host see the same list: only it is here, and what launchers tell about it."""
    if (cluster.local_size or 1) == 1 or cluster.local_rank is None or not entries:
        return False
    of_step = environment.get("SLURM_STEP_GPUS", "")
    if cluster.source == "Slurm" and of_step:
        # The node's GPUs of all tasks: a task that sees fewer has its own.
        return len(entries) == len(of_step.split(","))
    per_task = environment.get("SLURM_GPUS_PER_TASK", "").rpartition(":")[2]
    if cluster.source == "Slurm" and per_task:
        return per_task != str(len(entries))
    return len(entries) >= cluster.local_size
