"""Every family in two processes is the run of one process with two devices: the same losses, the same bits."""

import json
from pathlib import Path

import pytest
import tiny_families
import tiny_runs

from lmscale import configuration
from lmscale.checkpoints.directory import Checkpoints
from lmscale.data.prepared import open_prepared
from lmscale.trainer import Trainer

NUM_STEPS = 2
# As in test_processes.py.
RTOL = 1e-6
# All in one pair of processes, one after the other; LSTMs are in test_processes.py.
FAMILIES = (
    "quickstart_both_directions",
    "quickstart_cbow",
    "quickstart_classes",
    "quickstart_gru",
    "quickstart_last_words",
    "quickstart_lstmp",
    "quickstart_next_item",
    "quickstart_transformer",
    "quickstart_word2vec",
)
# One of each kind of batches and of what is carried from step to step.
RESUMED = ("quickstart_both_directions", "quickstart_classes", "quickstart_next_item", "quickstart_word2vec")


def bindings(name, folder):
    small = tiny_families.TINY[name].settings
    layers = {"NUM_LAYERS": 1} if "NUM_LAYERS" in small else {}
    return tiny_families.bindings(name, folder, TRAIN_STEPS=NUM_STEPS, **layers)


@pytest.fixture(scope="module")
def in_processes(tmp_path_factory):
    """{family: what process_of_a_run.py has done}."""
    directory = tmp_path_factory.mktemp("families")
    done = {}
    for name in FAMILIES:
        folder = directory / name
        folder.mkdir()
        done[name] = {
            "config": str(tiny_families.CONFIGS / f"{name}.gin"),
            "bindings": bindings(name, folder),
            "steps": NUM_STEPS,
            "checkpoints": str(folder / "checkpoints"),
            "begin": None,
        }
    for name in RESUMED:
        whole = done[name]
        done[f"{name}, resumed"] = whole | {
            "checkpoints": str(directory / name / "resumed"),
            "begin": [whole["checkpoints"], 1],
        }
    tiny_runs.finish_in_processes(2, list(done.values()), log=directory / "log")
    return done


@pytest.mark.parametrize("name", RESUMED)
def test_goes_on_from_a_checkpoint_with_the_same_bits(in_processes, name):
    whole, resumed = (Path(in_processes[key]["checkpoints"]) for key in (name, f"{name}, resumed"))
    losses = [json.loads((folder / "losses.json").read_text()) for folder in (whole, resumed)]
    assert losses[1] == losses[0][1:]
    step = f"step_{NUM_STEPS:08d}"
    tiny_runs.assert_same_bits(tiny_runs.tensors_of(whole / step), tiny_runs.tensors_of(resumed / step))


@pytest.mark.parametrize("name", FAMILIES)
def test_equals_two_devices_of_one_process(in_processes, mirrored, tmp_path, name):
    """Steps alone, which is where families differ: test_processes.py has whole runs."""
    done = in_processes[name]
    experiment = configuration.load([done["config"]], done["bindings"]).experiment
    trainer = Trainer(experiment, data=open_prepared(experiment.data_dir), strategy=mirrored(2))
    losses = [float(trainer.train_steps()["loss"][0]) for _ in range(NUM_STEPS)]
    assert losses[0] != losses[1]
    folder = Path(done["checkpoints"])
    assert json.loads((folder / "losses.json").read_text()) == pytest.approx(losses, rel=RTOL)
    Checkpoints(tmp_path / "checkpoints").save(NUM_STEPS, trainer.parameters(), metadata={})
    step = f"step_{NUM_STEPS:08d}"
    tiny_runs.assert_same_bits(
        tiny_runs.tensors_of(folder / step), tiny_runs.tensors_of(tmp_path / "checkpoints" / step)
    )
