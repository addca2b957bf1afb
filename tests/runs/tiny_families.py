"""Every shipped configuration at tiny sizes: the data that it reads, and the settings that make it small."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tiny_runs
from array_parameters import array_parameters

from lmscale import configuration
from lmscale.benchmarks import planted
from lmscale.checkpoints.directory import Checkpoints
from lmscale.data.histories import LeaveLastOut, prepare_histories
from lmscale.data.schema import read_schema
from lmscale.data.table_preparation import prepare_table

CONFIGS = tiny_runs.REPOSITORY / "configs"


def text(folder):
    return tiny_runs.write_data(folder / "data", vocab_size=211)


def table(folder):
    planted.write_classes(folder, features=3, values=11, groups=3, signal=0.8, examples=150, seed=1)
    schema = json.loads((folder / "schema.json").read_text())
    schema["columns"]["feature_2"]["buckets"] = 7
    (folder / "schema.json").write_text(json.dumps(schema))
    files = {split: [folder / f"{split}.csv"] for split in ("train", "valid", "test")}
    prepare_table(files, schema=read_schema(folder / "schema.json"), output=folder / "data")
    return folder / "data"


def histories(folder):
    planted.write_histories(folder / "histories.txt", users=40, items=23, signal=0.8, seed=1)
    prepare_histories([folder / "histories.txt"], output=folder / "data", rule=LeaveLastOut())
    return folder / "data"


def vectors(folder):
    """A file of vectors for some of the words of `text`."""
    numbers = np.random.default_rng(0).normal(size=[50, tiny_runs.TINY_MACROS["EMBED_DIM"]])
    lines = [f"word{i + 2} {' '.join(map(str, row))}\n" for i, row in enumerate(numbers)]
    (folder / "vectors.txt").write_text("".join(lines))
    return folder / "vectors.txt"


def layers_of_a_run(folder):
    """A work directory with one checkpoint, of the layers of a model with two LSTMs."""
    embed_dim, hidden_dim = (tiny_runs.TINY_MACROS[name] for name in ("EMBED_DIM", "HIDDEN_DIM"))
    shapes = {
        f"layers/lstm_{i}/{name}": shape
        for i, width in enumerate((embed_dim, hidden_dim))
        for name, shape in {
            "kernel": (width, 4 * hidden_dim),
            "recurrent_kernel": (hidden_dim, 4 * hidden_dim),
            "bias": (4 * hidden_dim,),
        }.items()
    } | {"layers/projection/kernel": (hidden_dim, embed_dim)}
    saved = array_parameters({path: np.ones(shape, np.float32) for path, shape in shapes.items()})
    Checkpoints(folder / "source" / "checkpoints").save(1, saved, metadata={})
    return folder / "source"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiny:
    """How a configuration becomes small.

    Attributes:
      data: writes its data into a folder, and returns the prepared directory.
      settings: {setting: value}.
      files: {macro: function that writes into a folder what the macro shall name, and returns its path}.
    """

    data: Callable[[Path], Path] = text
    settings: dict = dataclasses.field(default_factory=dict)
    files: dict = dataclasses.field(default_factory=dict)


LANGUAGE_MODEL = tiny_runs.TINY_MACROS
TRANSFORMER = LANGUAGE_MODEL | {"HIDDEN_DIM": LANGUAGE_MODEL["EMBED_DIM"], "NUM_HEADS": 2}
BOTH_DIRECTIONS = {
    name.replace("next_token.NextToken", "both_directions.BothDirections"): value
    for name, value in LANGUAGE_MODEL.items()
}
WORD2VEC = {
    "TRAIN_STEPS": 4,
    "GLOBAL_BATCH_SIZE": 12,
    "EMBED_DIM": 7,
    "NUM_SAMPLED": 33,
    "EVAL_EVERY": 2,
    "SAVE_EVERY": 2,
    "LOG_EVERY": 1,
    "experiment.Experiment.steps_per_call": 2,
    "experiment.Experiment.probe_tokens": 301,
    "experiment.Experiment.eval_batch_size": 5,
    "experiment.Experiment.eval_tokens": None,
}
# The examples of each of one, two or four devices fall into three groups.
NOISE_GROUPS = {
    "negative_sampling.NegativeSampling.noise_groups": 3,
    "experiment.Experiment.eval_batch_size": 12,
}
EXAMPLES = {
    "LOG_EVERY": 1,
    "EVAL_EVERY": 4,
    "SAVE_EVERY": 2,
    "TRAIN_STEPS": 4,
    "GLOBAL_BATCH_SIZE": 12,
    "NUM_SAMPLED": 11,
}
TINY = {
    "beauty_sasrec": Tiny(
        data=histories,
        settings=EXAMPLES
        | {"WINDOW": 5, "EMBED_DIM": 8, "HIDDEN_DIM": 8, "experiment.Experiment.eval_tokens": None},
    ),
    "book_from_wikitext2": Tiny(settings=LANGUAGE_MODEL, files={"SOURCE": layers_of_a_run}),
    "eltec_hun_lstm": Tiny(settings=LANGUAGE_MODEL),
    "quickstart": Tiny(settings=LANGUAGE_MODEL),
    "quickstart_both_directions": Tiny(settings=BOTH_DIRECTIONS),
    "quickstart_cbow": Tiny(settings=WORD2VEC),
    "quickstart_classes": Tiny(data=table, settings=EXAMPLES),
    "quickstart_gru": Tiny(settings=LANGUAGE_MODEL),
    "quickstart_last_words": Tiny(
        settings=EXAMPLES | {"experiment.Experiment.eval_batch_size": 50, "NUM_SAMPLED": 33}
    ),
    "quickstart_lstmp": Tiny(settings=LANGUAGE_MODEL),
    "quickstart_next_item": Tiny(data=histories, settings=EXAMPLES | {"WINDOW": 5}),
    "quickstart_transformer": Tiny(settings=TRANSFORMER),
    "quickstart_untied": Tiny(settings=LANGUAGE_MODEL),
    "quickstart_word2vec": Tiny(settings=WORD2VEC | NOISE_GROUPS),
    "wikitext2_fast": Tiny(settings=LANGUAGE_MODEL),
    "wikitext2_glove": Tiny(settings=LANGUAGE_MODEL, files={"VECTORS": vectors}),
    "wikitext2_lstm": Tiny(settings=LANGUAGE_MODEL),
    "wikitext2_transformer": Tiny(settings=TRANSFORMER),
    "wikitext2_word2vec": Tiny(settings=WORD2VEC | NOISE_GROUPS),
}


def bindings(name, folder, **changes):
    """`NAME = value` of each setting that makes the configuration `name` small.

    Args:
      name: of a configuration.
      folder: where its data are written, and the files that it reads.
      changes: settings with other values; what they give is not written.
    """
    tiny = TINY[name]
    files = {"DATA_DIR": tiny.data} | tiny.files
    written = {macro: str(write(folder)) for macro, write in files.items() if macro not in changes}
    settings = written | tiny.settings | changes
    return [f"{setting} = {value!r}" for setting, value in settings.items()]


def load(name, folder, **changes):
    """The configuration `name`, small, with its data in `folder`."""
    return configuration.load([str(CONFIGS / f"{name}.gin")], bindings(name, folder, **changes))
