"""Hosts of clouds that list each other: TPU slices, SageMaker."""

from lmscale.distribution.clusters.addresses import PORT_OF_POD
from lmscale.distribution.clusters.surroundings import PASS_FLAGS

# What TensorFlow itself takes on SageMaker's hosts.
PORT_OF_SAGEMAKER = 2223


def tpu(surroundings):
    """Hosts of a TPU slice, in the order of TPU_WORKER_HOSTNAMES. Other TPU_* variables make no cluster.

    Where one of the two variables is missing, the metadata of the virtual machine may have it.
    """
    if not surroundings.has_any("TPU_WORKER_HOSTNAMES", "TPU_WORKER_ID"):
        return None
    names = surroundings.text("TPU_WORKER_HOSTNAMES")
    if names is None:
        if surroundings.number("TPU_WORKER_ID") == 0 and surroundings.text("TPU_HOST_BOUNDS") == "1,1,1":
            return surroundings.one_process("TPU", host="localhost")
        endpoints = surroundings.read_metadata("worker-network-endpoints") or ""
        names = ",".join(endpoint.strip().rpartition(":")[2] for endpoint in endpoints.split(","))
    hosts = [name.strip() for name in names.split(",")]
    if not all(hosts):
        surroundings.required("TPU_WORKER_HOSTNAMES", because="TPU_WORKER_ID is set")
        raise ValueError(
            "TPU_WORKER_HOSTNAMES must be names or addresses with commas between them. Received: "
            f"{names!r}. See to the launcher; or {PASS_FLAGS}."
        )
    if any("[" in host or "]" in host or " " in host for host in hosts):
        raise ValueError(
            "TPU_WORKER_HOSTNAMES must be names or addresses, without brackets and blanks. Received: "
            f"{names!r}. See to the launcher; or {PASS_FLAGS}."
        )
    slices = surroundings.number("MEGASCALE_NUM_SLICES") or 1
    if slices > 1:
        raise ValueError(
            "MEGASCALE_NUM_SLICES must be 1: TPU_WORKER_HOSTNAMES lists the hosts of a slice only. Received: "
            f"{slices}. Use one slice; or {PASS_FLAGS}."
        )
    rank = surroundings.number("TPU_WORKER_ID")
    if rank is None and len(hosts) > 1:
        text = (surroundings.read_metadata("agent-worker-number") or "").strip()
        if not (text.isascii() and text.isdigit()):
            surroundings.required("TPU_WORKER_ID", because=f"TPU_WORKER_HOSTNAMES has {len(hosts)} hosts")
        rank = int(text)
    rank = rank or 0
    if rank >= len(hosts):
        raise ValueError(
            "TPU_WORKER_ID must be below the number of TPU_WORKER_HOSTNAMES. Received: "
            f"TPU_WORKER_ID={rank}, {len(hosts)} hosts in {names!r}. See to the launcher; or {PASS_FLAGS}."
        )
    return surroundings.cluster("TPU", rank=rank, hosts=hosts, start=PORT_OF_POD)


def sagemaker(surroundings):
    """SageMaker: a process for each host."""
    if not surroundings.has_any("SM_HOSTS", "SM_CURRENT_HOST"):
        return None
    if not surroundings.has_any("SM_HOSTS"):
        if "SM_HOSTS" not in surroundings.environment:
            surroundings.required("SM_HOSTS", because="SM_CURRENT_HOST is set")
        return surroundings.one_process("SageMaker", host=surroundings.text("SM_CURRENT_HOST"))
    hosts = surroundings.json("SM_HOSTS", kind=list)
    if not all(isinstance(host, str) and host for host in hosts) or len(set(hosts)) != len(hosts):
        raise ValueError(
            f"SM_HOSTS must be a list of names, each of them once. Received: {hosts}. See to the job; or {PASS_FLAGS}."
        )
    if len(hosts) < 2:
        return surroundings.one_process("SageMaker", host=hosts[0] if hosts else None)
    host = surroundings.required("SM_CURRENT_HOST", because=f"SM_HOSTS has {len(hosts)} hosts")
    if host not in hosts:
        raise ValueError(
            f"SM_CURRENT_HOST must be one of SM_HOSTS. Received: SM_CURRENT_HOST={host!r}, SM_HOSTS={hosts}. See to "
            f"the job; or {PASS_FLAGS}."
        )
    return surroundings.cluster("SageMaker", rank=hosts.index(host), hosts=hosts, start=PORT_OF_SAGEMAKER)
