"""Launchers of the MPI kind: numbers for each process, and hosts at best by another way."""

import dataclasses

from lmscale.distribution.clusters.addresses import is_same_host, port_of_job
from lmscale.distribution.clusters.slurm import slurm_step, step_size
from lmscale.distribution.clusters.surroundings import PASS_FLAGS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Names:
    """The variables of a launcher that gives numbers only.

    Attributes:
      source: what messages call it.
      size, rank: number of processes, and of this one.
      local_size, local_rank: the same among those of a host; None: it gives none.
      coordinator: a host that runs rank 0, or its address: for the message only.
      is_trusted_alone: whether a size of 1 means that there is one process.
    """

    source: str
    size: str
    rank: str
    local_size: str | None = None
    local_rank: str | None = None
    coordinator: str | None = None
    is_trusted_alone: bool = True


OPEN_MPI = Names(
    source="Open MPI",
    size="OMPI_COMM_WORLD_SIZE",
    rank="OMPI_COMM_WORLD_RANK",
    local_size="OMPI_COMM_WORLD_LOCAL_SIZE",
    local_rank="OMPI_COMM_WORLD_LOCAL_RANK",
)
MVAPICH = Names(
    source="MVAPICH",
    size="MV2_COMM_WORLD_SIZE",
    rank="MV2_COMM_WORLD_RANK",
    local_size="MV2_COMM_WORLD_LOCAL_SIZE",
    local_rank="MV2_COMM_WORLD_LOCAL_RANK",
)
# Hydra: MPICH and Intel MPI; also Slurm and PALS set these. A size of 1 is also that of a process outside of any
# launch.
PMI = Names(
    source="PMI",
    size="PMI_SIZE",
    rank="PMI_RANK",
    local_size="MPI_LOCALNRANKS",
    local_rank="MPI_LOCALRANKID",
    is_trusted_alone=False,
)
FLUX = Names(
    source="Flux",
    size="FLUX_JOB_SIZE",
    rank="FLUX_TASK_RANK",
    local_rank="FLUX_TASK_LOCAL_ID",
    is_trusted_alone=False,
)
TORCHRUN = Names(
    source="torchrun",
    size="WORLD_SIZE",
    rank="RANK",
    local_size="LOCAL_WORLD_SIZE",
    local_rank="LOCAL_RANK",
    coordinator="MASTER_ADDR",
)
AWS_BATCH = Names(
    source="AWS Batch",
    size="AWS_BATCH_JOB_NUM_NODES",
    rank="AWS_BATCH_JOB_NODE_INDEX",
    coordinator="AWS_BATCH_JOB_MAIN_NODE_PRIVATE_IPV4_ADDRESS",
)


def open_mpi(surroundings):
    """mpirun of Open MPI."""
    return _of_numbers(surroundings, OPEN_MPI)


def mvapich(surroundings):
    """mpirun_rsh of MVAPICH2."""
    return _of_numbers(surroundings, MVAPICH)


def pmi(surroundings):
    """A launcher of the PMI interface. Where it is Slurm or PALS, which agree about the rank, theirs are the hosts."""
    if surroundings.has_any("PALS_RANKID") and not all(map(surroundings.has_any, (PMI.size, PMI.rank))):
        return None
    cluster = _of_numbers(surroundings, PMI)
    if cluster is None or cluster.hosts is not None:
        return cluster
    if surroundings.number("PALS_RANKID") == cluster.rank:
        return pals(surroundings)
    if (step_size(surroundings), surroundings.number("SLURM_PROCID")) == (cluster.size, cluster.rank):
        return slurm_step(surroundings)
    return cluster


def flux(surroundings):
    """Flux, by its own variables."""
    return _of_numbers(surroundings, FLUX)


def torchrun(surroundings):
    """torchrun, whose processes are those that run inside of what another launcher started."""
    return _of_numbers(surroundings, TORCHRUN) if surroundings.has_any("TORCHELASTIC_RUN_ID") else None


def rank_and_world_size(surroundings):
    """RANK and WORLD_SIZE, which PyTorch's operators set, and scripts. Either name alone may mean anything."""
    names = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR") if surroundings.has_any(name)]
    if len(names) < 2:
        if names == ["WORLD_SIZE"] and surroundings.text("WORLD_SIZE") != "1":
            surroundings.required("RANK", because="WORLD_SIZE is set")
        return None
    return _of_numbers(surroundings, dataclasses.replace(TORCHRUN, source="RANK and WORLD_SIZE"))


def aws_batch(surroundings):
    """A multi-node job of AWS Batch, which tells the main node's address to the other nodes, and no other."""
    surroundings.check_equal("AWS_BATCH_JOB_MAIN_NODE_INDEX", 0, of="rank 0, which must be the main node")
    return _of_numbers(surroundings, AWS_BATCH)


def _of_numbers(surroundings, names):
    """The cluster of a launcher that gives numbers only, or None where its variables are not set."""
    if not surroundings.has_any(names.size, names.rank):
        return None
    if not names.is_trusted_alone and surroundings.text(names.size) == "1":
        return None
    size, rank = surroundings.size_and_rank(names.size, names.rank)
    local_rank = surroundings.number(names.local_rank) if names.local_rank else None
    local_size = surroundings.number(names.local_size) if names.local_size else None
    if size == 1:
        return surroundings.one_process(names.source)
    if local_size is not None and not 1 <= local_size <= size:
        raise ValueError(
            f"{names.local_size} must be from 1 to {names.size}. Received: {names.local_size}={local_size}, "
            f"{names.size}={size}. See to the launcher; or {PASS_FLAGS}."
        )
    if local_rank is not None and local_rank >= (local_size or size):
        raise ValueError(
            f"{names.local_rank} must be below the number of processes of a host. Received: "
            f"{names.local_rank}={local_rank} of {local_size or size}. See to the launcher; or {PASS_FLAGS}."
        )
    if local_size == size:
        if names.local_rank:
            surroundings.check_equal(
                names.local_rank, rank, of=f"{names.rank}, as all processes are on this host"
            )
        hosts = [surroundings.this_host()] * size
        return surroundings.cluster(
            names.source, rank=rank, hosts=hosts, start=port_of_job(job_number(surroundings))
        )
    reason = f"{names.size} and {names.rank} are numbers, and hosts are in no variable."
    if names.coordinator and (host := surroundings.text(names.coordinator)) is not None:
        reason = f"only that of rank 0 is told, {names.coordinator}={host}."
    return surroundings.cluster_without_hosts(
        names.source, size=size, rank=rank, local_rank=local_rank, local_size=local_size, reason=reason
    )


def job_number(surroundings):
    """The batch job's number, which all of its processes know alike; 0 outside of one.

    Not that of a Slurm step: mpirun starts some processes by a step, and others not.
    """
    for name in ("SLURM_JOB_ID", "LSB_JOBID", "PBS_JOBID"):
        digits = (surroundings.text(name) or "").partition(".")[0].partition("[")[0]
        if digits.isascii() and digits.isdigit():
            return int(digits)
    return 0


def ranks_of_launchers(surroundings):
    """What launchers say about the number of this process, to compare with: a list of (source, size, rank)."""
    found = []
    for names in (OPEN_MPI, MVAPICH, PMI):
        size, rank = surroundings.number(names.size), surroundings.number(names.rank)
        if size is not None and rank is not None and size > 1:
            found.append((names.source, size, rank))
    size, rank = step_size(surroundings), surroundings.number("SLURM_PROCID")
    # What mpirun starts inside of Slurm has variables of the daemon that starts it.
    if not found and size is not None and rank is not None:
        found.append(("Slurm", size, rank))
    return found


def pals(surroundings):
    """mpiexec of HPE's PALS, under PBS: the file of nodes has the hosts, each of which runs as many processes."""
    if not surroundings.has_any("PALS_RANKID", "PALS_LOCAL_RANKID", "PALS_LOCAL_SIZE"):
        return None
    because = "another variable of PALS is set"
    rank = surroundings.required_number("PALS_RANKID", because=because)
    size = next(
        (
            surroundings.number(n)
            for n in ("PMI_SIZE", "PALS_NRANKS", "PALS_APSIZE")
            if surroundings.has_any(n)
        ),
        None,
    )
    lines = surroundings.lines("PBS_NODEFILE")
    nodes = list(dict.fromkeys(lines or []))
    local_size = surroundings.number("PALS_LOCAL_SIZE")
    if local_size is None and size is not None and nodes and size % len(nodes) == 0:
        local_size = size // len(nodes)
    if size is None:
        local_size = surroundings.required_number("PALS_LOCAL_SIZE", because=because)
        surroundings.required("PBS_NODEFILE", because="PALS does not tell the number of processes")
        if not nodes:
            raise ValueError(
                "PBS_NODEFILE must be a file of the job's hosts. Received: "
                f"{surroundings.text('PBS_NODEFILE')!r}, which cannot be read or is empty. See to it; or {PASS_FLAGS}."
            )
        size = local_size * len(nodes)
    if rank >= size:
        raise ValueError(
            "PALS_RANKID must be below the number of processes, which PALS_LOCAL_SIZE and the hosts of PBS_NODEFILE "
            f"amount to, or PMI_SIZE. Received: PALS_RANKID={rank} of {size}. See to the launcher; or {PASS_FLAGS}."
        )
    local_rank = surroundings.number("PALS_LOCAL_RANKID")
    if not nodes or local_size is None or local_size * len(nodes) != size:
        reason = (
            f"PBS_NODEFILE has {len(nodes)} hosts, and how {size} processes are spread over them is not told."
        )
        return surroundings.cluster_without_hosts(
            "PALS", size=size, rank=rank, local_rank=local_rank, local_size=local_size, reason=reason
        )
    of = f"PALS_RANKID={rank} and PALS_LOCAL_SIZE={local_size}, if each host runs as many"
    surroundings.check_equal("PALS_LOCAL_RANKID", rank % local_size, of=of)
    surroundings.check_equal("PALS_NODEID", rank // local_size, of=of)
    hosts = [node for node in nodes for _ in range(local_size)]
    _check_this_host(surroundings, hosts, rank, of="PBS_NODEFILE")
    return surroundings.cluster("PALS", rank=rank, hosts=hosts, start=port_of_job(job_number(surroundings)))


def jsrun(surroundings):
    """jsrun of LSF: the rank file's first line is the launching node, which runs none."""
    if not surroundings.has_any("JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_RANK", "JSM_NAMESPACE_LOCAL_RANK"):
        return None
    size, rank = surroundings.size_and_rank("JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_RANK")
    if size == 1:
        return surroundings.one_process("jsrun")
    lines = (surroundings.lines("LSB_DJOB_RANKFILE") or [])[1:]
    nodes = list(dict.fromkeys(lines))
    local_rank = surroundings.number("JSM_NAMESPACE_LOCAL_RANK")
    local_size = surroundings.number("JSM_NAMESPACE_LOCAL_SIZE")
    # A line of the file is a process, or a core: then hosts run as many processes each.
    hosts = lines
    if len(lines) != size and nodes and size % len(nodes) == 0:
        hosts = [node for node in nodes for _ in range(size // len(nodes))]
    if len(hosts) != size:
        reason = f"LSB_DJOB_RANKFILE has {len(nodes)} hosts, and how {size} processes are spread is not told."
        return surroundings.cluster_without_hosts(
            "jsrun", size=size, rank=rank, local_rank=local_rank, local_size=local_size, reason=reason
        )
    of = f"JSM_NAMESPACE_RANK={rank} by the hosts of LSB_DJOB_RANKFILE"
    surroundings.check_equal("JSM_NAMESPACE_LOCAL_RANK", hosts[:rank].count(hosts[rank]), of=of)
    surroundings.check_equal("JSM_NAMESPACE_LOCAL_SIZE", hosts.count(hosts[rank]), of=of)
    _check_this_host(surroundings, hosts, rank, of="LSB_DJOB_RANKFILE")
    return surroundings.cluster("jsrun", rank=rank, hosts=hosts, start=port_of_job(job_number(surroundings)))


def _check_this_host(surroundings, hosts, rank, *, of):
    """Checks this host's name, where the list has it at all: machines may have several names."""
    name = surroundings.text("HOSTNAME") or surroundings.hostname()
    if any(is_same_host(name, host) for host in hosts) and not is_same_host(name, hosts[rank]):
        raise ValueError(
            f"HOSTNAME, this host's name, must agree with the hosts of {of}, in the order of ranks. Received: {name}, "
            f"and {hosts[rank]} for rank {rank}. See to the launcher; or {PASS_FLAGS}."
        )
