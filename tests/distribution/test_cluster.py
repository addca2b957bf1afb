"""Environments that launchers leave, recorded and made up, and the clusters that they describe."""

import dataclasses
import itertools
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lmscale.distribution.cluster import Cluster, find_cluster, gpus_of_process, share_of_process
from lmscale.distribution.clusters.addresses import join_address, split_address
from lmscale.distribution.clusters.slurm_lists import expand_hosts, expand_tasks

CASES = {
    path.stem: json.loads(path.read_text(encoding="utf-8"))
    for path in sorted((Path(__file__).parent / "environments").glob("*.json"))
}
TABLES = [name for name, case in CASES.items() if "table" in case["expect"]]
ERRORS = [name for name, case in CASES.items() if "error_about" in case["expect"]]
ANSWERS = [name for name in CASES if name not in TABLES + ERRORS]
SOURCES = {
    "tf_config": "TF_CONFIG",
    "vertex": "Vertex AI",
    "slurm": "Slurm",
    "openmpi": "Open MPI",
    "pmi": "PMI",
    "pals": "PALS",
    "lsf": "jsrun",
    "tpu": "TPU",
    "sagemaker": "SageMaker",
    "jobset": "JobSet",
    "kubeflow_trainer": "Kubeflow Trainer",
    "kubernetes": "Kubernetes",
    "none": "none",
}


def find(environment, *, files=(), metadata=(), **options):
    """`find_cluster` on a machine that has nothing but what is given."""
    files, metadata = dict(files), dict(metadata)

    def read_file(path):
        if path not in files:
            raise FileNotFoundError(path)
        return files[path]

    options = {"hostname": lambda: "laptop", **options}
    return find_cluster(environment, read_file=read_file, read_metadata=metadata.get, **options)


def find_case(name, environment=None, **options):
    case = CASES[name]
    environment = case["environment"] if environment is None else environment
    return find(environment, files=case.get("files", {}), metadata=case.get("metadata", {}), **options)


# -------------------------------------------------------------------------------------------------- Recorded cases


def test_there_are_all_cases_and_each_is_tried():
    assert len(CASES) == 44
    assert sorted(TABLES + ERRORS + ANSWERS) == sorted(CASES)
    assert (len(TABLES), len(ERRORS), len(ANSWERS)) == (3, 8, 33)
    assert {CASES[name]["expect"]["launcher"] for name in ANSWERS} == set(SOURCES)


@pytest.mark.parametrize("name", ANSWERS)
def test_recorded_environment(name):
    expect = dict(CASES[name]["expect"])
    cluster = find_case(name)
    for field in ("size", "rank", "local_rank", "local_size"):
        assert getattr(cluster, field) == expect.pop(field), field
    assert cluster.is_chief == expect.pop("is_chief")
    assert (cluster.size == 1) == expect.pop("single_process")
    # An empty TF_CONFIG is none, and the job script of PBS or LSF runs once, whatever they allocate.
    assert cluster.source == SOURCES[expect.pop("launcher")]
    hosts, addresses = expect.pop("hosts"), expect.pop("addresses")
    assert cluster.hosts == (None if hosts is None else tuple(hosts))
    assert cluster.addresses_given == (addresses is not None)
    if addresses is not None:
        assert cluster.addresses == tuple(addresses)
    elif hosts is None or len(hosts) == 1:
        assert cluster.addresses is None
    else:
        assert [split_address(address, name="")[0] for address in cluster.addresses] == hosts
        assert len(set(cluster.addresses)) == len(hosts)
    chief = expect.pop("chief")
    if chief is None:
        assert cluster.hosts is None
    else:
        assert chief == (cluster.addresses if addresses is not None else cluster.hosts)[0]
    gpus = expect.pop("gpus")
    assert gpus_of_process(CASES[name]["environment"], cluster) == (None if gpus is None else tuple(gpus))
    if expect.pop("hosts_from", None) is not None:
        with pytest.raises(ValueError, match=r"Pass --coordinator=HOST:PORT"):
            cluster.check_reachable()
    else:
        cluster.check_reachable()
    # The launcher's own addresses need not be those of rank 0: nothing is made of them.
    expect.pop("launcher_addresses", None)
    assert expect == {}


# What each error must say of what `error_about` asks for.
SAID = {
    "jobset_size_unknown": [
        "NUM_PROCESSES",
        "number of processes is unknown",
        "completion index 1",
        "others",
    ],
    "tf_config_evaluator_outside_cluster": [
        "TF_CONFIG",
        "evaluator",
        "training cluster",
        "chief and the workers",
    ],
    "tf_config_index_out_of_range": ["TF_CONFIG", "task.index 2", "outside the 2 workers", "(0..1)"],
    "tf_config_master_and_ps_sagemaker": [
        "TF_CONFIG",
        "'ps'",
        "'master'",
        "parameter server mode",
        "turn off",
    ],
    "tf_config_no_task": ["TF_CONFIG", "task is missing", "which process this is", "2 workers"],
    "tf_config_ps": ["TF_CONFIG", "parameter servers", "not supported", "'ps'", "2 addresses", "Remove"],
    "vertex_index_out_of_range": ["CLUSTER_SPEC", "task.index 3", "3 replicas of workerpool1", "(0..2)"],
    "vertex_parameter_servers_and_evaluators": [
        "CLUSTER_SPEC",
        "workerpool2: parameter servers (or Reduction Server)",
        "not supported",
        "workerpool3: evaluators",
    ],
}


@pytest.mark.parametrize("name", ERRORS)
def test_recorded_environment_that_is_no_cluster(name):
    assert sorted(SAID) == sorted(ERRORS)
    with pytest.raises(ValueError, match=r"must .*Received: ") as caught:
        find_case(name)
    for words in SAID[name]:
        assert words in str(caught.value)


ONE_HOST = Cluster(
    size=1, rank=0, hosts=("localhost",), addresses=None, local_rank=0, local_size=1, source="none"
)


@pytest.mark.parametrize("name", TABLES)
def test_recorded_table(name):
    case = CASES[name]
    (variable,) = case["environment"]
    rows = case["expect"]["table"]
    assert len(rows) == {"slurm_hostlist_table": 22, "slurm_tasks_per_node_table": 9}.get(name, 10)
    for row in rows:
        value = row["value"]
        if name == "slurm_hostlist_table":
            assert expand_hosts(value, name=variable) == row["hosts"]
        elif name == "slurm_tasks_per_node_table":
            assert expand_tasks(value, name=variable) == row["tasks"]
        else:
            environment = {} if value is None else {variable: value}
            expected = None if row["gpus"] is None else tuple(row["gpus"])
            assert gpus_of_process(environment, ONE_HOST) == expected


def test_lists_that_slurm_refuses():
    expect = CASES["slurm_hostlist_table"]["expect"]
    # A suffix after the last bracket has one meaning only; Slurm never writes it.
    suffixes = {"rack[1-2]node[1-3]-ib0": 6, "node[1-3]-hs": 3}
    assert set(suffixes) <= set(expect["refused_by_slurm"])
    for text in expect["refused_by_slurm"]:
        if text in suffixes:
            hosts = expand_hosts(text, name="SLURM_STEP_NODELIST")
            assert len(hosts) == len(set(hosts)) == suffixes[text]
        else:
            with pytest.raises(ValueError, match=r"SLURM_STEP_NODELIST must be a list of hosts .*Received: "):
                expand_hosts(text, name="SLURM_STEP_NODELIST")
    (row,) = [row for row in expect["differs"] if "python_hostlist_2.3.0" in row]
    assert expand_hosts(row["value"], name="") == row["python_hostlist_2.3.0"]


# --------------------------------------------------------------------------------------- Missing and garbled values

# Where one process is right although the variable says nothing: nothing else tells of others, or there are none.
ALONE = {
    ("kubeflow_tfjob_chief_workers", "TF_CONFIG"),
    ("tf_config_chief_worker_evaluator", "TF_CONFIG"),
    ("tf_config_ipv6", "TF_CONFIG"),
    ("tf_config_worker_index_string", "TF_CONFIG"),
    ("vertex_cluster_spec", "CLUSTER_SPEC"),
}
# SM_HOSTS that is empty, not absent, is one host.
EMPTY_ALONE = {("sagemaker_two_hosts", "SM_HOSTS")}
# Counts that no other variable tells: of too many processes, the missing ones are waited for.
COUNTS = {
    ("jobset_four_workers", "NUM_PROCESSES"),
    ("kubernetes_indexed_job", "NUM_PROCESSES"),
    ("kubeflow_trainer_v2_torch_runtime", "PET_NNODES"),
}


def outcome(environment, name=None):
    """A cluster whose processes reach each other, or the message of the error."""
    try:
        cluster = find(environment) if name is None else find_case(name, environment)
        cluster.check_reachable()
    except ValueError as error:
        return str(error)
    return cluster


@pytest.mark.parametrize("name", ANSWERS)
@pytest.mark.parametrize("value", [None, "", " ", "%%garbled%%", "-1", "1.5", "[", '{"cluster"', "999999"])
def test_no_variable_that_is_missing_or_garbled_gives_another_cluster(name, value):
    environment = CASES[name]["environment"]
    expected = find_case(name)
    is_completed = expected.size > 1 and expected.hosts is None
    for variable in environment:
        changed = {other: text for other, text in environment.items() if other != variable}
        if value is not None:
            changed[variable] = value
        found = outcome(changed, name)
        where = f"{variable}={value!r}: {found}"
        if isinstance(found, str):
            assert any(other in found for other in environment), where
            assert "Received" in found, where
        elif (found.size, found.rank, found.hosts) != (expected.size, expected.rank, expected.hosts):
            if (name, variable) in ALONE | EMPTY_ALONE:
                assert value in ("", " ") or (value is None and (name, variable) in ALONE), where
                assert found.size == 1, where
            elif (name, variable) in COUNTS:
                assert (found.size, found.rank) == (999999, expected.rank), where
            else:
                # A host of another name, which is then not found: no variable has it a second time.
                assert (found.size, found.rank) == (expected.size, expected.rank), where
                assert expected.size == 1 or (value and value in "".join(found.hosts)), where
        else:
            assert not is_completed, where


def test_any_mixture_of_values_gives_a_cluster_or_a_value_error():
    generator = random.Random(0)
    names = sorted({name for case in CASES.values() for name in case["environment"]})
    values = [
        "0",
        "1",
        "3",
        "a",
        "a,b",
        "n[1-2]",
        "1(x2)",
        "{}",
        "[1]",
        '{"cluster": {"worker": [1]}}',
        "²",
        "[::1]:3",
    ]
    values += [
        '{"cluster": {"worker": ["a:1", "b:2"]}, "task": {"type": [], "index": 0}}',
        '{"cluster": {"workerpool0": ["a:1"]}, "task": {"type": {}, "index": 0}}',
    ]
    sizes = set()
    for _ in range(3000):
        environment = dict(generator.choice(list(CASES.values()))["environment"])
        environment |= {generator.choice(names): generator.choice(values) for _ in range(3)}
        found = outcome(environment)
        sizes.add("error" if isinstance(found, str) else found.size)
    assert {"error", 1, 2, 3, 4} <= sizes


tf_config_of_one = {"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": 0}}


@pytest.mark.parametrize(
    ("name", "variable", "value"),
    [
        ("slurm_srun_cyclic", "SLURM_PROCID", "2"),
        ("slurm_srun_cyclic", "SLURM_PROCID", "4"),
        ("slurm_srun_cyclic", "SLURM_NODEID", "2"),
        ("slurm_srun_cyclic", "SLURM_LOCALID", "0"),
        ("slurm_srun_cyclic", "SLURM_GTIDS", "0,1"),
        ("slurm_srun_cyclic", "SLURM_DISTRIBUTION", "plane=2"),
        ("slurm_srun_cyclic", "SLURM_DISTRIBUTION", "arbitrary"),
        ("slurm_srun_cyclic", "SLURM_STEP_NUM_TASKS", "5"),
        ("slurm_srun_cyclic", "SLURM_STEP_NUM_NODES", "2"),
        ("slurm_srun_cyclic", "SLURM_STEP_TASKS_PER_NODE", "2(x2)"),
        ("slurm_srun_cyclic", "SLURMD_NODENAME", "n2"),
        ("slurm_srun_cyclic", "SLURM_HET_SIZE", "2"),
        ("slurm_srun_2_nodes_4_tasks_old", "SLURM_NODEID", "0"),
        ("slurm_interactive_step_one_task", "SLURM_PROCID", "1"),
        ("slurm_interactive_step_one_task", "SLURMD_NODENAME", "GPU42A2"),
        ("openmpi_two_hosts_rank3", "OMPI_COMM_WORLD_RANK", "4"),
        ("openmpi_two_hosts_rank3", "OMPI_COMM_WORLD_LOCAL_RANK", "2"),
        ("openmpi_two_hosts_rank3", "OMPI_COMM_WORLD_LOCAL_SIZE", "5"),
        ("pmi_mpiexec_inside_slurm_step", "MPI_LOCALRANKID", "1"),
        ("pals_pbs_two_nodes", "PALS_RANKID", "24"),
        ("pals_pbs_two_nodes", "PALS_RANKID", "14"),
        ("pals_pbs_two_nodes", "PALS_LOCAL_SIZE", "8"),
        ("pals_pbs_two_nodes", "PALS_NODEID", "0"),
        ("pals_pbs_two_nodes", "HOSTNAME", "x4000c0s0b0n0"),
        ("lsf_jsrun", "JSM_NAMESPACE_RANK", "4"),
        ("lsf_jsrun", "JSM_NAMESPACE_LOCAL_RANK", "1"),
        ("lsf_jsrun", "JSM_NAMESPACE_LOCAL_SIZE", "2"),
        ("lsf_jsrun", "HOSTNAME", "10.10.10.2"),
        ("tpu_vm_four_workers", "TPU_WORKER_HOSTNAMES", "n[1-4],a,b,c"),
        ("tpu_vm_four_workers", "TPU_WORKER_HOSTNAMES", "a,,b,c"),
        ("tpu_vm_four_workers", "TPU_WORKER_ID", "4"),
        ("tpu_vm_four_workers", "MEGASCALE_NUM_SLICES", "2"),
        ("sagemaker_two_hosts", "SM_CURRENT_HOST", "algo-3"),
        ("sagemaker_two_hosts", "SM_HOSTS", '["algo-1", "algo-2", "algo-2"]'),
        ("jobset_four_workers", "HOSTNAME", "pytorch-workers-0-1"),
        ("jobset_four_workers", "JOB_COMPLETION_INDEX", "4"),
        ("jobset_four_workers", "JOB_INDEX", "1"),
        ("kubernetes_indexed_job", "NUM_PROCESSES", "1"),
        ("kubernetes_indexed_job", "HOSTNAME", "example-job-2"),
        ("kubeflow_trainer_v2_torch_runtime", "JOB_COMPLETION_INDEX", "1"),
        ("kubeflow_trainer_v2_torch_runtime", "PET_NNODES", "1:4"),
        ("kubeflow_trainer_v2_torch_runtime", "PET_MASTER_ADDR", "job-master"),
        ("kubeflow_trainer_v2_torch_runtime", "HOSTNAME", "job-worker-1"),
        ("precedence_tf_config_over_slurm", "SLURM_PROCID", "0"),
        ("slurm_srun_one_task_per_node", "TF_CONFIG", json.dumps(tf_config_of_one)),
    ],
)
def test_contradictions_are_errors_that_name_the_variable(name, variable, value):
    environment = CASES[name]["environment"] | {variable: value}
    found = outcome(environment, name)
    assert isinstance(found, str), found
    about = "Slurm" if name.startswith("precedence") else variable
    assert about in found
    assert "Received" in found
    assert re.search(r"\. (Pass|Give|Correct|See|Start|Set|Use|Submit|Call) [^.]*", found)


# ------------------------------------------------------------------------------------------------- Whole clusters


def check_whole(clusters):
    """What the processes of one cluster must agree about."""
    size = len(clusters)
    assert {cluster.size for cluster in clusters} == {size}
    assert sorted(cluster.rank for cluster in clusters) == list(range(size))
    assert len({cluster.hosts for cluster in clusters}) == 1
    assert len({cluster.addresses for cluster in clusters}) == 1
    assert sum(cluster.is_chief for cluster in clusters) == 1
    if clusters[0].addresses is not None:
        assert len(set(clusters[0].addresses)) == size
        for address, host in zip(clusters[0].addresses, clusters[0].hosts, strict=True):
            found, port = split_address(address, name="")
            assert found == host
            assert 1 <= port <= 65535
    for cluster in clusters:
        on_host = [other for other in clusters if other.hosts[other.rank] == cluster.hosts[cluster.rank]]
        assert cluster.local_size == len(on_host)
        assert sorted(other.local_rank for other in on_host) == list(range(len(on_host)))


def compressed(tasks):
    """2, 2, 2, 1 as Slurm writes it: 2(x3),1."""
    runs = [(number, len(list(group))) for number, group in itertools.groupby(tasks)]
    return ",".join(f"{number}(x{times})" if times > 1 else str(number) for number, times in runs)


@pytest.mark.parametrize("distribution", ["block", "cyclic", "block:cyclic", "cyclic,NoPack", None])
def test_slurm_steps_of_any_shape(distribution):
    generator = random.Random(f"{distribution}")
    for _ in range(40):
        nodes = [f"n{number}" for number in generator.sample(range(200), generator.randint(2, 6))]
        tasks = [generator.randint(1, 4) for _ in nodes]
        # As a scheduler deals them out: one task after the other, to the node whose turn it is.
        left = list(tasks)
        placed = []
        node = 0
        while sum(left):
            if left[node]:
                placed.append(node)
                left[node] -= 1
            if not left[node] or (distribution or "").startswith("cyclic"):
                node = (node + 1) % len(nodes)
        job, step = generator.randrange(10**7), generator.randrange(5)
        clusters = []
        for rank, node in enumerate(placed):
            on_node = [task for task, other in enumerate(placed) if other == node]
            environment = {
                "SLURM_JOB_ID": str(job),
                "SLURM_STEP_ID": str(step),
                "SLURM_PROCID": str(rank),
                "SLURM_LOCALID": str(on_node.index(rank)),
                "SLURM_NODEID": str(node),
                "SLURM_GTIDS": ",".join(map(str, on_node)),
                "SLURM_STEP_NUM_TASKS": str(len(placed)),
                "SLURM_STEP_NUM_NODES": str(len(nodes)),
                "SLURM_STEP_TASKS_PER_NODE": compressed(tasks),
                "SLURM_STEP_NODELIST": ",".join(nodes),
                "SLURMD_NODENAME": nodes[node],
            }
            if distribution is not None:
                environment["SLURM_DISTRIBUTION"] = distribution
            cluster = find(environment)
            assert cluster.rank == rank
            assert cluster.hosts[rank] == nodes[node]
            assert cluster.local_rank == on_node.index(rank)
            port = split_address(cluster.addresses[rank], name="")[1]
            assert port == 61440 + ((job + step) % 4096 + on_node.index(rank)) % 4096
            clusters.append(cluster)
        check_whole(clusters)


def test_slurm_processes_of_an_undeclared_distribution_do_not_all_go_on():
    """Of a cyclic step that does not say so, at least one process tells."""
    found = [
        outcome(
            {
                "SLURM_PROCID": str(rank),
                "SLURM_NODEID": str(node),
                "SLURM_LOCALID": str(local),
                "SLURM_STEP_NODELIST": "n[1-2]",
                "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
            }
        )
        for rank, (node, local) in enumerate([(0, 0), (1, 0), (0, 1), (1, 1)])
    ]
    assert ["SLURM_DISTRIBUTION" in cluster for cluster in found if isinstance(cluster, str)] == [True, True]


@pytest.mark.parametrize("removed", ["SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE"])
def test_a_slurm_step_is_known_by_either_number_where_nodes_have_a_task(removed):
    environment = dict(CASES["slurm_node2_before_node10"]["environment"])
    del environment[removed]
    assert find(environment) == find_case("slurm_node2_before_node10")
    environment["SLURM_STEP_NUM_TASKS"] = "4"
    environment.pop("SLURM_STEP_TASKS_PER_NODE", None)
    with pytest.raises(ValueError, match="SLURM_STEP_TASKS_PER_NODE must be set"):
        find(environment)


def tf_config(jobs, task_type, index):
    return {"TF_CONFIG": json.dumps({"cluster": jobs, "task": {"type": task_type, "index": index}})}


@pytest.mark.parametrize("as_object", [False, True])
@pytest.mark.parametrize(
    "jobs", [{"worker": 3}, {"worker": 2, "chief": 1}, {"evaluator": 1, "worker": 12, "chief": 1}]
)
def test_processes_of_a_tf_config_agree_with_each_other_and_with_tensorflow(jobs, as_object, monkeypatch):
    import tensorflow as tf
    from tensorflow.python.distribute import multi_worker_util

    addresses = {job: [f"{job}{i // 2}:{2222 + i}" for i in range(number)] for job, number in jobs.items()}
    written = {
        job: {str(i): address for i, address in enumerate(found)} if as_object else found
        for job, found in addresses.items()
    }
    clusters = []
    for job in ("chief", "worker"):
        for index in range(jobs.get(job, 0)):
            environment = tf_config(written, job, index)
            cluster = find(environment)
            monkeypatch.setenv("TF_CONFIG", environment["TF_CONFIG"])
            resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
            specification = resolver.cluster_spec()
            assert cluster.rank == multi_worker_util.id_in_cluster(specification, job, index)
            assert cluster.size == multi_worker_util.worker_count(specification, job)
            assert cluster.is_chief == multi_worker_util.is_chief(specification, job, index)
            assert cluster.addresses[cluster.rank] == specification.task_address(job, index)
            clusters.append(cluster)
    check_whole(clusters)
    assert clusters[0].addresses == tuple(addresses.get("chief", []) + addresses["worker"])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("[]", "must be an object in JSON"),
        ("{", "must be an object in JSON"),
        ('{"cluster": 3}', "object of jobs"),
        ('{"task": {"type": "worker", "index": 0}}', "must have a cluster"),
        ('{"cluster": {"worker": "a:1"}}', "list of addresses"),
        ('{"cluster": {"worker": {"0": "a:1", "2": "b:1"}}}', "list of addresses"),
        ('{"cluster": {"worker": ["a:1", "b:1"]}, "task": 1}', "object as its task"),
        (
            '{"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker"}}',
            "task.type or task.index is missing",
        ),
        (
            '{"cluster": {"worker": ["a:1", "b:1"]}, "task": {"index": 1}}',
            "task.type or task.index is missing",
        ),
        ('{"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": -1}}', "task.index -1"),
        (
            '{"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": true}}',
            "task.index True",
        ),
        (
            '{"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": 0.5}}',
            "task.index 0.5",
        ),
        (
            '{"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "chief", "index": 0}}',
            "task.type 'chief'",
        ),
        ('{"cluster": {"worker": ["a", "b:1"]}, "task": {"type": "worker", "index": 0}}', "Received: 'a'"),
        (
            '{"cluster": {"worker": ["a:1", "a:1"]}, "task": {"type": "worker", "index": 0}}',
            "address of its own",
        ),
        (
            '{"cluster": {"chief": ["a:1", "b:1"]}, "task": {"type": "chief", "index": 0}}',
            "at most one chief",
        ),
        (
            '{"cluster": {"master": ["a:1"]}, "task": {"type": "master", "index": 0}}',
            "'master'. Call it chief",
        ),
        (
            '{"cluster": {"evaluator": ["a:1"]}, "task": {"type": "worker", "index": 0}}',
            "process that trains",
        ),
    ],
)
@pytest.mark.parametrize("variable", ["TF_CONFIG", "CLUSTER_SPEC"])
def test_specifications_that_are_none(variable, config, message):
    if variable == "CLUSTER_SPEC":
        config = config.replace("worker", "workerpool1")
        message = (
            rf"CLUSTER_SPEC .*({re.escape(message)}|one replica in workerpool0|worker pools workerpool0)"
        )
    else:
        message = rf"TF_CONFIG .*{re.escape(message)}"
    with pytest.raises(ValueError, match=message):
        find({variable: config})


@pytest.mark.parametrize("size", [2, 11])
@pytest.mark.parametrize(
    "launcher",
    [
        "vertex",
        "sagemaker",
        "tpu",
        "tpu_metadata",
        "indexed_job",
        "jobset",
        "trainer",
        "jax",
        "lws",
        "pals",
        "jsrun",
    ],
)
def test_processes_of_other_launchers_agree(launcher, size):
    hosts = [f"h-{number}" for number in range(size)]
    files, metadata, clusters = {}, {}, []
    for rank in range(size):
        if launcher == "vertex":
            pools = {"workerpool0": ["h-0:2222"], "workerpool1": [f"{host}:2222" for host in hosts[1:]]}
            task = {"type": "workerpool1", "index": rank - 1} if rank else {"type": "workerpool0", "index": 0}
            environment = {"CLUSTER_SPEC": json.dumps({"cluster": pools, "task": task})}
        elif launcher == "sagemaker":
            environment = {"SM_HOSTS": json.dumps(hosts), "SM_CURRENT_HOST": hosts[rank]}
        elif launcher == "tpu":
            environment = {"TPU_WORKER_HOSTNAMES": ",".join(hosts), "TPU_WORKER_ID": str(rank)}
        elif launcher == "tpu_metadata":
            environment = {"TPU_WORKER_ID": str(rank)}
            metadata = {"worker-network-endpoints": ",".join(f"w-{host}:1:{host}" for host in hosts)}
        elif launcher == "pals":
            hosts = [f"h-{number // 2}" for number in range(2 * size)][:size] if size % 2 == 0 else hosts
            local = hosts.count(hosts[rank])
            environment = {"PALS_RANKID": str(rank), "PALS_LOCAL_SIZE": str(local), "PBS_NODEFILE": "/nodes"}
            environment["PALS_LOCAL_RANKID"] = str(rank % local)
            files = {"/nodes": "".join(f"{host}.cluster\n" for host in dict.fromkeys(hosts))}
        elif launcher == "jsrun":
            environment = {"JSM_NAMESPACE_SIZE": str(size), "JSM_NAMESPACE_RANK": str(rank)}
            environment["LSB_DJOB_RANKFILE"] = "/ranks"
            files = {"/ranks": "batch\n" + "".join(f"{host}\n" * 42 for host in hosts)}
        else:
            name = f"h-{rank}" if launcher != "jobset" else f"set-h-0-{rank}"
            environment = {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "HOSTNAME": name}
            if launcher in ("indexed_job", "jobset"):
                environment |= {
                    "JOB_COMPLETION_INDEX": str(rank),
                    "NUM_PROCESSES": str(size),
                    "SUBDOMAIN": "sub",
                }
            if launcher == "jobset":
                environment |= {"JOBSET_NAME": "set", "REPLICATED_JOB_NAME": "h", "JOB_INDEX": "0"}
            if launcher == "trainer":
                environment |= {
                    "PET_NNODES": str(size),
                    "PET_NODE_RANK": str(rank),
                    "PET_MASTER_ADDR": "h-0.sub",
                }
            if launcher == "jax":
                environment |= {"JAX_NUM_PROCESSES": str(size), "JAX_PROCESS_ID": str(rank)}
                environment["JAX_COORDINATOR_ADDRESS"] = "h-0.sub:6666"
            if launcher == "lws":
                environment |= {"LWS_GROUP_SIZE": str(size), "LWS_WORKER_INDEX": str(rank)}
                environment |= {"LWS_LEADER_ADDRESS": "h.sub", "HOSTNAME": f"h-{rank}" if rank else "h"}
        cluster = find(environment, files=files, metadata=metadata)
        cluster.check_reachable()
        expected = hosts[rank]
        if launcher == "pals":
            expected += ".cluster"
        if "HOSTNAME" in environment:
            expected = environment["HOSTNAME"] + ".sub"
        assert cluster.hosts[rank] == expected
        assert cluster.rank == rank
        clusters.append(cluster)
        if launcher in ("lws", "jobset"):
            with pytest.raises(ValueError, match=r"HOSTNAME must be the pod's name.* HOSTNAME=other"):
                find(environment | {"HOSTNAME": "other"})
    check_whole(clusters)


MPI_NAMES = "COMM_WORLD_SIZE", "COMM_WORLD_RANK", "COMM_WORLD_LOCAL_SIZE", "COMM_WORLD_LOCAL_RANK"
NUMBERS = {
    "Open MPI": tuple(f"OMPI_{name}" for name in MPI_NAMES),
    "MVAPICH": tuple(f"MV2_{name}" for name in MPI_NAMES),
    "PMI": ("PMI_SIZE", "PMI_RANK", "MPI_LOCALNRANKS", "MPI_LOCALRANKID"),
    "Flux": ("FLUX_JOB_SIZE", "FLUX_TASK_RANK", None, "FLUX_TASK_LOCAL_ID"),
    "torchrun": ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK"),
    "RANK and WORLD_SIZE": ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK"),
    "AWS Batch": ("AWS_BATCH_JOB_NUM_NODES", "AWS_BATCH_JOB_NODE_INDEX", None, None),
    "JAX's variables": ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID", None, None),
}


@pytest.mark.parametrize("source", NUMBERS)
def test_launchers_that_give_numbers_only(source):
    size, rank, local_size, local_rank = NUMBERS[source]
    others = {
        "torchrun": {"TORCHELASTIC_RUN_ID": "none"},
        "JAX's variables": {"JAX_COORDINATOR_ADDRESS": "h-0:6666"},
    }.get(source, {})
    environment = others | {size: "4", rank: "3"}
    if local_rank:
        environment[local_rank] = "1"
    if local_size:
        environment[local_size] = "2"
    cluster = find(environment)
    assert (cluster.source, cluster.size, cluster.rank) == (source, 4, 3)
    assert cluster.local_rank == (1 if local_rank else None)
    assert cluster.local_size == (2 if local_size else None)
    with pytest.raises(ValueError, match=rf"{re.escape(source)}: rank 3 of 4.* Pass --coordinator=HOST:PORT"):
        cluster.check_reachable()
    completed = find(environment, coordinator="head:5000")
    completed.check_reachable()
    assert completed == dataclasses.replace(cluster, coordinator="head:5000")
    for name in (size, rank):
        partial = {other: value for other, value in environment.items() if other != name}
        if (source, name) == ("RANK and WORLD_SIZE", "WORLD_SIZE"):
            assert find(partial).size == 1  # RANK alone is anybody's word.
            partial["MASTER_ADDR"] = "h-0"
        with pytest.raises(ValueError, match=rf"{name} must be set"):
            find(partial)
        with pytest.raises(ValueError, match=rf"{name} must be a number.*{name}='many'"):
            find(environment | {name: "many"})
    with pytest.raises(ValueError, match=rf"{rank} must be below {size}\. Received: {rank}=4, {size}=4"):
        find(environment | {rank: "4"})
    assert find(others | {size: "1", rank: "0"}).size == 1
    if source == "AWS Batch":
        with pytest.raises(
            ValueError, match=r"AWS_BATCH_JOB_MAIN_NODE_INDEX must agree with rank 0.*INDEX=2"
        ):
            find(environment | {"AWS_BATCH_JOB_MAIN_NODE_INDEX": "2"})


@pytest.mark.parametrize("source", [name for name, names in NUMBERS.items() if names[2]])
def test_processes_that_are_all_on_one_host_need_no_list(source):
    size, rank, local_size, local_rank = NUMBERS[source]
    others = {"TORCHELASTIC_RUN_ID": "none"} if source == "torchrun" else {}
    clusters = [
        find(others | {size: "3", rank: str(i), local_size: "3", local_rank: str(i)}) for i in range(3)
    ]
    check_whole(clusters)
    assert clusters[0].hosts == ("localhost",) * 3
    assert clusters[0].addresses == ("localhost:61440", "localhost:61441", "localhost:61442")
    with pytest.raises(ValueError, match=f"{local_rank} must agree with {rank}"):
        find(others | {size: "3", rank: "2", local_size: "3", local_rank: "1"})


def test_what_runs_inside_of_a_launch_comes_first():
    slurm = CASES["slurm_srun_one_task_per_node"]["environment"]
    elastic = {
        "TORCHELASTIC_RUN_ID": "1",
        "WORLD_SIZE": "24",
        "RANK": "7",
        "LOCAL_RANK": "7",
        "LOCAL_WORLD_SIZE": "8",
    }
    assert find(slurm | elastic).source == "torchrun"
    # Scripts export these before srun, once for all.
    assert find(slurm | {"WORLD_SIZE": "24", "RANK": "0"}).source == "Slurm"
    mpi = {"OMPI_COMM_WORLD_SIZE": "6", "OMPI_COMM_WORLD_RANK": "5"}
    assert find(slurm | mpi).source == "Open MPI"
    # srun's own PMI describes its step, and has no hosts. Another launch of as many is not its step.
    assert find(slurm | {"PMI_SIZE": "3", "PMI_RANK": "0"}) == find(slurm)
    other = find(slurm | {"PMI_SIZE": "3", "PMI_RANK": "1"})
    assert (other.source, other.rank, other.hosts) == ("PMI", 1, None)
    assert find(slurm | {"PMI_SIZE": "1", "PMI_RANK": "0"}) == find(slurm)
    # A step's PMI of one is no launch: TF_CONFIG is compared with the step.
    config = CASES["precedence_tf_config_over_slurm"]["environment"]["TF_CONFIG"]
    with pytest.raises(ValueError, match="rank 1 of 3 from TF_CONFIG, rank 0 of 3 from Slurm"):
        find(slurm | {"TF_CONFIG": config, "PMI_SIZE": "1", "PMI_RANK": "1"})
    mpi = {"OMPI_COMM_WORLD_SIZE": "3", "OMPI_COMM_WORLD_RANK": "1"}
    assert find(slurm | mpi | {"TF_CONFIG": config}).source == "TF_CONFIG"
    with pytest.raises(ValueError, match="rank 1 of 3 from TF_CONFIG, rank 2 of 3 from Open MPI"):
        find(slurm | mpi | {"TF_CONFIG": config, "OMPI_COMM_WORLD_RANK": "2"})
    pals = CASES["pals_pbs_two_nodes"]["environment"]
    assert find_case("pals_pbs_two_nodes", slurm | pals).source == "PALS"
    inside = find_case("pals_pbs_two_nodes", pals | {"PMI_SIZE": "24", "PMI_RANK": "12"})
    assert (inside.source, inside.rank, inside.hosts) == ("PMI", 12, None)
    assert find_case("pals_pbs_two_nodes", pals | {"PMI_SIZE": "24", "PMI_RANK": "13"}) == find_case(
        "pals_pbs_two_nodes"
    )


@pytest.mark.parametrize("name", ["PMI_SIZE", "PALS_NRANKS", "PALS_APSIZE"])
def test_a_number_of_pals_processes_is_believed(name):
    environment = CASES["pals_pbs_two_nodes"]["environment"]
    expected = find_case("pals_pbs_two_nodes")
    assert find_case("pals_pbs_two_nodes", environment | {name: "24", "PALS_LOCAL_SIZE": ""}) == expected
    # The last host has fewer.
    uneven = find_case("pals_pbs_two_nodes", environment | {name: "20"})
    assert (uneven.size, uneven.rank, uneven.hosts) == (20, 13, None)
    with pytest.raises(ValueError, match="PBS_NODEFILE has 2 hosts, and how 20 processes"):
        uneven.check_reachable()


@pytest.mark.parametrize("distribution", ["plane=2", "arbitrary", "*"])
def test_slurm_distributions_that_make_no_difference(distribution):
    environment = CASES["slurm_node2_before_node10"]["environment"] | {"SLURM_DISTRIBUTION": distribution}
    assert find(environment) == find_case("slurm_node2_before_node10")
    assert find(slurm_of_one_node(0, 3) | {"SLURM_DISTRIBUTION": distribution}).size == 3


def test_a_tpu_host_alone_asks_nobody():
    asked = []
    environment = {"TPU_WORKER_ID": "0", "TPU_HOST_BOUNDS": "1,1,1"}
    assert find_cluster(environment, read_metadata=asked.append).size == 1
    assert (
        find_cluster({"TPU_NAME": "local", "TPU_ACCELERATOR_TYPE": "v5"}, read_metadata=asked.append).size
        == 1
    )
    assert asked == []
    with pytest.raises(ValueError, match="TPU_WORKER_HOSTNAMES must be set"):
        find_cluster({"TPU_WORKER_ID": "0"}, read_metadata=asked.append)
    assert asked == ["worker-network-endpoints"]


def test_the_name_of_a_host_that_runs_all_processes():
    environment = {"PMI_SIZE": "2", "PMI_RANK": "1", "MPI_LOCALNRANKS": "2"}
    assert find(environment | {"PMIX_HOSTNAME": "a"}).hosts == ("a", "a")
    assert find(environment | {"PMIX_HOSTNAME": "a", "SLURMD_NODENAME": "b"}).hosts == ("b", "b")


def test_more_tasks_than_run_are_warned_about():
    cluster = find_case("slurm_sbatch_body_without_srun")
    assert re.search(r"SLURM_NTASKS=4 .*srun", cluster.warning)
    assert re.search(r"SLURM_NPROCS=7 .*srun", find_case("slurm_salloc_without_srun").warning)
    assert find_case("slurm_interactive_step_one_task").warning is None
    assert find({"SLURM_JOB_ID": "3", "SLURM_NTASKS": "1"}).warning is None


# ---------------------------------------------------------------------------------------------------------- Flags


@pytest.mark.parametrize("name", CASES)
def test_flags_win(name):
    cluster = find_case(name, coordinator="head:5000", num_processes=7, process_id=6)
    assert (cluster.size, cluster.rank, cluster.source) == (7, 6, "flags")
    assert (cluster.hosts, cluster.addresses, cluster.coordinator) == (None, None, "head:5000")
    cluster.check_reachable()
    alone = find_case(name, num_processes=1)
    assert (alone.size, alone.rank, alone.source) == (1, 0, "flags")


@pytest.mark.parametrize("name", ANSWERS)
def test_a_coordinator_completes_what_the_environment_tells(name):
    expected = find_case(name)
    if expected.size == 1:
        with pytest.raises(
            ValueError, match=r"num_processes and process_id .*Received: coordinator=head:5000"
        ):
            find_case(name, coordinator="head:5000")
        return
    cluster = find_case(name, coordinator="[2001:db8::1]:5000")
    assert (cluster.coordinator, cluster.addresses) == ("[2001:db8::1]:5000", None)
    assert (cluster.size, cluster.rank, cluster.hosts) == (expected.size, expected.rank, expected.hosts)
    cluster.check_reachable()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"num_processes": 2}, "num_processes=2 only. Give --coordinator --process_id too"),
        ({"process_id": 2}, "process_id=2 only. Give --coordinator --num_processes too"),
        ({"num_processes": 2, "process_id": 0}, "Give --coordinator too"),
        ({"coordinator": "a:1", "num_processes": 2}, "Give --process_id too"),
        ({"coordinator": "a:1", "process_id": 1}, "Give --num_processes too"),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": 2}, "from 0 to num_processes - 1 = 1. Received"),
        ({"coordinator": "a:1", "num_processes": 65537, "process_id": 0}, "must be at most 65536. Received"),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": -1}, "Received: .*process_id=-1"),
        ({"num_processes": 1, "process_id": 1}, "process_id must be from 0 to num_processes - 1 = 0"),
        ({"num_processes": 0}, "num_processes must be at least 1. Received: num_processes=0"),
        ({"coordinator": "a"}, "coordinator must be an address HOST:PORT.* Received: 'a'"),
        ({"coordinator": ":1"}, "Received: ':1'"),
        ({"coordinator": "a:"}, "Received: 'a:'"),
        ({"coordinator": "a:0"}, "Received: 'a:0'"),
        ({"coordinator": "a:65536"}, "Received: 'a:65536'"),
        ({"coordinator": "a:b"}, "Received: 'a:b'"),
        ({"coordinator": "grpc://a:1"}, "Received: 'grpc://a:1'"),
        ({"coordinator": "2001:db8::1:2222"}, "brackets.* Received: '2001:db8::1:2222'"),
        ({"coordinator": ""}, "Received: ''"),
        ({"port": 0}, "port must be from 1 to 65535. Received: port=0"),
        ({"port": 65536}, "Received: port=65536"),
    ],
)  # fmt: skip
def test_flags_that_are_wrong(flags, message):
    with pytest.raises(ValueError, match=message):
        find({}, **flags)


# ---------------------------------------------------------------------------------------------------------- Ports


def slurm_of_one_node(job, tasks):
    return {
        "SLURM_JOB_ID": str(job),
        "SLURM_PROCID": "0",
        "SLURM_STEP_NODELIST": "n1",
        "SLURM_STEP_TASKS_PER_NODE": str(tasks),
    }


def ports(cluster):
    return [split_address(address, name="")[1] for address in cluster.addresses]


def test_ports_of_a_batch_job():
    assert ports(find(slurm_of_one_node(0, 2))) == [61440, 61441]
    assert ports(find(slurm_of_one_node(4095, 3))) == [65535, 61440, 61441]
    assert ports(find(slurm_of_one_node(4096, 2))) == [61440, 61441]
    assert ports(find(slurm_of_one_node(200505, 2))) == [61440 + 200505 % 4096, 61441 + 200505 % 4096]
    interactive = slurm_of_one_node(7, 2) | {"SLURM_STEP_ID": "4294967290"}
    assert ports(find(interactive)) == [61440 + (7 + 4294967290) % 4096 + local for local in range(2)]
    assert ports(find_case("lsf_jsrun")) == [61440 + 1234] * 4
    assert (
        ports(find_case("pals_pbs_two_nodes")) == [61440 + 699001 % 4096 + local for local in range(12)] * 2
    )
    # mpirun starts processes of other nodes by a step of Slurm, and those of its own without one.
    inside = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    assert ports(find(inside | {"SLURM_JOB_ID": "5", "SLURM_STEP_ID": "9"})) == [61445, 61446]
    assert ports(find(inside | {"PBS_JOBID": "12[3].server"})) == [61452, 61453]


def test_ports_of_hosts_that_are_a_processes_own():
    for name in ("tpu_vm_four_workers", "jobset_four_workers", "kubernetes_indexed_job"):
        assert set(ports(find_case(name))) == {2222}
    assert ports(find_case("sagemaker_two_hosts")) == [2223, 2223]
    two_containers = {"TPU_WORKER_ID": "3", "TPU_WORKER_HOSTNAMES": "a,a,b,b"}
    assert find(two_containers).addresses == ("a:2222", "a:2223", "b:2222", "b:2223")


def test_the_users_port_is_that_of_the_first_process_of_each_host():
    assert ports(find_case("slurm_srun_cyclic", port=700)) == [700, 700, 700, 701]
    assert ports(find_case("jobset_four_workers", port=700)) == [700] * 4
    assert ports(find(slurm_of_one_node(0, 2), port=65534)) == [65534, 65535]
    with pytest.raises(ValueError, match=r"port=65534 and 3 processes.*--port=N of at most 65533"):
        find(slurm_of_one_node(0, 3), port=65534)
    for name in ("tf_config_ipv6", "vertex_cluster_spec"):
        with pytest.raises(ValueError, match=r"Received: port=700, and \w+, which has .*Leave out --port"):
            find_case(name, port=700)
    assert find_case("vertex_single_replica", port=700) == find_case("vertex_single_replica")
    assert find({}, port=700) == find({})


@pytest.mark.parametrize(("host", "port"), [("a-1.b", 1), ("10.0.0.1", 65535), ("2001:db8::1", 2222)])
def test_addresses_there_and_back(host, port):
    assert split_address(join_address(host, port), name="") == (host, port)


# ---------------------------------------------------------------------------------------------------------- Lists


def expand_one_bracket_at_a_time(text):
    """The hosts of a list, by another way: replaces the first bracket by each of its numbers, and begins again."""
    hosts, depth, part = [], 0, ""
    for character in text + ",":
        depth += {"[": 1, "]": -1}.get(character, 0)
        if character != "," or depth:
            part += character
            continue
        first = re.search(r"\[(.*?)\]", part)
        if first is None:
            hosts.append(part)
        else:
            for item in first[1].split(","):
                low, _, high = item.partition("-")
                number = int(low)
                while number <= int(high or low):
                    digits = "0" * max(0, len(low) - len(str(number))) + str(number)
                    hosts += expand_one_bracket_at_a_time(
                        part[: first.start()] + digits + part[first.end() :]
                    )
                    number += 1
        part = ""
    return hosts


def random_list(generator):
    parts = []
    for _ in range(generator.randint(1, 4)):
        part = generator.choice(["n", "gpu-a", "rack", "nid0"])
        for _ in range(generator.randint(0, 2)):
            items = []
            for _ in range(generator.randint(1, 3)):
                low = generator.randint(0, 120)
                width = generator.choice([1, 1, 3, 4])
                items.append(f"{low:0{width}}")
                if generator.random() < 0.5:
                    items[-1] += f"-{low + generator.randint(0, 12)}"
            part += f"[{','.join(items)}]" + generator.choice(["", "_b", "-c"])
        parts.append(part)
    return ",".join(parts)


def test_host_lists_against_another_implementation():
    generator = random.Random(0)
    lengths = []
    for _ in range(300):
        text = random_list(generator)
        hosts = expand_hosts(text, name="")
        assert hosts == expand_one_bracket_at_a_time(text), text
        lengths.append(len(hosts))
    assert max(lengths) > 100
    for row in CASES["slurm_hostlist_table"]["expect"]["table"]:
        assert expand_one_bracket_at_a_time(row["value"].replace(" ", ",")) == row["hosts"]


def test_lists_against_tensorflows():
    from tensorflow.python.distribute.cluster_resolver import slurm_cluster_resolver

    differing = []
    for row in CASES["slurm_hostlist_table"]["expect"]["table"]:
        try:
            theirs = slurm_cluster_resolver.expand_hostlist(row["value"])
        except ValueError:
            theirs = None
        if theirs != expand_hosts(row["value"], name=""):
            differing.append(row["value"])
    # It takes no second bracket, and blanks for a part of the name.
    assert differing == [
        "rack[0-1]_blade[0-1]",
        "n[1-2][01-02]",
        "rack[1-2]_blade[01-03],ln5",
        "alpha beta gamma",
    ]
    for row in CASES["slurm_tasks_per_node_table"]["expect"]["table"]:
        assert slurm_cluster_resolver.expand_tasks_per_node(row["value"]) == expand_tasks(
            row["value"], name=""
        )


@pytest.mark.parametrize(
    "text", ["n[1-2", "n1-2]", "n[[1]]", "n[]", "n[a]", "n[1-]", "n[2-1]", "n[1;2]", "a;b", "n/1", ",", "n[0-99999999]"]
)  # fmt: skip
def test_lists_that_are_none(text):
    with pytest.raises(ValueError, match=re.escape("NODES must be a list of hosts") + r".*NODES="):
        expand_hosts(text, name="NODES")


@pytest.mark.parametrize("text", ["", "0", "a", "2(x0)", "2(3)", "2(x3", "2,,1", "-1", "9(x9999999)"])
def test_task_lists_that_are_none(text):
    with pytest.raises(ValueError, match=r"TASKS must be numbers of tasks"):
        expand_tasks(text, name="TASKS")


# ----------------------------------------------------------------------------------------------------------- GPUs


def cluster_on_one_host(size, rank, source="Open MPI"):
    return dataclasses.replace(
        ONE_HOST, size=size, rank=rank, hosts=("h",) * size, local_rank=rank, local_size=size, source=source
    )


@pytest.mark.parametrize(
    ("source", "environment", "shares"),
    [
        ("Open MPI", {"CUDA_VISIBLE_DEVICES": "4,5,6,7"}, [("4", "5"), ("6", "7")]),
        ("Open MPI", {"CUDA_VISIBLE_DEVICES": "3,1"}, [("3",), ("1",)]),
        ("Open MPI", {"CUDA_VISIBLE_DEVICES": "3,1,-1,0"}, [("3",), ("1",)]),
        ("Open MPI", {"CUDA_VISIBLE_DEVICES": "3"}, [("3",), ("3",)]),
        ("Open MPI", {"CUDA_VISIBLE_DEVICES": ""}, [(), ()]),
        ("Open MPI", {}, [None, None]),
        # A task that sees fewer than the step has on the node has its own, by --gpus-per-task.
        ("Slurm", {"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_STEP_GPUS": "0,1,2,3"}, [("0", "1")] * 2),
        ("Slurm", {"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_GPUS_PER_TASK": "a100:2"}, [("0", "1")] * 2),
        ("Slurm", {"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_GPUS_PER_TASK": "2"}, [("0", "1"), ("2", "3")]),
        ("Slurm", {"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_STEP_GPUS": "2,5"}, [("0",), ("1",)]),
        # A launcher inside of the step divides what the step has.
        ("PMI", {"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_STEP_GPUS": "0,1,2,3"}, [("0",), ("1",)]),
        ("PMI", {"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_GPUS_PER_TASK": "2"}, [("0",), ("1",)]),
    ],
)
def test_gpus_of_two_processes_of_a_host(source, environment, shares):
    assert [gpus_of_process(environment, cluster_on_one_host(2, rank, source)) for rank in range(2)] == shares


def test_gpus_that_cannot_be_divided():
    with pytest.raises(ValueError, match=r"3 GPUs, 2 processes \(Open MPI\)"):
        gpus_of_process({"CUDA_VISIBLE_DEVICES": "0,1,2"}, cluster_on_one_host(2, 0))
    assert [share_of_process(range(6), cluster_on_one_host(3, rank)) for rank in range(3)] == [
        (0, 1),
        (2, 3),
        (4, 5),
    ]
    unknown = dataclasses.replace(cluster_on_one_host(2, 1, "Flux"), local_size=None)
    assert gpus_of_process({"CUDA_VISIBLE_DEVICES": "0,1"}, unknown) == ("0", "1")
    flags = find({}, coordinator="a:1", num_processes=2, process_id=1)
    assert share_of_process("ab", flags) == ("a", "b")


# ---------------------------------------------------------------------------------------------------------- Names


def test_names_of_processes():
    cluster = find_case("tf_config_ipv6")
    assert cluster.name() == "process 1 of 2 ([2001:db8::2]:2222)"
    assert cluster.name(0) == "process 0 of 2 ([2001:db8::1]:2222)"
    cluster = find({}, coordinator="head:5000", num_processes=2, process_id=1)
    assert (cluster.name(), cluster.name(0)) == ("process 1 of 2", "process 0 of 2 (head:5000)")
    assert find({}).name() == "process 0 of 1 (localhost)"


def test_a_cluster_that_is_none_is_not_made():
    with pytest.raises(ValueError, match=r"rank=1, size=1"):
        dataclasses.replace(ONE_HOST, rank=1)
    with pytest.raises(ValueError, match=r"1 hosts of 2 processes"):
        dataclasses.replace(ONE_HOST, size=2)


def test_tensorflow_is_not_imported():
    program = "import sys, lmscale.distribution.cluster; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_the_environment_of_this_process_by_default(monkeypatch):
    monkeypatch.setenv("TF_CONFIG", CASES["tf_config_ipv6"]["environment"]["TF_CONFIG"])
    assert find_cluster() == find_case("tf_config_ipv6")


def test_a_file_is_read(tmp_path):
    case = CASES["lsf_jsrun"]
    path = tmp_path / "ranks"
    path.write_text(case["files"]["/tmp/lsb_djob_rankfile"])
    assert find_cluster(case["environment"] | {"LSB_DJOB_RANKFILE": str(path)}) == find_case("lsf_jsrun")


def test_the_page_has_every_variable_that_is_read():
    root = Path(__file__).parents[2]
    package = root / "lmscale" / "distribution" / "clusters"
    source = "\n".join(path.read_text(encoding="utf-8") for path in package.glob("*.py"))
    read = set(re.findall(r"\"([A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+|RANK|SUBDOMAIN|HOSTNAME)\"", source))
    assert len(read) >= 70
    page = (root / "docs" / "environments.md").read_text(encoding="utf-8")
    assert sorted(name for name in read if not re.search(rf"\b{name}\b", page)) == []
