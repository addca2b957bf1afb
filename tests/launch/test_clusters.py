"""The scripts for GPUs, Slurm, Vertex AI, TPU VMs and TensorBoard: what they call, by stand-ins for the tools."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from launching import LAUNCH, ROOT, check_golden, run, stand_in

ALL = sorted(path for path in LAUNCH.iterdir() if path.suffix in (".sh", ".sbatch"))
TRAIN = (".venv/bin/python", "-m", "lmscale.train", "--gin_param=DATA_DIR='my data'", "--workdir=runs/a,b")
# Notes its name and arguments.
CALLED = """python3 -c 'import json, sys; print(json.dumps(sys.argv[1:]))' "${0##*/}" "$@" >>"$LOG"\n"""


def called(path):
    """The commands that stand-ins have noted."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# ------------------------------------------------------------------------------------------------ All scripts


@pytest.mark.parametrize("script", ALL, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script):
    shellcheck = Path(sys.executable).with_name("shellcheck")
    result = subprocess.run([shellcheck, "--shell=bash", script], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, "")


@pytest.mark.parametrize("script", ALL, ids=lambda path: path.name)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_is_the_header(script, flag, tmp_path):
    result = run(script.name, flag, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert "Usage: " in result.stdout
    assert f"launch/{script.name}" in result.stdout
    assert "set -euo" not in result.stdout
    assert "#" not in result.stdout


@pytest.mark.parametrize(
    "name", ["local_gpus.sh", "slurm.sbatch", "vertex.sh", "tpu_vm.sh", "tensorboard.sh"]
)
def test_unknown_flags_are_named(name, tmp_path):
    result = run(name, "--fast", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: unknown flag. Received: --fast.")


# ----------------------------------------------------------------------------------------- GPUs of one machine


@pytest.fixture
def gpus(tmp_path):
    """Runs local_gpus.sh where nvidia-smi shows two GPUs, or fails."""

    def gpus(*arguments, answer="printf '0, NVIDIA A, 81559 MiB\\n1, NVIDIA A, 81559 MiB\\n'", **variables):
        path = stand_in(tmp_path / "bin", "nvidia-smi", answer)
        return run("local_gpus.sh", *arguments, cwd=tmp_path, PATH=path, **variables)

    return gpus


def test_local_gpus_shows_them_and_runs(gpus):
    result = gpus("bash", "-c", 'echo "${CUDA_VISIBLE_DEVICES-unset} [$*]"; exit 75', "bash", "a b")
    assert result.returncode == 75
    assert result.stdout == "0, NVIDIA A, 81559 MiB\n1, NVIDIA A, 81559 MiB\nunset [a b]\n"
    result = gpus("--print", *TRAIN, CUDA_VISIBLE_DEVICES="1")
    assert result.returncode == 0
    check_golden("local_gpus.txt", result.stdout)
    assert gpus().stdout == "0, NVIDIA A, 81559 MiB\n1, NVIDIA A, 81559 MiB\n"


@pytest.mark.parametrize("answer", ["exit 9", "true"])
def test_local_gpus_without_any_stops(gpus, answer):
    result = gpus("echo", "ran", answer=answer)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ")


# ------------------------------------------------------------------------------------------------------ Slurm

# As a batch script finds it: two nodes with eight tasks, in job 1234.
SLURM = {
    "SLURM_JOB_ID": "1234",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_NNODES": "2",
    "SLURM_NTASKS": "8",
    "SLURM_NTASKS_PER_NODE": "4",
    "SLURM_PROCID": "0",
    "SLURM_CPUS_PER_TASK": "12",
}


@pytest.fixture
def slurm(tmp_path):
    """Runs the body of slurm.sbatch as a job; returns the process, and what it called."""
    log = tmp_path / "log"

    def slurm(*arguments, code=0, **variables):
        log.unlink(missing_ok=True)
        path = stand_in(tmp_path / "bin", "srun", CALLED + f"exit {code}")
        stand_in(tmp_path / "bin", "scontrol", CALLED)
        # Slurm runs a copy of the script, elsewhere.
        copy = shutil.copy(LAUNCH / "slurm.sbatch", tmp_path / "slurm_script")
        result = run(copy, *arguments, cwd=tmp_path, PATH=path, LOG=str(log), **variables)
        return result, called(log)

    return slurm


def test_slurm_starts_the_tasks(slurm):
    result, calls = slurm(*TRAIN, **SLURM)
    assert (result.returncode, result.stderr) == (0, "")
    (call,) = calls
    assert call[:2] == ["srun", "--distribution=block"]
    assert call[-len(TRAIN) :] == list(TRAIN)
    result, calls = slurm("--print", *TRAIN, **SLURM)
    assert (result.returncode, calls) == (0, [])
    check_golden("slurm.txt", result.stdout)
    assert shlex.split(result.stdout) == call
    assert "--cpus-per-task" not in slurm("--print", *TRAIN)[0].stdout


@pytest.mark.parametrize(
    ("code", "restarts", "again"),
    [
        *[(0, None, False), (1, None, False), (2, None, False), (3, None, False), (143, None, False)],
        *[(75, None, True), (75, "99", True), (69, None, True), (69, "9", True), (69, "10", False)],
        *[(138, None, True), (138, "10", False)],
    ],
)
def test_slurm_queues_again_what_can_go_on(slurm, code, restarts, again):
    variables = SLURM | ({"SLURM_RESTART_COUNT": restarts} if restarts else {})
    result, calls = slurm("train", code=code, **variables)
    assert result.returncode == code
    assert calls[1:] == ([["scontrol", "requeue", "1234"]] if again else [])
    assert ("queued again" in result.stderr) == again


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "there must be a command. Received: none"),
        (("train",), "this is the script of a job: submit it with"),
    ],
)
def test_slurm_mistakes_are_named(slurm, arguments, message):
    result, calls = slurm(*arguments)
    assert (result.returncode, calls) == (2, [])
    assert result.stderr.startswith(f"error: {message}")


def test_slurm_reads_all_directives():
    """Slurm stops at the first line that is neither empty nor a comment."""
    text = (LAUNCH / "slurm.sbatch").read_text()
    head = text[: text.index("\nset -euo")]
    directives = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    assert directives == head.splitlines()[-len(directives) :]
    asked = dict(directive.removeprefix("#SBATCH --").partition("=")[::2] for directive in directives)
    assert {"requeue": "", "dependency": "singleton", "signal": "USR1@300"}.items() <= asked.items()
    assert "job-name" in asked  # Without it, the singleton would be of the file's name, and of each copy's.


# -------------------------------------------------------------------------------------------------- Vertex AI

VERTEX = ("--region=europe-west4", "--image=registry.example/lmscale", "--machine_type=a2-highgpu-1g")


@pytest.fixture
def gcloud(tmp_path):
    """Runs a script with a stand-in for gcloud; returns the process and what it called."""
    log = tmp_path / "log"

    def gcloud(script, *arguments):
        log.unlink(missing_ok=True)
        path = stand_in(tmp_path / "bin", "gcloud", CALLED)
        return run(script, *arguments, cwd=tmp_path, PATH=path, LOG=str(log)), called(log)

    return gcloud


def test_vertex_makes_a_chief_and_workers(gcloud):
    arguments = (*VERTEX, "--accelerator=NVIDIA_TESLA_A100:1", "--num_processes=4", "--", *TRAIN)
    result, calls = gcloud("vertex.sh", "--print", *arguments)
    assert (result.returncode, result.stderr, calls) == (0, "", [])
    check_golden("vertex.txt", result.stdout)
    result, (call,) = gcloud("vertex.sh", *arguments)
    assert (result.returncode, result.stdout) == (0, "")
    assert shlex.split(gcloud("vertex.sh", "--print", *arguments)[0].stdout) == call
    pools = [part for part in call if part.startswith("--worker-pool-spec=")]
    assert [pool.rpartition("=")[2] for pool in pools] == ["1", "3"]


def test_vertex_with_one_process_has_one_pool(gcloud):
    _, (call,) = gcloud("vertex.sh", *VERTEX, "--name=mine", "--", "lmscale-train")
    (pool,) = [part for part in call if part.startswith("--worker-pool-spec=")]
    assert "replica-count=1" in pool
    assert "accelerator" not in pool
    assert "--display-name=mine" in call
    assert "--args" not in " ".join(call)


def test_vertex_lists_arrive_as_they_are(gcloud):
    arguments = ["--a=1,2", "b;c", "", "new\nline", "it's"]
    _, (call,) = gcloud("vertex.sh", *VERTEX, "--", "python", *arguments)
    (text,) = [part.removeprefix("--args=") for part in call if part.startswith("--args=")]
    _, separator, items = text.split("^", 2)  # As gcloud reads a list.
    assert items.split(separator) == arguments
    result, calls = gcloud("vertex.sh", *VERTEX, "--", "python", ",;|~#+")
    assert (result.returncode, calls) == (2, [])
    assert "an argument must lack one of" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--region is required"),
        (VERTEX[:1], "--image is required"),
        (VERTEX[:2], "--machine_type is required"),
        (VERTEX, "-- and a command must come last. Received: no command"),
        ((*VERTEX, "train"), "-- must stand before the command. Received: train"),
        ((*VERTEX, "--num_processes=0", "--", "train"), "--num_processes must be from 1. Received: 0"),
        ((*VERTEX, "--accelerator=A100", "--", "train"), "--accelerator must be TYPE:COUNT. Received: A100"),
    ],
)
def test_vertex_mistakes_are_named(gcloud, arguments, message):
    result, calls = gcloud("vertex.sh", *arguments)
    assert (result.returncode, calls) == (2, [])
    assert result.stderr.startswith(f"error: {message}")


# ---------------------------------------------------------------------------------------------------- TPU VMs

PLACE = ("--name=lm", "--zone=us-central2-b")
OF_TYPE = ("--type=v4-8", "--runtime=tpu-ubuntu2204-base")


def test_tpu_vm_is_made_used_and_deleted(gcloud):
    steps = (
        ("create", *PLACE, *OF_TYPE),
        ("install", *PLACE),
        ("run", *PLACE, "--", *TRAIN),
        ("run", *PLACE, "--worker=all", "--", *TRAIN),
        ("delete", *PLACE),
    )
    shown = []
    for step in steps:
        result, calls = gcloud("tpu_vm.sh", "--print", *step)
        assert (result.returncode, result.stderr, calls) == (0, "", [])
        shown.append(result.stdout.replace(str(ROOT), "/project"))
        if step[0] != "install":  # That one makes an archive.
            result, (call,) = gcloud("tpu_vm.sh", *step)
            assert (result.returncode, shlex.split(shown[-1])) == (0, call)
    check_golden("tpu_vm.txt", "".join(shown))


def test_tpu_vm_runs_the_command_as_it_is(gcloud, tmp_path):
    arguments = ["a b", "it's", "$HOME"]
    _, (call,) = gcloud(
        "tpu_vm.sh", "run", *PLACE, "--", sys.executable, "-c", "import sys; print(sys.argv[1:])", *arguments
    )
    (tmp_path / "lmscale").mkdir()
    there = call[-1].removeprefix("--command=")
    output = subprocess.run(
        ["bash", "-c", there], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    assert output == f"{arguments}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (PLACE, "the first argument must be create, install, run or delete. Received: none"),
        (("start", *PLACE), "the first argument must be create, install, run or delete. Received: start"),
        (("run",), "--name is required"),
        (("run", PLACE[0]), "--zone is required"),
        (("run", *PLACE), "-- and a command must come last. Received: no command"),
        (("run", *PLACE, "train"), "-- must stand before the command. Received: train"),
        (("delete", *PLACE, "--", "train"), "only run takes a command. Received: delete, train"),
        (
            ("create", *PLACE, OF_TYPE[0]),
            "create needs --type and --runtime. Received: --type=v4-8 --runtime=",
        ),
    ],
)
def test_tpu_vm_mistakes_are_named(gcloud, arguments, message):
    result, calls = gcloud("tpu_vm.sh", *arguments)
    assert (result.returncode, calls) == (2, [])
    assert result.stderr.startswith(f"error: {message}")


# ------------------------------------------------------------------------------------------------ TensorBoard


@pytest.fixture
def board(tmp_path):
    """Runs tensorboard.sh of a project with a stand-in for TensorBoard, beside a few runs."""
    launch = tmp_path / "project" / "launch"
    launch.mkdir(parents=True)
    shutil.copy(LAUNCH / "tensorboard.sh", launch)
    for name in ("one", "two", "a b", "c,d"):
        (tmp_path / "runs" / name).mkdir(parents=True)

    def board(*arguments):
        return run(launch / "tensorboard.sh", *arguments, cwd=tmp_path)

    board.tools = tmp_path / "project" / ".venv" / "bin"
    return board


def test_tensorboard_shows_runs(board, tmp_path):
    shown = [
        board("--print", *logdirs).stdout.replace(str(tmp_path), "/here")
        for logdirs in (["runs/c,d"], ["runs/one", "runs/a b"], ["runs", "--", "--port=6007"])
    ]
    check_golden("tensorboard.txt", "".join(shown))
    result = board("runs/one")
    assert (result.returncode, result.stderr) == (
        *(2, "error: TensorBoard must be in .venv. Run launch/setup.sh first\n"),
    )
    board.tools.mkdir(parents=True)
    stand_in(board.tools, "tensorboard", 'printf "%s|" "$@"')
    assert board("runs/one", "runs/two", "--", "--bind_all").stdout == (
        "--logdir_spec=runs/one:runs/one,runs/two:runs/two|--bind_all|"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "a run directory is required. Received: none"),
        (("runs/none",), "a run directory must be there. Received: runs/none"),
        (
            ("runs/one", "runs/c,d"),
            "one of several run directories must have no : or , in its path. Received: runs/c,d",
        ),
    ],
)
def test_tensorboard_mistakes_are_named(board, arguments, message):
    result = board(*arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"error: {message}\n"


# ------------------------------------------------------------------------------- What the processes then find


@pytest.mark.parametrize(
    ("variables", "rank", "hosts"),
    [
        (
            {
                "SLURM_JOB_ID": "1234",
                "SLURM_STEP_NODELIST": "n[1-2]",
                "SLURM_STEP_NUM_TASKS": "2",
                "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
                "SLURM_PROCID": "1",
                "SLURM_LOCALID": "0",
            },
            *(1, ["n1", "n2"]),
        ),
        (
            {
                "CLUSTER_SPEC": json.dumps(
                    {
                        "cluster": {"workerpool0": ["c-0:2222"], "workerpool1": ["w-0:2222", "w-1:2222"]},
                        "task": {"type": "workerpool1", "index": 1},
                        "environment": "cloud",
                    }
                )
            },
            *(2, ["c-0", "w-0", "w-1"]),
        ),
        ({"TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "10.0.0.9,10.0.0.2"}, 1, ["10.0.0.9", "10.0.0.2"]),
    ],
    ids=["slurm", "vertex", "tpu"],
)
def test_processes_find_each_other(variables, rank, hosts):
    cluster = pytest.importorskip("lmscale.distribution.cluster")
    found = cluster.find_cluster(variables, hostname=lambda: hosts[rank], read_metadata=lambda _: None)
    assert (found.size, found.rank) == (len(hosts), rank)
    assert [address.rpartition(":")[0] for address in found.addresses] == hosts


def test_scripts_are_executable():
    assert all(os.access(script, os.X_OK) for script in ALL)
