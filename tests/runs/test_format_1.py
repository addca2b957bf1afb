"""A checkpoint that version 0.1.0 wrote, in format 1, is resumed and evaluated: the numbers are those it gave itself.

Written on 2 devices at step 20 of 40, with `format_1/config.gin`; `resumed.gin` says the same in the names of today.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_runs

from lmscale import configuration
from lmscale.checkpoints import format_1
from lmscale.checkpoints.directory import Checkpoints
from lmscale.data.token_files import PreparedData
from lmscale.evaluation import Evaluator
from lmscale.trainer import Trainer

FOLDER = Path(__file__).parent / "format_1"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())
RTOL = 1e-5  # Another number of devices, another processor.


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    directory = tiny_runs.write_data(
        tmp_path_factory.mktemp("format_1") / "data",
        vocab_size=211,
        split_tokens={"train": 1507, "valid": 211, "test": 197},
        seed=7,
    )
    return PreparedData.open(directory)


@pytest.mark.parametrize("num_devices", [1, 2, 3])
def test_resumes_and_evaluates(data, mirrored, num_devices):
    config = configuration.load([str(FOLDER / "resumed.gin")], [f"DATA_DIR = {str(data.directory)!r}"])
    trainer = Trainer(config.experiment, data=data, strategy=mirrored(num_devices))
    checkpoints = Checkpoints(FOLDER / "checkpoints", readonly=True)
    parameters = trainer.parameters()
    names = format_1.names([p.path for p in parameters], trainer.task.layers)
    metadata = checkpoints.restore(parameters, format_1_names=names)
    assert metadata["step"] == 20
    assert metadata["data_fingerprint"] == data.fingerprint
    evaluator = Evaluator.of_experiment(config.experiment, trainer.model, strategy=trainer.strategy)
    test = evaluator.evaluate(trainer.task.evaluation_batches("test"))
    assert test.loss_nats == pytest.approx(EXPECTED["test_loss_nats_at_20"], rel=RTOL)
    trainer.step = metadata["step"]
    steps = [trainer.train_steps() for _ in EXPECTED["sampled_loss_nats"]]
    losses = np.concatenate([metrics["loss"] for metrics in steps])
    norms = np.concatenate([metrics["gradient_norm"] for metrics in steps])
    np.testing.assert_allclose(losses, EXPECTED["sampled_loss_nats"], rtol=RTOL)
    np.testing.assert_allclose(norms, EXPECTED["gradient_norm"], rtol=RTOL)
    valid = evaluator.evaluate(trainer.task.evaluation_batches("valid"))
    assert valid.loss_nats == pytest.approx(EXPECTED["valid_loss_nats"]["40"], rel=RTOL)
