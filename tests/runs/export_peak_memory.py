"""Peak memory of an export above its table: python tests/runs/export_peak_memory.py ROWS DIM FOLDER [int8]

Prints a line of JSON: the size of the table, the peak above what the process had before and above the table, that of
saved_model.pb, and seconds. Each part in a process of its own.
"""

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

GIN = """
from __gin__ import dynamic_registration
from keras import layers
from lmscale import experiment
from lmscale.bodies import body
from lmscale.parameters import groups
from lmscale.parameters import update_rules
from lmscale.softmax import full
from lmscale.tables import table_config
from lmscale.tasks import next_token
experiment.Experiment.data_dir = '{data}'
experiment.Experiment.task = @next_token.NextToken
next_token.NextToken.tables = {{'words': @table_config.TableConfig()}}
next_token.NextToken.inputs = 'words'
next_token.NextToken.outputs = 'words'
next_token.NextToken.body = @body.keras_body
body.keras_body.layer = @layers.Identity
next_token.NextToken.head = @full.FullSoftmax
next_token.NextToken.window = 8
next_token.NextToken.eval_window = 8
table_config.TableConfig.embed_dim = {dim}
experiment.Experiment.groups = [@groups.Group()]
groups.Group.pattern = '.*'
groups.Group.update = @update_rules.SGD()
update_rules.SGD.learning_rate = 0.1
experiment.Experiment.train_steps = 1
experiment.Experiment.global_batch_size = 4
experiment.Experiment.seed = 1
experiment.Experiment.log_every = 1
experiment.Experiment.eval_every = 1
experiment.Experiment.save_every = 1
"""


def write(folder, rows, dim):
    """Prepared data of so many words, and a checkpoint of a table with a row for each."""
    from lmscale.checkpoints.directory import Checkpoints
    from lmscale.data.prepared_directory import PreparedDirectoryWriter
    from lmscale.parameters.tree import Parameter

    words = b"".join(
        b"<eos>\t9\n" if i == 0 else b"<unk>\t9\n" if i == 1 else b"w%d\t1\n" % i for i in range(rows)
    )
    with PreparedDirectoryWriter(folder / "data") as writer:
        splits = {}
        for name in ("train", "valid", "test"):
            with writer.token_file(name, vocab_size=rows) as file:
                file.append(np.arange(1000) % rows)
            splits[name] = {**file.entry(), "tokens": 1000}
        vocabulary = writer.write_file("vocab.txt", words) | {"size": rows, "eos_id": 0, "unk_id": 1}
        writer.finish({"vocabulary": vocabulary, "splits": splits, "tokenizer_files": []})

    def read(start, stop, width=dim):
        values = np.random.default_rng(start).standard_normal([stop - start, width], np.float32)
        return values if width > 1 else values[:, 0]

    parameters = [
        Parameter(
            path=f"tables/words/{name}",
            shape=(rows, dim) if name == "embedding" else (rows,),
            dtype=np.float32,
            sharded=True,
            trainable=True,
            read=lambda start, stop, width=width: read(start, stop, width),
            write=None,
            scatter=None,
        )
        for name, width in (("embedding", dim), ("bias", 1))
    ]
    Checkpoints(folder / "run" / "checkpoints").save(1, parameters, metadata={"step": 1})
    (folder / "run" / "config.gin").write_text(GIN.format(data=folder / "data", dim=dim))


def measure(folder, rows, dim, int8):
    """The report."""
    import tensorflow as tf

    from lmscale import configuration
    from lmscale.serving.export import ExportSettings, export, open_run
    from lmscale.workdir import Workdir

    # What the first function and the first SavedModel make TensorFlow load.
    module = tf.Module()
    module.x = tf.Variable(1.0)
    module.f = tf.function(lambda: module.x + 1, input_signature=[])
    tf.saved_model.save(module, str(folder / "warm"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    start = time.perf_counter()
    with Workdir(folder / "run", readonly=True) as workdir:
        export(
            configuration.load([str(workdir.config_path)]).experiment,
            saved=open_run(workdir, "latest"),
            output=folder / "served",
            settings=ExportSettings(int8=int8, batch_size=2),
        )
    secs = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before
    table = rows * ((dim + 4 if int8 else 4 * dim) + 4) / 2**20
    return {
        "table_mib": table,
        "peak_above_table_mib": peak - table,
        "saved_model_pb_kib": (folder / "served" / "saved_model.pb").stat().st_size / 1024,
        "secs": secs,
    }


def main(rows, dim, folder, *options):
    """Writes what is exported, and exports it."""
    folder = Path(folder)
    if options[:1] == ("write",):
        write(folder, int(rows), int(dim))
    elif options[:1] == ("measure",):
        print(json.dumps(measure(folder, int(rows), int(dim), "int8" in options)))
    else:
        root = Path(__file__).parents[2]
        for part in ("write", "measure"):
            subprocess.run(
                [sys.executable, __file__, rows, dim, str(folder), part, *options],
                check=True,
                env=os.environ | {"PYTHONPATH": str(root), "CUDA_VISIBLE_DEVICES": ""},
            )


if __name__ == "__main__":
    main(*sys.argv[1:])
