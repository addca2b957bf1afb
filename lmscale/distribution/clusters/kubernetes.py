"""Kubernetes: pods have an index, and a name that shows those of the others; rarely a number of them."""

import re

from lmscale.distribution.clusters.addresses import PORT_OF_POD, split_address
from lmscale.distribution.clusters.surroundings import PASS_FLAGS


def leader_worker_set(surroundings):
    """A LeaderWorkerSet: the leader is rank 0; a worker's name is the leader's, then its index."""
    if not surroundings.has_any("LWS_GROUP_SIZE", "LWS_WORKER_INDEX"):
        return None
    size, rank = surroundings.size_and_rank("LWS_GROUP_SIZE", "LWS_WORKER_INDEX")
    if size == 1:
        return surroundings.one_process("LeaderWorkerSet")
    leader = surroundings.required("LWS_LEADER_ADDRESS", because=f"LWS_GROUP_SIZE={size}")
    name, dot, domain = leader.partition(".")
    hosts = [leader] + [f"{name}-{worker}{dot}{domain}" for worker in range(1, size)]
    _check_pod_name(surroundings, hosts[rank], of="LWS_LEADER_ADDRESS and LWS_WORKER_INDEX")
    return surroundings.cluster("LeaderWorkerSet", rank=rank, hosts=hosts, start=PORT_OF_POD)


def kubeflow_trainer(surroundings):
    """Kubeflow Trainer by its runtime for torch: a process for each node, called as the first but for the number."""
    names = [
        name for name in ("PET_NNODES", "PET_NODE_RANK", "PET_MASTER_ADDR") if surroundings.has_any(name)
    ]
    if not names:
        return None
    size, rank = surroundings.size_and_rank("PET_NNODES", "PET_NODE_RANK")
    if size == 1:
        return surroundings.one_process("Kubeflow Trainer")
    first = surroundings.required("PET_MASTER_ADDR", because=f"PET_NNODES={size}")
    return _counted_up(surroundings, "Kubeflow Trainer", size, rank, first, name="PET_MASTER_ADDR")


def jax(surroundings):
    """JAX's variables, which Kubeflow Trainer's runtime for JAX sets. The port of the address is JAX's own."""
    names = ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "JAX_COORDINATOR_ADDRESS")
    if not surroundings.has_any(*names):
        return None
    size, rank = surroundings.size_and_rank(*names[:2])
    if size == 1:
        return surroundings.one_process("JAX's variables")
    first = surroundings.required(names[2], because=f"JAX_NUM_PROCESSES={size}")
    host, _ = split_address(first, name=names[2])
    if surroundings.has_any("KUBERNETES_SERVICE_HOST"):
        return _counted_up(surroundings, "JAX's variables", size, rank, host, name=names[2])
    return surroundings.cluster_without_hosts(
        "JAX's variables", size=size, rank=rank, reason=f"only that of rank 0 is told, {names[2]}={first}."
    )


def jobset(surroundings):
    """A job of a JobSet, whose manifest passes labels on as variables."""
    if not surroundings.has_any("JOBSET_NAME", "REPLICATED_JOB_NAME"):
        return None
    size_rank = _count_and_index(surroundings)
    if size_rank[0] == 1:
        return surroundings.one_process("JobSet")
    size, rank = size_rank
    because = "the manifest passes another name of the JobSet"
    jobset_name = surroundings.required("JOBSET_NAME", because=because)
    job_name = surroundings.required("REPLICATED_JOB_NAME", because=because)
    job = surroundings.required_number("JOB_INDEX", because=because)
    if job != 0:
        raise ValueError(
            "JOB_INDEX must be 0: a run is one job of a JobSet, with a pod for each process. Received: "
            f"JOB_INDEX={job}. Set the replicas of the replicated job to 1, and its parallelism to the number of "
            f"processes; or {PASS_FLAGS}."
        )
    domain = surroundings.text("SUBDOMAIN") or jobset_name
    hosts = [f"{jobset_name}-{job_name}-{job}-{pod}.{domain}" for pod in range(size)]
    _check_pod_name(surroundings, hosts[rank], of="JOBSET_NAME, REPLICATED_JOB_NAME and JOB_COMPLETION_INDEX")
    return surroundings.cluster("JobSet", rank=rank, hosts=hosts, start=PORT_OF_POD)


def indexed_job(surroundings):
    """An indexed Job: Kubernetes sets an index; the manifest must set the count, and the headless service."""
    if not surroundings.has_any("JOB_COMPLETION_INDEX"):
        # Without an index, other pods may have the same template and nothing to tell them apart.
        if (
            surroundings.has_any("KUBERNETES_SERVICE_HOST")
            and (surroundings.number("NUM_PROCESSES") or 1) > 1
        ):
            surroundings.required("JOB_COMPLETION_INDEX", because="NUM_PROCESSES is above 1")
        return None
    size, rank = _count_and_index(surroundings)
    if size == 1:
        return surroundings.one_process("Kubernetes")
    pod = _pod_name(surroundings)
    domain = surroundings.text("SUBDOMAIN")
    stem, dash, index = pod.rpartition("-")
    if not dash or index != str(rank):
        reason = f"HOSTNAME={pod} does not end in -{rank}, the JOB_COMPLETION_INDEX."
    elif domain is None:
        reason = "SUBDOMAIN is not set, which names the headless service of the pods: set it in the manifest."
    else:
        hosts = [f"{stem}-{number}.{domain}" for number in range(size)]
        return surroundings.cluster("Kubernetes", rank=rank, hosts=hosts, start=PORT_OF_POD)
    return surroundings.cluster_without_hosts("Kubernetes", size=size, rank=rank, reason=reason)


def _count_and_index(surroundings):
    """Number of processes, and of this one, of a job whose manifest must tell the first."""
    rank = surroundings.required_number("JOB_COMPLETION_INDEX", because="this is a pod of a job")
    size = surroundings.number("NUM_PROCESSES")
    if size is None:
        raise ValueError(
            "NUM_PROCESSES must be set where JOB_COMPLETION_INDEX is: the number of processes is unknown. Received: "
            f"none; this pod has completion index {rank}{', so there are others' if rank else ''}. Set NUM_PROCESSES "
            "to the number of completions in the manifest, and SUBDOMAIN to the name of the headless service; or pass "
            "--num_processes=1, if there is one."
        )
    if rank >= size:
        raise ValueError(
            "JOB_COMPLETION_INDEX must be below NUM_PROCESSES. Received: "
            f"JOB_COMPLETION_INDEX={rank}, NUM_PROCESSES={size}. Set NUM_PROCESSES to the number of completions."
        )
    return size, rank


def _counted_up(surroundings, source, size, rank, first, *, name):
    """Hosts that are called as the first one, but for the last number of its pod's name."""
    surroundings.check_equal("JOB_COMPLETION_INDEX", rank, of=f"the rank of {source}")
    pod, dot, domain = first.partition(".")
    stem, dash, index = pod.rpartition("-")
    if not dash or index != "0":
        reason = f"{name}={first} is not of a pod number 0, from whose name those of the others follow."
        return surroundings.cluster_without_hosts(source, size=size, rank=rank, reason=reason)
    hosts = [f"{stem}-{number}{dot}{domain}" for number in range(size)]
    if hosts[rank].partition(".")[0] != _pod_name(surroundings):
        reason = (
            f"this pod is called HOSTNAME={_pod_name(surroundings)}, not {hosts[rank]} as {name} lets expect."
        )
        return surroundings.cluster_without_hosts(source, size=size, rank=rank, reason=reason)
    return surroundings.cluster(source, rank=rank, hosts=hosts, start=PORT_OF_POD)


def _pod_name(surroundings):
    return re.sub(r"\..*", "", surroundings.text("HOSTNAME") or surroundings.hostname())


def _check_pod_name(surroundings, host, *, of):
    expected = host.partition(".")[0]
    if _pod_name(surroundings) != expected:
        raise ValueError(
            f"HOSTNAME must be the pod's name, as {of} have it. Received: HOSTNAME={_pod_name(surroundings)}, and "
            f"{expected} from the others. Correct the manifest; or {PASS_FLAGS}."
        )
