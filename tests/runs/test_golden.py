"""The quickstart's first 50 steps give the numbers that were recorded once: nothing has changed by accident.

Recorded with the launch script's options on 1 and on 4 devices. Who changes the numbers on purpose records them anew,
and says so in the change log.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_runs

from lmscale import configuration
from lmscale.data import preparation, tokenizers
from lmscale.data.token_files import PreparedData
from lmscale.evaluation import Evaluator
from lmscale.trainer import Trainer

GOLDEN = json.loads((Path(__file__).parent / "golden" / "quickstart.json").read_text())
# Rounding differs between processors, and between numbers of devices by 2e-7 in the loss, 2e-6 in the norm.
RTOL = 1e-5


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    """The shipped book, prepared as the launch script does."""
    folder = tiny_runs.REPOSITORY / "data" / "tiny-austen"
    output = tmp_path_factory.mktemp("book") / "data"
    corpus = preparation.Corpus(
        {split: [str(folder / f"{split}.txt")] for split in ("train", "valid", "test")}
    )
    preparation.prepare(corpus, output=output, tokenizer=tokenizers.make_tokenizer("whitespace", options={}))
    return output


@pytest.mark.parametrize("num_devices", [1, 4])
def test_quickstart_gives_the_recorded_numbers(book, mirrored, num_devices):
    config = configuration.load([str(tiny_runs.QUICKSTART)], [f"DATA_DIR = {str(book)!r}"])
    trainer = Trainer(
        config.experiment,
        data=PreparedData.open(book),
        strategy=mirrored(num_devices),
    )
    expected = GOLDEN[str(num_devices)]
    steps = [trainer.train_steps() for _ in expected["sampled_loss_nats"]]
    losses = np.concatenate([metrics["loss"] for metrics in steps])
    norms = np.concatenate([metrics["gradient_norm"] for metrics in steps])
    np.testing.assert_allclose(losses, expected["sampled_loss_nats"], rtol=RTOL)
    np.testing.assert_allclose(norms, expected["gradient_norm"], rtol=RTOL)
    rows_touched = np.concatenate([metrics["rows_touched/words"] for metrics in steps])
    np.testing.assert_array_equal(rows_touched, expected["rows_touched"])
    evaluator = Evaluator.of_experiment(config.experiment, trainer.model, strategy=trainer.strategy)
    valid = evaluator.evaluate(trainer.task.evaluation_batches("valid"))
    assert valid.loss_nats == pytest.approx(expected["valid/exact_loss_nats"], rel=RTOL)
