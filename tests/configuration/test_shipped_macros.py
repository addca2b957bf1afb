"""The shipped configurations load from anywhere, and share their macros."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from shipped_configurations import CONFIGS, macros_of

from lmscale import configuration


def test_only_one_module_knows_of_gin():
    package = Path(configuration.__file__).parent
    importing = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if re.search(r"^\s*(import|from) gin\b", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert importing == {"gin_text.py"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
class TestShipped:
    def test_loads_from_anywhere_and_from_its_own_text(self, path, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        config = configuration.load([str(path)])
        (tmp_path / "config.gin").write_text(config.text)
        reloaded = configuration.load(["config.gin"])
        assert reloaded.text == config.text
        assert configuration.describe(reloaded) == configuration.describe(config)

    def test_exposes_the_macros_of_its_family(self, path):
        assert macros_of(path) <= configuration.load([str(path)]).macros.keys()

    def test_a_macro_of_the_wrong_type_is_refused(self, path):
        for macro in sorted(macros_of(path) - {"ROW_LEARNING_RATE"}):
            wrong = "7" if macro == "DATA_DIR" else "'many'"
            with pytest.raises(ValueError, match=f"must be of type .*from the macro {macro}"):
                configuration.load([str(path)], [f"{macro} = {wrong}"])


def test_loading_leaves_the_devices_alone():
    """--cpu_devices takes effect only while TensorFlow has not started its devices."""
    code = (
        "import sys\nfrom lmscale import configuration\nfrom tensorflow.python.eager import context\n"
        "configuration.load(sys.argv[1:])\nassert not context.context()._initialized\n"
    )
    quickstart = Path(__file__).parents[2] / "configs" / "quickstart.gin"
    result = subprocess.run(
        [sys.executable, "-c", code, quickstart], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
