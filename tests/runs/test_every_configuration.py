"""Every configuration that is shipped, at tiny sizes: its dry run, and two steps on 2 devices."""

from pathlib import Path

import numpy as np
import pytest
import tiny_families
import tiny_runs
from shipped_configurations import CONFIGS

from lmscale import configuration, dry_run
from lmscale.data.prepared import open_prepared
from lmscale.start import start_from_elsewhere
from lmscale.trainer import Trainer

# What trains them on 2 devices already, and compares their losses with those of 1 device.
TRAINED_BY = {
    "book_from_wikitext2": "test_shipped_configurations.py",
    "quickstart": "test_processes.py",
    "quickstart_both_directions": "test_shipped_configurations.py",
    "quickstart_cbow": "test_word2vec.py",
    "quickstart_classes": "test_example_families.py",
    "quickstart_gru": "test_shipped_configurations.py",
    "quickstart_last_words": "test_example_families.py",
    "quickstart_lstmp": "test_shipped_configurations.py",
    "quickstart_next_item": "test_example_families.py",
    "quickstart_transformer": "test_shipped_configurations.py",
    "quickstart_untied": "test_shipped_configurations.py",
    "quickstart_word2vec": "test_word2vec.py",
}


REPORTED = ("Macros", "experiment.Experiment", "TRAIN_STEPS", "tables/", "in all", "tokens a step")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_dry_run(path, tmp_path, capsys):
    """What `lmscale.train --dry_run` does."""
    assert path.stem in tiny_families.TINY, "say in tiny_families.py how the configuration becomes small"
    config = tiny_families.load(path.stem, tmp_path)
    print(configuration.describe(config))
    dry_run.print_report(config.experiment, num_devices=2)
    report = capsys.readouterr().out
    assert [expected for expected in REPORTED if expected not in report] == []


def test_dry_run_as_a_command(tmp_path):
    flags = [f"--gin_param={binding}" for binding in tiny_families.bindings("quickstart_classes", tmp_path)]
    arguments = ["--gin_file=quickstart_classes.gin", "--dry_run", "--cpu_devices=2", *flags]
    code, stdout, stderr = tiny_runs.run_forked("lmscale.train", arguments, log=tmp_path / "log")
    assert code == 0, stderr
    assert [expected for expected in REPORTED if expected not in stdout] == []


@pytest.mark.parametrize("name", TRAINED_BY)
def test_it_is_trained_there(name):
    there = (Path(__file__).parent / TRAINED_BY[name]).read_text()
    assert f'"{name}"' in there or f"tiny_runs.{name.upper()}" in there


@pytest.mark.parametrize("name", [path.stem for path in CONFIGS if path.stem not in TRAINED_BY])
def test_two_steps_on_2_devices(name, mirrored, tmp_path):
    experiment = tiny_families.load(name, tmp_path, TRAIN_STEPS=2).experiment
    trainer = Trainer(experiment, data=open_prepared(experiment.data_dir), strategy=mirrored(2))
    start_from_elsewhere(experiment, trainer)
    steps = [trainer.train_steps() for _ in range(2)]
    losses, norms = (np.concatenate([step[tag] for step in steps]) for tag in ("loss", "gradient_norm"))
    assert losses.shape == norms.shape == (2,)
    assert np.isfinite(losses).all()
    assert (norms > 0).all()
    # Each device has rows of its own.
    for tag in [tag for tag in steps[0] if tag.startswith("rows_touched/")]:
        touched = np.asarray(steps[0][tag])
        assert touched.shape[-1] == 2
        assert (touched > 0).all()
