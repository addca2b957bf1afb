"""The manifests for Kubernetes, without a cluster: schemas of its own resources, fields of the others, exit codes."""

import re
import signal
import subprocess
import time

import pytest
import yaml
from kubernetes_validate import validate
from launching import LAUNCH, check_golden, environment

# The oldest with all that the manifests use (podFailurePolicy, since 1.31), and a newer one.
VERSIONS = ("1.31", "1.35")


def load(name):
    (document,) = yaml.safe_load_all((LAUNCH / name).read_text(encoding="utf-8"))
    return document


def check(kind, api_version, spec, metadata=None):
    """Validates the specification of a resource; an unknown field is an error."""
    document = {"apiVersion": api_version, "kind": kind, "metadata": {"name": "lmscale"} | (metadata or {})}
    for version in VERSIONS:
        validate(document | {"spec": spec}, version, strict=True)


@pytest.fixture
def jobset():
    return load("kubernetes.yaml")


@pytest.fixture
def tfjob():
    return load("kubernetes_tfjob.yaml")


def test_schemas_tell_what_is_wrong(jobset):
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    with pytest.raises(Exception, match="backofLimit"):
        check("Job", "batch/v1", job | {"backofLimit": 1})


def test_everything_to_change_is_in_its_place(jobset, tfjob):
    pods = [jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]]
    pods += [replica["template"] for replica in tfjob["spec"]["tfReplicaSpecs"].values()]
    for pod in pods:
        (container,) = pod["spec"]["containers"]
        mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
        (workdir,) = [part for part in container["command"] if part.startswith("--workdir=")]
        assert any(workdir.startswith(f"--workdir={mount}/") for mount in mounts)
        names = {volume["name"] for volume in pod["spec"]["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == names
        assert pod["spec"]["terminationGracePeriodSeconds"] >= 60


# ----------------------------------------------------------------------------------------------------- JobSet


def test_jobset_is_one_indexed_job(jobset):
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert set(jobset["spec"]) <= {"network", "replicatedJobs"}
    assert jobset["spec"]["network"] == {"enableDNSHostnames": True}
    (job,) = jobset["spec"]["replicatedJobs"]
    assert set(job) == {"name", "template"}
    check("Job", "batch/v1", job["template"]["spec"])
    pod = job["template"]["spec"]["template"]
    check("Pod", "v1", pod["spec"])
    assert job["template"]["spec"]["completionMode"] == "Indexed"
    (container,) = pod["spec"]["containers"]
    (count,) = [variable["value"] for variable in container["env"] if variable["name"] == "NUM_PROCESSES"]
    assert job["template"]["spec"]["parallelism"] == job["template"]["spec"]["completions"] == int(count)


def action_of(policy, code, conditions=()):
    """What Kubernetes does about a pod, by the first rule that is for it; `Count` if none is."""
    for rule in policy["rules"]:
        if "onExitCodes" in rule:
            assert rule["onExitCodes"]["operator"] == "In"
            matches = code in rule["onExitCodes"]["values"]
        else:
            matches = any(entry["type"] in conditions for entry in rule["onPodConditions"])
        if matches:
            return rule["action"]
    return "Count"


def test_jobset_restarts_what_can_go_on(jobset):
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["template"]["spec"]["restartPolicy"] == "Never"  # Else a Job may have no such policy.
    assert job["backoffLimit"] > 0
    actions = {code: action_of(job["podFailurePolicy"], code) for code in (1, 2, 3, 69, 75, 137, 143)}
    assert actions == {
        **{2: "FailJob", 3: "FailJob"},
        **{69: "Ignore", 75: "Ignore"},
        **{1: "Count", 137: "Count", 143: "Count"},
    }
    # A drained node is no failure of the run, unless that has just failed for good.
    assert action_of(job["podFailurePolicy"], 137, ["DisruptionTarget"]) == "Ignore"
    assert action_of(job["podFailurePolicy"], 2, ["DisruptionTarget"]) == "FailJob"


def variables_of_pod(jobset, index):
    """The environment of a pod, as Kubernetes and the JobSet controller make it."""
    name, (job,) = jobset["metadata"]["name"], jobset["spec"]["replicatedJobs"]
    labels = {"jobset-name": name, "replicatedjob-name": job["name"], "job-index": "0"}
    variables = {"JOB_COMPLETION_INDEX": str(index), "HOSTNAME": f"{name}-{job['name']}-0-{index}"}
    variables["KUBERNETES_SERVICE_HOST"] = "10.96.0.1"
    for entry in job["template"]["spec"]["template"]["spec"]["containers"][0]["env"]:
        if "value" in entry:
            variables[entry["name"]] = entry["value"]
        else:
            path = entry["valueFrom"]["fieldRef"]["fieldPath"]
            (label,) = re.fullmatch(r"metadata\.labels\['jobset\.sigs\.k8s\.io/(.*)'\]", path).groups()
            variables[entry["name"]] = labels[label]
    return variables


def test_jobset_tells_processes_of_one_another(jobset):
    variables = variables_of_pod(jobset, 2)
    check_golden("jobset.txt", "".join(f"{name}={value}\n" for name, value in sorted(variables.items())))
    cluster = pytest.importorskip("lmscale.distribution.cluster")
    found = cluster.find_cluster(variables)
    assert (found.size, found.rank) == (4, 2)
    hosts = [address.rpartition(":")[0] for address in found.addresses]
    assert hosts == [f"lmscale-workers-0-{index}.lmscale" for index in range(4)]


# ------------------------------------------------------------------------------------------------------ TFJob


def test_tfjob_is_a_chief_and_workers(tfjob):
    assert (tfjob["apiVersion"], tfjob["kind"]) == ("kubeflow.org/v1", "TFJob")
    assert set(tfjob["spec"]) == {"tfReplicaSpecs"}
    replicas = tfjob["spec"]["tfReplicaSpecs"]
    assert list(replicas) == ["Chief", "Worker"]
    assert replicas["Chief"]["replicas"] == 1
    for replica in replicas.values():
        assert set(replica) == {"replicas", "restartPolicy", "template"}
        # The operator's own; of the pod, it sets Never itself.
        assert replica["restartPolicy"] == "ExitCode"
        check("Pod", "v1", replica["template"]["spec"], replica["template"]["metadata"])
        (container,) = replica["template"]["spec"]["containers"]
        assert container["name"] == "tensorflow"
        assert container["command"][-4] == "lmscale-train"


def start_in_tfjob(tfjob, program):
    """Starts the command of the container, with a program in bash in place of lmscale's."""
    command = tfjob["spec"]["tfReplicaSpecs"]["Chief"]["template"]["spec"]["containers"][0]["command"]
    wrapper = command[: command.index("lmscale-train")]
    return subprocess.Popen(
        [*wrapper, "bash", "-c", program, "bash", "a b"],
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize(
    ("code", "seen"), [(0, 0), (1, 1), (2, 2), (3, 3), (69, 138), (75, 138), (139, 139), (143, 143)]
)
def test_tfjob_replaces_what_can_go_on(tfjob, code, seen):
    process = start_in_tfjob(tfjob, f'echo "$1"; exit {code}')
    assert process.communicate(timeout=30)[0] == "a b\n"
    assert process.returncode == seen
    assert (seen >= 128) == (code in (69, 75) or code >= 128)  # From 128 on the operator makes a new pod.


def test_tfjob_lets_the_command_save_at_sigterm(tfjob):
    process = start_in_tfjob(
        tfjob,
        "trap 'echo saving; sleep 1; echo saved; exit 75' TERM; echo ready; while :; do sleep 0.1; done",
    )
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    assert (process.returncode, output) == (138, "saving\nsaved\n")
