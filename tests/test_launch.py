"""The launch scripts, with stand-ins for Python and pip: nothing is installed and nothing trained here."""

import importlib.metadata
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
LOCKS = ("requirements.lock", "requirements-tpu.lock")
PYTHONS = ("3.10", "3.11", "3.12", "3.13")


def run(*command, cwd, **environment):
    """Runs a command, without PYTHON in its environment; returns the process, with its output as text."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHON"}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=inherited | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def write_script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{text}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def project(tmp_path):
    """A project with the launch scripts and nothing else, at a path that needs quotes."""
    root = tmp_path / "a $folder's"
    shutil.copytree(ROOT / "launch", root / "launch")
    for name in (*LOCKS, "requirements-gpu.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, root / name)
    return root


# ------------------------------------------------------------------------------------------------ All scripts


@pytest.mark.parametrize("script", [*SCRIPTS, ROOT / ".ci" / "run"], ids=lambda path: path.name)
def test_is_executable_bash(script):
    assert os.access(script, os.X_OK)
    assert run("bash", "-n", script, cwd=ROOT).returncode == 0


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_help_only_prints_usage(script, project, tmp_path):
    result = run(project / "launch" / script.name, "--help", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert f"Usage: launch/{script.name}" in result.stdout
    assert not (project / ".venv").exists()


@pytest.mark.parametrize(
    ("name", "takes"), [("setup.sh", "--gpu, --tpu, --tf220 or nothing"), ("quickstart.sh", "no arguments")]
)
def test_unexpected_arguments_are_named(name, takes, project, tmp_path):
    result = run(project / "launch" / name, "--fast", "now", cwd=tmp_path)
    assert result.returncode == 2
    assert f"{name} takes {takes}. Received: --fast now" in result.stderr


def test_ci_runs_the_tests(project):
    shutil.copytree(ROOT / ".ci", project / ".ci")
    write_script(project / "launch" / "test.sh", "echo tested $# arguments; exit 3\n")
    result = run("bash", ".ci/run", cwd=project)
    assert (result.returncode, result.stdout) == (3, "tested 0 arguments\n")


def test_test_and_check_set_up_first_and_pass_arguments_on(project, tmp_path):
    write_script(project / "launch" / "setup.sh", 'echo setup "$@"\n')
    write_script(project / ".venv" / "bin" / "python", 'printf " %s" "$@"; echo\n')
    write_script(project / ".venv-tf220" / "bin" / "python", 'printf " %s" "$@"; echo\n')
    result = run(project / "launch" / "test_tf220.sh", "-k", "a b", cwd=tmp_path)
    assert result.stdout == "setup --tf220\n -m pytest -k a b\n"
    result = run(project / "launch" / "test.sh", "-k", "a b", cwd=tmp_path)
    assert result.stdout == "setup\n -m pytest -k a b\n"
    result = run(project / "launch" / "check.sh", "-x", cwd=tmp_path)
    tools = [line.split()[1] for line in result.stdout.splitlines() if line.startswith(" -m")]
    assert (result.returncode, tools) == (0, ["ruff", "ruff", "mypy", "pytest"])
    assert result.stdout.endswith(" -m pytest -x\n")


# ---------------------------------------------------------------------------------------------- The lock file


def pins(lock):
    """The requirements of a lock file."""
    lines = (ROOT / lock).read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def pinned(lock, python):
    """{name: version} that a lock file pins for a Python."""
    environment = {"python_version": python, "python_full_version": f"{python}.0"}
    locked = {}
    for pin in pins(lock):
        assert re.fullmatch(r"==[\w.]+", str(pin.specifier)), f"{pin} is not pinned to one version"
        if pin.marker is None or pin.marker.evaluate(environment):
            assert pin.name not in locked, f"{pin.name} is pinned twice for Python {python}"
            locked[pin.name] = str(pin.specifier)[2:]
    return locked


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("lock", LOCKS)
def test_lock_pins_all_that_the_project_asks_for(lock, python):
    tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    locked = pinned(lock, python)
    wanted = project["project"]["dependencies"] + project["build-system"]["requires"]
    wanted += project["project"]["optional-dependencies"]["dev"]
    if lock == "requirements-tpu.lock":
        wanted += project["project"]["optional-dependencies"]["tpu"]
        assert "tensorflow" not in locked  # It would be installed over the files of tensorflow-tpu.
        locked["tensorflow"] = locked["tensorflow-tpu"]
    for requirement in map(Requirement, wanted):
        assert requirement.specifier.contains(locked[requirement.name]), requirement


@pytest.mark.parametrize("python", PYTHONS)
def test_locks_differ_in_nothing_but_tensorflow(python):
    plain, tpu = (set(pinned(lock, python).items()) for lock in LOCKS)
    assert {name for name, _ in plain - tpu} == {"tensorflow", "tensorflow-text", "tensorboard"}
    assert {name for name, _ in tpu - plain} == {"tensorflow-tpu", "libtpu", "tensorflow-text", "tensorboard"}


def test_gpu_lock_pins_what_tensorflow_wants_for_gpus():
    """All of the extra, at versions that TensorFlow and each other allow, and nothing that the other lock has."""
    locked = {pin.name: str(pin.specifier)[2:] for pin in pins("requirements-gpu.lock")}
    wanted = [Requirement(text) for text in importlib.metadata.requires("tensorflow")]
    wanted = [r for r in wanted if r.marker and r.marker.evaluate({"extra": "and-cuda"})]
    wanted = [r for r in wanted if not r.marker.evaluate({"extra": ""})]
    assert {r.name for r in wanted} == locked.keys()
    for requirement in wanted:
        assert requirement.specifier.contains(locked[requirement.name]), requirement
    assert not locked.keys() & {pin.name for pin in pins("requirements.lock")}
    tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (extra,) = map(Requirement, project["optional-dependencies"]["gpu"])
    (base,) = (r for r in map(Requirement, project["dependencies"]) if r.name == "tensorflow")
    assert (extra.name, extra.extras, extra.specifier) == ("tensorflow", {"and-cuda"}, base.specifier)


def test_no_package_index_is_named():
    for path in [*SCRIPTS, *ROOT.glob("requirements*.lock"), ROOT / ".ci" / "run"]:
        assert not re.search(r"https?:|index-url|find-links|trusted-host", path.read_text()), path


# ------------------------------------------------------------------------------------------------------ setup

# Stands in for a Python: notes what it is asked to install, and makes environments with a copy of itself.
FAKE_PYTHON = r"""
case "$*" in
  "-c import ensurepip"*) exit @SUITABLE@ ;;
  "-c import sys; print(sys.version)") echo "@VERSION@" ;;
  --version) echo "Python @VERSION@" ;;
  "-m venv --clear "*)
    echo "venv @VERSION@" >>"$LOG"
    rm -rf -- "$4" && mkdir -p -- "$4/bin" && cp -- "${BASH_SOURCE[0]}" "$4/bin/python" ;;
  "-m pip "*" install "*)
    echo "pip ${*: -1}" >>"$LOG"
    [[ "${*: -1}" != "${FAIL-}" ]] ;;
  "-m pip "*" check") printf "%b" "${CHECK-}"; [[ -z ${CHECK-} ]] ;;
  "-m pip "*) ;;
  *) echo "unexpected: $*" >&2 && exit 9 ;;
esac
"""


def fake_python(path, version="3.12.1", suitable=True):
    text = FAKE_PYTHON.replace("@VERSION@", version).replace("@SUITABLE@", "0" if suitable else "1")
    write_script(path, text)


@pytest.fixture
def setup(project, tmp_path):
    """Runs launch/setup.sh where all Pythons are stand-ins; returns the process and what it installed."""
    log = tmp_path / "log"
    only = tmp_path / "bin"
    for name in ("python3.12", "python3.11", "python3.13", "python3.10", "python3"):
        write_script(only / name, "echo 'no such version' >&2; exit 127\n")

    def setup(*arguments, **environment):
        log.write_text("")
        path = f"{only}:{os.environ['PATH']}"
        script = project / "launch" / "setup.sh"
        result = run(script, *arguments, cwd=tmp_path, **({"PATH": path, "LOG": str(log)} | environment))
        return result, log.read_text().splitlines()

    setup.bin = only
    return setup


INSTALLED = ["pip requirements.lock", "pip ."]


def test_setup_takes_the_first_python_that_fits(setup):
    fake_python(setup.bin / "python3.11", "3.11.9", suitable=False)
    fake_python(setup.bin / "python3.10", "3.10.1")
    fake_python(setup.bin / "python3", "3.12.7")
    result, did = setup()
    assert (result.returncode, did) == (0, ["venv 3.10.1", *INSTALLED])
    assert result.stdout.splitlines()[0] == "Making .venv with Python 3.10.1"


def test_setup_without_a_fitting_python_says_what_is_needed(setup, tmp_path):
    result, did = setup()
    assert (result.returncode, did) == (2, [])
    assert "a Python 3.10 to 3.13 with the modules venv and ensurepip is needed" in result.stderr
    result, did = setup(PYTHON=str(tmp_path / "none"))
    assert (result.returncode, did) == (2, [])
    assert f"Received: PYTHON={tmp_path / 'none'}" in result.stderr


def test_setup_does_nothing_the_second_time(setup):
    fake_python(setup.bin / "python3.12")
    setup()
    result, did = setup()
    assert (result.returncode, result.stdout, did) == (0, "", [])


def test_setup_updates_when_the_lock_has_changed(setup, project):
    fake_python(setup.bin / "python3.12")
    setup()
    with (project / "requirements.lock").open("a") as lock:
        lock.write("# changed\n")
    result, did = setup()
    assert (result.returncode, did) == (0, INSTALLED)
    assert setup()[1] == []


def test_setup_for_gpus_adds_their_libraries_which_stay(setup, project):
    fake_python(setup.bin / "python3.12")
    with_gpus = [INSTALLED[0], "pip requirements-gpu.lock", INSTALLED[1]]
    assert setup()[1] == ["venv 3.12.1", *INSTALLED]
    assert setup("--gpu")[1] == with_gpus
    assert setup("--gpu")[1] == []
    assert setup()[1] == []
    with (project / "requirements-gpu.lock").open("a") as lock:
        lock.write("# changed\n")
    result, did = setup()
    assert (result.returncode, did) == (0, with_gpus)


@pytest.mark.parametrize("failing", ["requirements.lock", "."])
def test_setup_repairs_what_was_left_half_made(setup, project, failing):
    fake_python(setup.bin / "python3.12")
    assert setup(FAIL=failing)[0].returncode != 0
    result, did = setup()
    assert (result.returncode, did) == (0, ["venv 3.12.1", *INSTALLED])
    # An update that fails leaves no environment that passes for a good one either.
    (project / "requirements.lock").write_text("")
    assert setup(FAIL=failing)[0].returncode != 0
    assert setup()[1] == ["venv 3.12.1", *INSTALLED]


def test_setup_for_tpus_stands_beside_the_other(setup, project):
    fake_python(setup.bin / "python3.12")
    setup()
    result, did = setup("--tpu")
    assert (result.returncode, did) == (0, ["venv 3.12.1", "pip requirements-tpu.lock", "pip ."])
    assert (project / ".venv-tpu" / "bin" / "python").exists()
    assert setup()[1] == setup("--tpu")[1] == []
    # There is no libtpu of the pinned version for Python 3.13.
    assert "a Python 3.10 to 3.12 with" in setup("--tpu", PYTHON="none")[0].stderr
    # tensorflow-tpu is TensorFlow, whatever pip makes of it. Nothing else may be missing.
    (project / "requirements-tpu.lock").write_text("")
    unknown = "tensorflow-text 2.20.1 requires tensorflow, which is not installed.\n"
    assert setup("--tpu", CHECK=unknown)[0].returncode == 0
    (project / "requirements-tpu.lock").write_text("# changed")
    missing = "keras 3.15.1 requires rich, which is not installed.\n"
    result, _ = setup("--tpu", CHECK=unknown + missing)
    assert (result.returncode, result.stderr) == (1, missing)
    (project / "requirements.lock").write_text("# changed")
    assert setup(CHECK=unknown)[0].returncode == 1


def test_setup_with_tensorflow_2_20_takes_it_in_place_of_tensorflow_tpu(setup, project):
    fake_python(setup.bin / "python3.12")
    result, did = setup("--tf220")
    requirements = project / ".venv-tf220" / "requirements.txt"
    assert (result.returncode, did) == (0, ["venv 3.12.1", f"pip {requirements}", "pip ."])
    text = (project / "requirements-tpu.lock").read_text()
    expected = re.sub(r"^libtpu==.*\n", "", text, flags=re.MULTILINE)
    expected = expected.replace("\ntensorflow-tpu==", "\ntensorflow==")
    assert requirements.read_text() == expected
    assert expected.count("\ntensorflow==2.20.") == 1


def test_setup_makes_the_environment_anew_for_another_python_or_place(setup, project, tmp_path):
    fake_python(setup.bin / "python3.12")
    fake_python(setup.bin / "python3.13", "3.13.0")
    setup()
    result, did = setup(PYTHON=str(setup.bin / "python3.13"))
    assert (result.returncode, did) == (0, ["venv 3.13.0", *INSTALLED])
    assert setup()[1] == []
    (project / ".venv" / "bin" / "python").unlink()
    assert setup()[1] == ["venv 3.12.1", *INSTALLED]


# ------------------------------------------------------------------------------------------------- Quickstart

# Stands in for the Python of the environment: notes the command, and evaluates to a known perplexity.
FAKE_LMSCALE = r"""
[[ $1 == -c ]] && exec "$REAL_PYTHON" "$@"
echo "$*" >>"$LOG"
case "$*" in
  *lmscale.prepare*) mkdir -p runs/data/tiny-austen && touch runs/data/tiny-austen/manifest.json ;;
  *lmscale.train*) echo "${TRAINED-trained}"; exit "${TRAIN_EXIT-0}" ;;
  *--split=valid) printf 'progress\n{"split": "valid", "perplexity": 131.0}\n' ;;
  *--split=test) printf 'progress\n{"split": "test", "perplexity": 123.456}\n' ;;
esac
"""


@pytest.fixture
def quickstart(project, tmp_path):
    """Runs launch/quickstart.sh with stand-ins; returns the process and the commands that it ran."""
    write_script(project / "launch" / "setup.sh", "")
    write_script(project / ".venv" / "bin" / "python", FAKE_LMSCALE)
    log = tmp_path / "log"

    def quickstart(**environment):
        log.write_text("")
        script = project / "launch" / "quickstart.sh"
        result = run(script, cwd=tmp_path, LOG=str(log), REAL_PYTHON=sys.executable, **environment)
        return result, log.read_text().splitlines()

    return quickstart


def test_quickstart_prepares_trains_evaluates_and_tells_the_result(quickstart, project):
    result, commands = quickstart()
    assert result.returncode == 0, result.stderr
    assert [re.search(r"lmscale\.(\w+)", command)[1] for command in commands] == [
        *["prepare", "train", "evaluate", "evaluate"]
    ]
    for stage in range(1, 5):
        assert result.stdout.count(f"[{stage}/4] ") == 1
    last = result.stdout.splitlines()[-3:]
    assert last[0].split() == ["Test", "perplexity:", "123.46", "(validation:", "131.00)"]
    # The printed paths can be pasted into a shell.
    words = run("bash", "-c", f"printf '%s\\n' {last[2].split(':', 1)[1]}", cwd=project).stdout.splitlines()
    assert words == [f"{project}/.venv/bin/tensorboard", f"--logdir={project}/runs/quickstart"]
    words = run("bash", "-c", f"printf '%s\\n' {last[1].split(':', 1)[1]}", cwd=project).stdout.splitlines()
    assert words == [f"{project}/runs/quickstart"]


def test_quickstart_again_keeps_the_data_and_asks_the_run(quickstart):
    quickstart()
    result, commands = quickstart(TRAINED="The run is finished.")
    assert result.returncode == 0
    assert "Already prepared." in result.stdout
    assert "The run is finished." in result.stdout
    assert not any("lmscale.prepare" in command for command in commands)


def test_quickstart_stops_at_the_first_failure_with_its_code(quickstart):
    result, commands = quickstart(TRAIN_EXIT="75")
    assert result.returncode == 75
    assert not any("lmscale.evaluate" in command for command in commands)
    assert "Test perplexity" not in result.stdout


def defined_flags(module):
    """Names of the flags of a module, and of those whose flags it adopts."""
    source = (ROOT / "lmscale" / f"{module}.py").read_text()
    adopted = re.findall(r"adopt_module_key_flags\((\w+)\)", source)
    return set(re.findall(r"DEFINE_\w+\(\s*\"(\w+)\"", source)).union(*map(defined_flags, adopted))


def test_quickstart_uses_flags_and_files_that_exist(quickstart):
    _, commands = quickstart()
    for command in commands:
        module = re.search(r"-m lmscale\.(\w+)", command)[1]
        used = re.findall(r" --(\w+)=", command)
        assert set(used) <= defined_flags(module), f"lmscale.{module} lacks flags of: {command}"
    for path in re.findall(r"=((?:configs|data)/\S+)", " ".join(commands)):
        assert (ROOT / path).is_file(), path
