"""The last words of a text as features: what a batch holds, place by place."""

import functools

import numpy as np
import pytest
import tiny_experiments

from lmscale.assembly import make_task
from lmscale.softmax.full import FullSoftmax
from lmscale.tables.table_config import TableConfig
from lmscale.tasks.last_words import LastWords
from lmscale.trainer import Trainer

EOS = 2


class Text(tiny_experiments.Text):
    manifest = None


def experiment(**changes):
    settings = {
        "tables": {"words": TableConfig(embed_dim=4)},
        "inputs": "words",
        "outputs": "words",
        "head": FullSoftmax,
        "num_words": 3,
        "shared_dim": 5,
        "hidden_dims": [7],
    }
    task = functools.partial(LastWords, **(settings | changes))
    return tiny_experiments.experiment(task=task, global_batch_size=12, eval_batch_size=10)


def test_every_place_is_predicted_from_those_before_it():
    text = Text(eos_id=EOS)
    task = make_task(experiment(), data=text, num_replicas=1)
    padded = np.concatenate([[EOS] * 3, text.ids])
    places = []
    batches = task.evaluation_batches("valid")
    for step in range(batches.num_steps):
        features = batches.at(step).features
        for i in np.flatnonzero(features["weights"]):
            place = len(places)
            places.append(features["next"][i])
            assert [features[f"word_{k}"][i] for k in (3, 2, 1)] == padded[place : place + 3].tolist()
    assert places == text.ids.tolist()
    assert {lookup.table for lookup in task.lookups(batches.at(0).features).values()} == {"words"}
    assert set(task.layers) == {"shared", "hidden_0", "to_next"}


@pytest.mark.parametrize("num_devices", [1, 3])
def test_it_learns_what_the_last_words_tell(mirrored, num_devices):
    """A text in which three words decide the next one, so that a loss near zero can be reached."""
    ids = np.tile(np.random.default_rng(0).permutation(11), 40)
    run = Trainer(experiment(), data=Text(vocab_size=11, ids=ids, eos_id=EOS), strategy=mirrored(num_devices))
    losses = [float(run.train_steps()["loss"][0]) for _ in range(120)]
    assert losses[0] > 2
    assert np.mean(losses[-5:]) < 0.2


def test_refused():
    with pytest.raises(ValueError, match="num_words must be at least 1"):
        make_task(experiment(num_words=0), data=Text(eos_id=EOS), num_replicas=1)
