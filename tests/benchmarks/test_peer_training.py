"""The training of PyTorch's side goes on exactly where it was cut off."""

import numpy as np
import pytest

from lmscale.benchmarks import peer_training
from lmscale.data.preparation import Corpus, prepare
from lmscale.data.tokenizers import make_tokenizer

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install 'lmscale[bench]'")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    for split, lines in (("train", 40), ("valid", 10), ("test", 10)):
        words = np.minimum(rng.geometric(0.2, size=[lines, 9]), 20)
        (folder / split).write_text("\n".join(" ".join(f"w{w}" for w in line) for line in words) + "\n")
    corpus = Corpus({split: [str(folder / split)] for split in ("train", "valid", "test")})
    prepare(corpus, output=folder / "data", tokenizer=make_tokenizer("whitespace", options={}))
    return folder / "data"


@pytest.fixture
def train(data_dir, tmp_path):
    """train(name, epochs): the losses, by epoch, and the state of the training in folder `name`."""

    def run(name, *, epochs):
        done = peer_training.train(
            data_dir=data_dir,
            output=tmp_path / name,
            epochs=epochs,
            dim=8,
            batch_size=4,
            window=5,
            dropout=0.5,
        )
        assert [epoch["epoch"] for epoch in done] == list(range(1, epochs + 1))
        return [epoch["valid_loss_nats"] for epoch in done], torch.load(tmp_path / name / "state")

    return run


def test_epochs_one_by_one_equal_epochs_at_once_bit_for_bit(train, tmp_path):
    whole_losses, whole = train("whole", epochs=2)
    train("parts", epochs=1)
    log = tmp_path / "parts" / "epochs.jsonl"
    log.unlink()  # Killed after the state was written, and before the log was.
    losses, state = train("parts", epochs=2)
    assert losses == whole_losses
    assert state["learning_rate"] == whole["learning_rate"]
    assert state["best"] == whole["best"]
    torch.testing.assert_close(state["model"], whole["model"], rtol=0, atol=0)
    torch.testing.assert_close(state["rng_state"], whole["rng_state"], rtol=0, atol=0)
    assert len(log.read_text().splitlines()) == 2


def test_the_log_is_that_of_the_state(train, tmp_path):
    losses, _ = train("out", epochs=1)
    log = tmp_path / "out" / "epochs.jsonl"
    written = log.read_text()
    log.unlink()
    assert train("out", epochs=1)[0] == losses
    assert log.read_text() == written
