"""Whole clusters in a variable of JSON: TF_CONFIG, and CLUSTER_SPEC of Vertex AI."""

from lmscale.distribution.clusters.addresses import join_address, local_ranks, split_address
from lmscale.distribution.clusters.description import Cluster
from lmscale.distribution.clusters.mpi import ranks_of_launchers


def tf_config(surroundings):
    """TensorFlow's own variable: `{"cluster": {"chief": [...], "worker": [...]}, "task": {"type": ..., "index": ...}}`.

    The chief is rank 0 if there is one, else the first worker; an evaluator is not counted.
    """
    if not surroundings.has_any("TF_CONFIG"):
        return None
    config = surroundings.json("TF_CONFIG", kind=dict)
    jobs = _jobs(config, name="TF_CONFIG")
    task_type, task_index = _task(config, name="TF_CONFIG")
    if jobs.get("ps"):
        raise ValueError(
            "TF_CONFIG must have no parameter servers, which are not supported: every process trains. Received: "
            f"{len(jobs['ps'])} addresses of the job type 'ps'{_and_master(jobs)}. Remove 'ps' from the cluster, or "
            "turn off the platform's parameter server mode."
        )
    for job in jobs:
        if job not in ("chief", "worker", "evaluator"):
            raise ValueError(
                "TF_CONFIG must have jobs of the types chief and worker (and evaluator, which takes no part). "
                f"Received: {job!r}. {'Call it chief' if job == 'master' else 'Remove it'}."
            )
    if len(jobs.get("chief", [])) > 1:
        raise ValueError(
            f"TF_CONFIG must have at most one chief. Received: {jobs['chief']}. Make the others workers."
        )
    if task_type == "evaluator":
        raise ValueError(
            "TF_CONFIG must be of a process of the training cluster, which is the chief and the workers: an evaluator "
            "takes no part in it. Received: task.type 'evaluator'. Start no evaluator: training evaluates by itself; "
            "or unset TF_CONFIG, and evaluate its checkpoints."
        )
    order = [job for job in ("chief", "worker") if jobs.get(job)]
    cluster = _cluster(
        surroundings,
        jobs,
        order,
        task_type,
        task_index,
        name="TF_CONFIG",
        source="TF_CONFIG",
        members="workers",
    )
    for source, size, rank in ranks_of_launchers(surroundings):
        if size > 1 and (cluster.rank != rank or cluster.size == 1):
            raise ValueError(
                f"TF_CONFIG must agree with the launcher about which process this is. Received: rank {cluster.rank} "
                f"of {cluster.size} from TF_CONFIG, rank {rank} of {size} from {source}. Set a task.index of its own "
                "in each process, not once for all; or unset TF_CONFIG."
            )
    return cluster


def vertex(surroundings):
    """Vertex AI: worker pool 0 has one replica, which is rank 0, and those of worker pool 1 follow."""
    if not surroundings.has_any("CLUSTER_SPEC"):
        return None
    config = surroundings.json("CLUSTER_SPEC", kind=dict)
    jobs = _jobs(config, name="CLUSTER_SPEC")
    task_type, task_index = _task(config, name="CLUSTER_SPEC")
    what = {
        "workerpool2": "parameter servers (or Reduction Server), which are not supported",
        "workerpool3": "evaluators, which take no part in training",
    }
    others = [job for job in jobs if jobs[job] and job not in ("workerpool0", "workerpool1")]
    if others:
        received = ", ".join(f"{job}: {what.get(job, 'of no known use')}" for job in others)
        raise ValueError(
            "CLUSTER_SPEC must have the worker pools workerpool0 and workerpool1 only; machines of others would idle. "
            f"Received: {received}. Submit the job without them; or unset CLUSTER_SPEC, if another system sets it."
        )
    if jobs and len(jobs.get("workerpool0", [])) != 1:
        raise ValueError(
            "CLUSTER_SPEC must have one replica in workerpool0, the chief. Received: "
            f"{len(jobs.get('workerpool0', []))} of them. Put the others into workerpool1."
        )
    order = [job for job in ("workerpool0", "workerpool1") if jobs.get(job)]
    return _cluster(
        surroundings,
        jobs,
        order,
        task_type,
        task_index,
        name="CLUSTER_SPEC",
        source="Vertex AI",
        members="replicas",
    )


def _jobs(config, *, name):
    """{job: addresses}, of what has any."""
    cluster = config.get("cluster")
    if cluster is None:
        if config.get("task") is not None:
            raise ValueError(
                f"{name} must have a cluster where it has a task. Received: {config}. Add it, or unset {name}."
            )
        return {}
    if not isinstance(cluster, dict):
        raise ValueError(
            f"{name} must have an object of jobs and their addresses as its cluster. Received: {cluster!r}. "
            "Correct it."
        )
    jobs = {}
    for job, addresses in cluster.items():
        if isinstance(addresses, dict):  # TensorFlow also takes {"0": address, "1": address}.
            numbers = [str(number) for number in range(len(addresses))]
            if sorted(addresses, key=lambda key: (len(key), key)) == numbers:
                addresses = [addresses[number] for number in numbers]
        if not isinstance(addresses, list) or not all(isinstance(address, str) for address in addresses):
            raise ValueError(
                f"{name} must have a list of addresses for each job of its cluster. Received: {job!r} with "
                f"{addresses!r}. Correct it."
            )
        if addresses:
            jobs[job] = addresses
    return jobs


def _task(config, *, name):
    """Type and index of this process; None for what is missing."""
    task = config.get("task")
    if task is None:
        return None, None
    if not isinstance(task, dict):
        raise ValueError(f"{name} must have an object as its task. Received: {task!r}. Correct it.")
    index = task.get("index")
    if isinstance(index, str) and index.isascii() and index.isdigit():
        index = int(index)
    if index is not None and (not isinstance(index, int) or isinstance(index, bool) or index < 0):
        raise ValueError(
            f"{name} must have a number, 0 or more, as its task.index. Received: task.index {task['index']!r}. Correct "
            "it."
        )
    return task.get("type"), index


def _cluster(surroundings, jobs, order, task_type, task_index, *, name, source, members):
    """The cluster of jobs in the order of ranks."""
    given = [address for job in order for address in jobs[job]]
    if not given:
        if jobs:
            raise ValueError(f"{name} must have a process that trains. Received: {jobs}. Add workers.")
        return surroundings.one_process(source, host="localhost")
    if task_type is None or task_index is None:
        missing = "task" if task_type is None and task_index is None else "task.type or task.index"
        if len(given) > 1 or missing != "task":
            raise ValueError(
                f"{name} must say which process this is. Received: a cluster of {len(given)} {members}, and {missing} "
                "is missing. Add the task's type and index, another one in each process."
            )
        task_type, task_index = order[0], 0
    if task_type not in order:
        raise ValueError(
            f"{name} must have the task of this process in its cluster. Received: task.type {task_type!r} and a "
            f"cluster of {', '.join(order)}. Correct one of them."
        )
    if task_index >= len(jobs[task_type]):
        plural = f"{task_type}s" if members == "workers" else f"replicas of {task_type}"
        raise ValueError(
            f"{name} must have a task.index that is one of its job. Received: task.index {task_index}, outside the "
            f"{len(jobs[task_type])} {plural} (0..{len(jobs[task_type]) - 1}). Correct it: each job counts its own "
            "from 0."
        )
    pairs = [split_address(address, name=f"Each address of {name}") for address in given]
    if len(set(pairs)) != len(pairs):
        raise ValueError(
            f"{name} must give each process an address of its own. Received: {', '.join(given)}. Change the ports of "
            "those that share a host."
        )
    if surroundings.port is not None and len(given) > 1:
        raise ValueError(
            f"port is for launchers that give none. Received: port={surroundings.port}, and {name}, which has a port "
            "for each process. Leave out --port."
        )
    rank = sum(len(jobs[job]) for job in order[: order.index(task_type)]) + task_index
    hosts = tuple(host for host, _ in pairs)
    return Cluster(
        size=len(hosts),
        rank=rank,
        hosts=hosts,
        addresses=tuple(join_address(host, port) for host, port in pairs),
        local_rank=local_ranks(hosts)[rank],
        local_size=hosts.count(hosts[rank]),
        source=source,
        addresses_given=True,
    )


def _and_master(jobs):
    return f" and the TensorFlow 1 name 'master' ({', '.join(jobs['master'])})" if "master" in jobs else ""
