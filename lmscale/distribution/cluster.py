"""Find the processes of a run from flags or from what a launcher leaves in the environment.

No TensorFlow here: this runs before it starts, which reads some of the variables itself.
"""

import dataclasses
import os
import socket
import urllib.request
from collections.abc import Callable, Mapping

from lmscale.distribution.clusters import clouds, kubernetes, mpi, slurm, specifications
from lmscale.distribution.clusters.addresses import join_address, split_address
from lmscale.distribution.clusters.description import Cluster
from lmscale.distribution.clusters.gpus import gpus_of_process, share_of_process
from lmscale.distribution.clusters.surroundings import Surroundings

__all__ = ["LAUNCHERS", "Cluster", "find_cluster", "gpus_of_process", "share_of_process"]

# A number above is a mistake: no port would be left.
MOST_PROCESSES = 2**16

# Surroundings -> Cluster, or None where a launcher's variables are not set. The first that knows is believed: what
# was written for TensorFlow, then what starts processes inside of other launchers' before those others.
LAUNCHERS: tuple[Callable[[Surroundings], Cluster | None], ...] = (
    specifications.tf_config,
    specifications.vertex,
    mpi.torchrun,
    mpi.open_mpi,
    mpi.mvapich,
    mpi.pmi,
    mpi.flux,
    mpi.pals,
    mpi.jsrun,
    slurm.slurm_step,
    clouds.tpu,
    clouds.sagemaker,
    kubernetes.leader_worker_set,
    kubernetes.kubeflow_trainer,
    kubernetes.jax,
    kubernetes.jobset,
    kubernetes.indexed_job,
    mpi.aws_batch,
    mpi.rank_and_world_size,
    slurm.slurm_without_step,
)


def read_text(path: str) -> str:
    """Text of a file that a launcher has written."""
    with open(path, encoding="utf-8") as file:
        return file.read()


def read_cloud_metadata(attribute: str) -> str | None:
    """An attribute of a Google Cloud instance, or None where there is no such attribute or no such cloud."""
    request = urllib.request.Request(
        f"http://metadata.google.internal/computeMetadata/v1/instance/attributes/{attribute}",
        headers={"Metadata-Flavor": "Google"},
    )
    try:
        with urllib.request.urlopen(request, timeout=3) as response:
            return response.read().decode()
    except (OSError, ValueError):
        return None


def find_cluster(
    environment: Mapping[str, str] = os.environ,
    *,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    port: int | None = None,
    hostname: Callable[[], str] = socket.gethostname,
    read_file: Callable[[str], str] = read_text,
    read_metadata: Callable[[str], str | None] = read_cloud_metadata,
) -> Cluster:
    """The processes of a run, and which of them this one is.

    Flags win over the environment: all three of coordinator, num_processes and process_id; or num_processes=1, for
    one process whatever the environment says. A coordinator alone completes, or replaces, the addresses of an
    environment that tells sizes and ranks: processes then tell each other their addresses through it.

    Args:
      environment: {name: value}.
      coordinator: `host:port` of rank 0.
      num_processes: number of processes, at least 1.
      process_id: rank of this process, 0 to num_processes - 1.
      port: where processes listen for which the environment gives no port: the first one of each host at this port, the
        next at the port behind, and so on. None: of the batch job's number, or a constant where there is none.
      hostname: () -> this host's name.
      read_file: path -> text, for a file that a variable names.
      read_metadata: attribute of this cloud instance -> text or None.

    Returns:
      A Cluster. Of several processes its addresses, or the coordinator's, are known if its `check_reachable` passes.

    Raises:
      ValueError: if flags are given in part, or are out of range; or if variables of the environment are missing, are
        not what they should be, contradict each other, or are of processes that cannot train together.
    """
    if port is not None and not 1 <= port <= 65535:
        raise ValueError(f"port must be from 1 to 65535. Received: port={port}. Give another --port.")
    if coordinator is not None:
        coordinator = join_address(*split_address(coordinator, name="coordinator"))
    if num_processes is not None or process_id is not None:
        return _from_flags(coordinator, num_processes, process_id)
    surroundings = Surroundings(
        environment=environment,
        port=port,
        hostname=hostname,
        read_file=read_file,
        read_metadata=read_metadata,
    )
    found = (launcher(surroundings) for launcher in LAUNCHERS)
    cluster = next((cluster for cluster in found if cluster is not None), None)
    if cluster is None:
        cluster = surroundings.one_process("none")
    if coordinator is None:
        return cluster
    if cluster.size == 1:
        raise ValueError(
            "coordinator must come with num_processes and process_id where the environment describes no other "
            f"processes. Received: coordinator={coordinator}, and one process ({cluster.source}). Give "
            "--num_processes=N --process_id=I too, or leave out --coordinator."
        )
    return dataclasses.replace(cluster, addresses=None, addresses_given=False, coordinator=coordinator)


def _from_flags(coordinator, num_processes, process_id):
    """The cluster of flags of which at least the number of processes or of this one is given."""
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    text = ", ".join(f"{name}={value}" for name, value in given.items() if value is not None)
    if num_processes is not None and num_processes < 1:
        raise ValueError(
            f"num_processes must be at least 1. Received: {text}. Give --num_processes=1 or more."
        )
    if num_processes is not None and num_processes > MOST_PROCESSES:
        raise ValueError(
            f"num_processes must be at most {MOST_PROCESSES}. Received: {text}. Give as many as there are."
        )
    is_alone = num_processes == 1
    missing = [name for name, value in given.items() if value is None]
    if missing and not is_alone:
        raise ValueError(
            "coordinator, num_processes and process_id must be given together. Received: "
            f"{text} only. Give {' '.join(f'--{name}' for name in missing)} too; or leave all out, where a launcher "
            "describes the processes."
        )
    if process_id is not None and not 0 <= process_id < num_processes:
        raise ValueError(
            f"process_id must be from 0 to num_processes - 1 = {num_processes - 1}. Received: {text}. Give each "
            "process a --process_id of its own, from 0."
        )
    if is_alone:
        return Cluster(
            size=1, rank=0, hosts=("localhost",), addresses=None, local_rank=0, local_size=1, source="flags"
        )
    return Cluster(
        size=num_processes,
        rank=process_id,
        hosts=None,
        addresses=None,
        local_rank=None,
        local_size=None,
        source="flags",
        coordinator=coordinator,
    )
