"""One process of several: trains an experiment, then restores checkpoints and saves them again elsewhere.

Arguments: HOST:PORT of process 0, number of processes, rank, then a JSON object
{"config": path, "bindings": [...], "train": work directory, "convert": [[from, to], ...]}.
"""

import json
import sys

from lmscale.distribution.cluster import find_cluster
from lmscale.distribution.rendezvous import joined

coordinator, size, rank, text = sys.argv[1:]
todo = json.loads(text)
cluster = find_cluster({}, coordinator=coordinator, num_processes=int(size), process_id=int(rank))
with joined(cluster, silence_secs=120.0) as group:
    from lmscale import configuration
    from lmscale.checkpoints.directory import Checkpoints
    from lmscale.data.token_files import PreparedData
    from lmscale.distribution.strategies import make_strategy
    from lmscale.run import train
    from lmscale.trainer import Trainer
    from lmscale.workdir import Workdir

    config = configuration.load([todo["config"]], todo["bindings"])
    strategy = make_strategy(cpu_devices=1, group=group)
    if todo["train"]:
        with Workdir.of_group(todo["train"], group) as workdir:
            train(
                config.experiment,
                workdir=workdir,
                strategy=strategy,
                config_text=config.text,
                hparams={},
                group=group,
            )
    data = PreparedData.open(config.experiment.data_dir)
    for source, target in todo["convert"]:
        trainer = Trainer(config.experiment, data=data, strategy=strategy)
        # Blocks of 16 rows: many for each process, and a last one that some of them lack.
        options = {"block_mib": 16 * 8 * 4 / 2**20, "group": group}
        metadata = Checkpoints(source, readonly=True, **options).restore(trainer.parameters())
        step, loss = metadata.pop("step"), metadata.pop("validation_loss_nats")
        Checkpoints(target, **options).save(
            step, trainer.parameters(), metadata=metadata, validation_loss_nats=loss
        )
