"""What comes with lmscale is found beside you first, and then in the installed package; a wheel has all of it."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from lmscale import configuration, paths

ROOT = Path(__file__).parents[1]
BOOK = [f"tiny-austen/{split}.txt" for split in ("train", "valid", "test")]


def files_below(folder, pattern="*"):
    return {path.relative_to(folder).as_posix() for path in folder.rglob(pattern) if path.is_file()}


def test_a_checkout_has_what_a_wheel_has():
    assert files_below(Path(paths.CONFIGS).resolve()) == files_below(ROOT / "configs")
    assert files_below(Path(paths.BOOKS).resolve()) == files_below(ROOT / "data")


def test_configurations_beside_you_come_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (
        configuration.load(["quickstart.gin"]).text
        == configuration.load([paths.CONFIGS + "/quickstart.gin"]).text
    )
    shipped = Path(paths.CONFIGS, "quickstart.gin").read_text()
    Path("mine.gin").write_text(shipped.replace("WINDOW = 35", "WINDOW = 7"))
    assert configuration.load(["mine.gin"]).macros["WINDOW"] == 7
    Path("quickstart.gin").write_text(shipped.replace("WINDOW = 35", "WINDOW = 9"))
    assert configuration.load(["quickstart.gin"]).macros["WINDOW"] == 9
    Path("shared").mkdir()
    training = Path(paths.CONFIGS, "shared", "training.gin").read_text()
    Path("shared/training.gin").write_text(training.replace("clip_norm = 1.0", "clip_norm = 0.25"))
    assert configuration.load(["mine.gin"]).experiment.clip_norm == 0.25
    with pytest.raises(
        ValueError, match=r"'configs/quickstart.gn', which is not a file. Did you mean quickstart.gin"
    ):
        configuration.load(["configs/quickstart.gn"])


def test_texts_beside_you_come_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = [str(Path(paths.BOOKS, name)) for name in BOOK]
    assert paths.or_shipped(BOOK) == shipped
    assert paths.or_shipped(["tiny-austen/t*.txt"]) == sorted([shipped[0], shipped[2]])
    Path("tiny-austen").mkdir()
    Path(BOOK[0]).write_text("mine\n")
    assert paths.or_shipped(["tiny-austen/t*.txt", *BOOK]) == ["tiny-austen/t*.txt", BOOK[0], *shipped[1:]]
    # What is nowhere, and what is no name, is told as it was given.
    assert paths.or_shipped(["", "no.txt", "/no.txt"]) == ["", "no.txt", "/no.txt"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with what a wheel of this source installs, and nothing else."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("lmscale", "configs", "data"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--quiet",
    ]
    subprocess.run([*build, "--wheel-dir", folder, source], check=True, timeout=300)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def test_a_wheel_has_everything(installed):
    package = installed / "lmscale"
    assert files_below(package, "*.py") == files_below(ROOT / "lmscale", "*.py")
    assert files_below(package / "configs") == files_below(ROOT / "configs")
    assert files_below(package / "books") == files_below(ROOT / "data")
    assert (package / "py.typed").exists()
    names = {path.name.partition("-")[0] for path in installed.iterdir()}
    assert names == {"lmscale"}


def test_a_wheel_trains_without_a_checkout(installed, tmp_path):
    def run(*arguments):
        environment = os.environ | {"PYTHONPATH": str(installed)}
        command = [sys.executable, *arguments]
        result = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600, check=False
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    assert run("-c", "import lmscale; print(lmscale.__file__)").startswith(f"{installed}/")
    splits = [f"--{Path(name).stem}={name}" for name in BOOK]
    run("-m", "lmscale.prepare", *splits, "--output=runs/data/tiny-austen")
    settings = {"TRAIN_STEPS": 2, "EMBED_DIM": 8, "HIDDEN_DIM": 8, "experiment.Experiment.probe_tokens": 0}
    bindings = [f"--gin_param={name}={value}" for name, value in settings.items()]
    run("-m", "lmscale.train", "--gin_file=quickstart.gin", "--workdir=run", *bindings)
    assert '"step": 2' in (tmp_path / "run" / "finished.json").read_text()
    assert "include" not in (tmp_path / "run" / "config.gin").read_text()
