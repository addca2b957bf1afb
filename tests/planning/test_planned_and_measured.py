"""The most that a device takes in a run of a large vocabulary is, within a tenth, what the planner tells."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("planned_and_measured.py")


@pytest.mark.skipif(sys.platform != "linux", reason="Reads /proc.")
def test_two_hundred_thousand_rows(tmp_path):
    result = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path), "200,000 x 128", "1"],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    numbers = dict(re.findall(r"(\w+): planned ([\d.]+), [\d.]+ measured", result.stdout))
    measured = dict(re.findall(r"(\w+): planned [\d.]+, ([\d.]+) measured", result.stdout))
    # Rows, second moments, the steps of rows and of biases, layers and their slots: exact, as printed.
    assert numbers["variables_mib"] == measured["variables_mib"]
    assert 0.9 < float(numbers["evaluation_mib"]) / float(measured["evaluation_mib"]) < 1.1
    (ratio,) = re.findall(r"planned / measured = ([\d.]+)", result.stdout)
    assert 0.9 < float(ratio) < 1.1
