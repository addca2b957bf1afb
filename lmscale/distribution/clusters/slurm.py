"""Slurm: processes that srun starts.

Only SLURM_STEP_* describes what runs. SLURM_PROCID and SLURM_NTASKS also stand in a batch script, which runs once, and
stay in the environment of what other launchers start.
"""

from lmscale.distribution.clusters.addresses import is_same_host, local_ranks, port_of_job
from lmscale.distribution.clusters.slurm_lists import expand_hosts, expand_tasks
from lmscale.distribution.clusters.surroundings import PASS_FLAGS

NODES, TASKS, NUM_TASKS = "SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE", "SLURM_STEP_NUM_TASKS"


def slurm_step(surroundings):
    """The tasks of a step, or None where there is no step."""
    if not surroundings.has_any(NODES, TASKS, NUM_TASKS):
        return None
    set_names = [name for name in (NODES, TASKS, NUM_TASKS) if surroundings.has_any(name)]
    because = f"{' and '.join(set_names)} describe{'s' if len(set_names) == 1 else ''} a step of Slurm"
    if step_size(surroundings) == 1 and not surroundings.has_any(NODES):
        surroundings.check_equal("SLURM_PROCID", 0, of="a step of one task")
        return surroundings.one_process("Slurm")
    nodes = expand_hosts(surroundings.required(NODES, because=because), name=NODES)
    tasks = _tasks_of_nodes(surroundings, nodes, because)
    size = sum(tasks)
    surroundings.check_equal(NUM_TASKS, size, of=f"the sum of {TASKS}")
    surroundings.check_equal("SLURM_STEP_NUM_NODES", len(nodes), of=f"the hosts of {NODES}")
    if size > 1 and (surroundings.number("SLURM_HET_SIZE") or 1) > 1:
        raise ValueError(
            "A step of Slurm must not be of a heterogeneous job, whose variables describe a part of it. Received: "
            f"SLURM_HET_SIZE={surroundings.number('SLURM_HET_SIZE')}. Submit one job without parts; or {PASS_FLAGS}."
        )
    _check_that_the_step_is_this_ones(surroundings, nodes)
    if size == 1:
        surroundings.check_equal("SLURM_PROCID", 0, of="a step of one task")
        return surroundings.one_process("Slurm", host=nodes[0])
    rank = surroundings.required_number("SLURM_PROCID", because=because)
    if rank >= size:
        raise ValueError(
            f"SLURM_PROCID must be below the number of tasks of the step. Received: SLURM_PROCID={rank}, and {size} "
            f"tasks in {TASKS} or {NUM_TASKS}. Start the processes with srun; or {PASS_FLAGS}."
        )
    node_of_task = _distribute(surroundings, tasks)
    _check_place(surroundings, rank, node_of_task, nodes)
    job = (surroundings.number("SLURM_JOB_ID") or 0) + (surroundings.number("SLURM_STEP_ID") or 0)
    hosts = [nodes[node] for node in node_of_task]
    return surroundings.cluster("Slurm", rank=rank, hosts=hosts, start=port_of_job(job))


def step_size(surroundings):
    """Number of tasks of the step, or None where it is not said."""
    number = surroundings.number(NUM_TASKS)
    if number is None and (text := surroundings.text(TASKS)) is not None:
        return sum(expand_tasks(text, name=TASKS))
    return number


def slurm_without_step(surroundings):
    """The process of a batch script or of a shell in an allocation: one, however many tasks are allocated."""
    if not surroundings.has_any("SLURM_JOB_ID", "SLURM_JOBID", "SLURM_PROCID"):
        return None
    warning = None
    for name in ("SLURM_NTASKS", "SLURM_NPROCS"):
        if surroundings.text(name) not in (None, "1"):
            warning = (
                f"One process runs, although Slurm has allocated {name}={surroundings.text(name)} tasks: start it "
                "with srun to run all of them."
            )
            break
    return surroundings.one_process("Slurm", warning=warning)


def _tasks_of_nodes(surroundings, nodes, because):
    """Number of tasks of each node."""
    text = surroundings.text(TASKS)
    if text is not None:
        tasks = expand_tasks(text, name=TASKS)
        if len(tasks) != len(nodes):
            raise ValueError(
                f"{TASKS} must have a number for each host of {NODES}. Received: {len(tasks)} numbers in {text!r}, "
                f"{len(nodes)} hosts in {surroundings.text(NODES)!r}. See to the launcher; or {PASS_FLAGS}."
            )
        return tasks
    number = surroundings.number(NUM_TASKS)
    if number is not None and number == len(nodes):
        return [1] * number  # No node of a step is without a task.
    if number and len(nodes) == 1:
        return [number]
    raise ValueError(
        f"{TASKS} must be set: {because}. Received: none, {len(nodes)} hosts and {NUM_TASKS}={number}. Start the "
        f"processes with srun; or {PASS_FLAGS}."
    )


def _check_that_the_step_is_this_ones(surroundings, nodes):
    """A batch job submitted from inside of a step inherits the step's variables, and Slurm replaces only its own."""
    host = surroundings.text("SLURMD_NODENAME")
    if host is not None and not any(is_same_host(host, node) for node in nodes):
        raise ValueError(
            f"{NODES} must have this host in it. Received: {surroundings.text(NODES)!r} and SLURMD_NODENAME={host}. "
            "Start the processes with srun; or, for one process alone, unset every SLURM_STEP_*, which may be those of "
            "a shell from which the job was submitted."
        )


def _distribute(surroundings, tasks):
    """Number of the node of each task, in the order of ranks.

    Args:
      tasks: number of tasks of each node.
    """
    block = [node for node, number in enumerate(tasks) for _ in range(number)]
    text = surroundings.text("SLURM_DISTRIBUTION")
    kind = (text or "block").split(":")[0].split(",")[0].lower()
    if kind == "cyclic":
        return [node for turn in range(max(tasks)) for node, number in enumerate(tasks) if number > turn]
    # With one task a node, or one node, any distribution is the same; `*` is Slurm's word for its default.
    if kind in ("block", "*", "unknown") or len(tasks) == 1 or max(tasks) == 1:
        return block
    raise ValueError(
        "SLURM_DISTRIBUTION must be block or cyclic, where nodes have several tasks. Received: "
        f"SLURM_DISTRIBUTION={text!r}. Give srun --distribution=block; or {PASS_FLAGS}."
    )


def _check_place(surroundings, rank, node_of_task, nodes):
    """Compares what Slurm says about this task with what its lists amount to."""
    node = node_of_task[rank]
    of = f"the place of SLURM_PROCID={rank} by {NODES} and {TASKS}, distributed by SLURM_DISTRIBUTION"
    surroundings.check_equal("SLURM_NODEID", node, of=of)
    surroundings.check_equal("SLURM_LOCALID", local_ranks(node_of_task)[rank], of=of)
    tasks = surroundings.text("SLURM_GTIDS")
    expected = ",".join(str(task) for task, other in enumerate(node_of_task) if other == node)
    if tasks is not None and tasks != expected:
        raise ValueError(
            f"SLURM_GTIDS must agree with {of}. Received: SLURM_GTIDS={tasks}, and {expected} from the others. Give "
            f"srun --distribution=block; or {PASS_FLAGS}."
        )
    host = surroundings.text("SLURMD_NODENAME")
    if host is not None and not is_same_host(host, nodes[node]):
        raise ValueError(
            f"SLURMD_NODENAME must agree with {of}. Received: SLURMD_NODENAME={host}, and {nodes[node]} from the "
            f"others. Give srun --distribution=block; or {PASS_FLAGS}."
        )
