"""What a dry run reports of the table is what a table then holds; each loss has an estimate of its own."""

import functools
import re

import pytest
import tiny_runs

from lmscale import dry_run
from lmscale.bodies.lstm import lstm_body
from lmscale.experiment import Experiment
from lmscale.parameters.update_rules import SGD, Adagrad
from lmscale.softmax.full import FullSoftmax
from lmscale.softmax.sampled import SampledSoftmax
from lmscale.softmax.samplers import LogUniformSampler
from lmscale.tables.table import ShardedTable

EMBED_DIM = 40


@pytest.mark.parametrize(
    "loss",
    [
        FullSoftmax,
        functools.partial(SampledSoftmax, sampler=functools.partial(LogUniformSampler, num_sampled=64)),
    ],
    ids=["full", "sampled"],
)
def test_memory_of_a_device(data_dir, mirrored, capsys, loss):
    experiment = Experiment(
        data_dir=str(data_dir),
        train_steps=1,
        global_batch_size=6,
        window=5,
        embed_dim=EMBED_DIM,
        body=functools.partial(lstm_body, num_layers=1, hidden_dim=EMBED_DIM),
        loss=loss,
        row_optimizer=Adagrad(learning_rate=0.1),
        body_optimizer=SGD(learning_rate=0.1),
        seed=1,
        log_every=1,
        eval_every=1,
        save_every=1,
    )
    dry_run.print_report(experiment, num_devices=3)
    text = capsys.readouterr().out

    def mib(words):
        return float(re.search(rf"{words}[^|│]*[|│]\s*([\d.,]+) MiB", text)[1].replace(",", ""))

    strategy = mirrored(3)
    with strategy.scope():
        table = ShardedTable(
            vocab_size=tiny_runs.VOCAB_SIZE, embed_dim=EMBED_DIM, optimizer=Adagrad(learning_rate=0.1)
        )
    shards = [strategy.experimental_local_results(v)[0].numpy().nbytes for v in table.variables().values()]
    assert mib("table and its slots") == pytest.approx(sum(shards) / 2**20, abs=0.006)
    # Of the full softmax every row has a gradient, of which there are two copies for a moment.
    rows = 6 * 6 + (table.placement.allocated_rows if loss is FullSoftmax else 64)
    assert mib("rows pulled") == pytest.approx(2 * rows * (EMBED_DIM + 1) * 4 / 2**20, abs=0.006)
