"""One process of several: trains experiments, restores checkpoints and saves them again elsewhere.

Arguments: HOST:PORT of process 0, number of processes, rank, then a JSON list, done one after the other, of
{"config": path, "bindings": [...], "train": work directory, "convert": [[from, to], ...]}, or of
{"config": path, "bindings": [...], "steps": number, "checkpoints": folder, "begin": [folder, step] or None}, which
takes steps alone up to that number, from a checkpoint on if one is given, and leaves a checkpoint of each, and
losses.json.
"""

import json
import sys
from pathlib import Path

from lmscale.distribution.cluster import find_cluster
from lmscale.distribution.rendezvous import joined

coordinator, size, rank, text = sys.argv[1:]
todo = json.loads(text)
cluster = find_cluster({}, coordinator=coordinator, num_processes=int(size), process_id=int(rank))
with joined(cluster, silence_secs=120.0) as group:
    from lmscale import configuration
    from lmscale.checkpoints.directory import Checkpoints
    from lmscale.data.prepared import open_prepared
    from lmscale.data.token_files import PreparedData
    from lmscale.distribution.strategies import make_strategy
    from lmscale.run import train
    from lmscale.trainer import Trainer
    from lmscale.workdir import Workdir

    strategy = make_strategy(cpu_devices=1, group=group)
    for each in todo:
        config = configuration.load([each["config"]], each["bindings"])
        if "steps" in each:
            data = open_prepared(config.experiment.data_dir)
            trainer = Trainer(config.experiment, data=data, strategy=strategy)
            if each["begin"]:
                folder, step = each["begin"]
                begin = Checkpoints(folder, group=group, readonly=True)
                trainer.step = begin.restore(trainer.parameters(), step=step)["step"]
            checkpoints = Checkpoints(each["checkpoints"], group=group)
            losses = []
            while trainer.step < each["steps"]:
                losses.append(float(trainer.train_steps()["loss"][0]))
                checkpoints.save(trainer.step, trainer.parameters(), metadata={})
            if group.is_chief:
                Path(each["checkpoints"], "losses.json").write_text(json.dumps(losses))
            continue
        if each["train"]:
            with Workdir.of_group(each["train"], group) as workdir:
                train(
                    config.experiment,
                    workdir=workdir,
                    strategy=strategy,
                    config_text=config.text,
                    hparams={},
                    group=group,
                )
        for source, target in each["convert"]:
            data = PreparedData.open(config.experiment.data_dir)
            trainer = Trainer(config.experiment, data=data, strategy=strategy)
            # Blocks of 16 rows: many for each process, and a last one that some of them lack.
            options = {"block_mib": 16 * 8 * 4 / 2**20, "group": group}
            metadata = Checkpoints(source, readonly=True, **options).restore(trainer.parameters())
            step, loss = metadata.pop("step"), metadata.pop("validation_loss_nats")
            Checkpoints(target, **options).save(
                step, trainer.parameters(), metadata=metadata, validation_loss_nats=loss
            )
