"""The table of parameters against what a model really holds."""

import functools
import io

import keras
import numpy as np
import pytest
import tiny_experiments
from rich.console import Console
from tiny_experiments import Text, language_model, tied, untied

from lmscale.assembly import make_task
from lmscale.bodies.lstm import lstm_body
from lmscale.parameters.activity import Every, From, Never
from lmscale.parameters.groups import Group, treat
from lmscale.parameters.layers import Layers
from lmscale.parameters.pretrained import PretrainedVectors
from lmscale.parameters.report import as_table, mib, parameter_lines
from lmscale.parameters.update_rules import SGD, Adagrad, Adam, RowWiseAdagrad
from lmscale.tables.table_config import TableConfig, table_paths
from lmscale.trainer import Trainer

VOCAB_SIZE = 103
TABLES = {"tied": tied(embed_dim=7, bias="log_frequency"), "untied": untied(input_dim=3, output_dim=5)}
GROUPS = {
    "one_rule": [Group(pattern=".*", update=Adam(learning_rate=0.1))],
    "many": [
        Group(
            pattern="layers/lstm_0/.*kernel",
            update=RowWiseAdagrad(learning_rate=0.1),
            initializer=keras.initializers.RandomNormal(stddev=0.3),
        ),
        Group(pattern="layers/lstm_1/.*", active=Never()),
        Group(pattern="layers/.*", update=Adam(learning_rate=0.1), active=From(step=1200)),
        Group(pattern="tables/.*/embedding", update=Adagrad(learning_rate=0.1), active=Every(period=3)),
        Group(pattern="tables/.*", update=SGD(learning_rate=0.1)),
    ],
}


def build(strategy, tables, groups):
    """(`Trainer`, its lines)."""
    task = language_model(body=functools.partial(lstm_body, num_layers=2, hidden_dim=4), **TABLES[tables])
    run = Trainer(
        tiny_experiments.experiment(task=task, groups=GROUPS[groups], global_batch_size=24),
        data=Text(vocab_size=VOCAB_SIZE),
        strategy=strategy,
    )
    model = run.model
    lines = parameter_lines(
        run.task,
        model.layers,
        model.treatments,
        num_devices=strategy.num_replicas_in_sync,
    )
    return run, {line.path: line for line in lines}


@pytest.mark.parametrize("num_devices", [1, 3, 8])
@pytest.mark.parametrize("tables", TABLES)
@pytest.mark.parametrize("groups", GROUPS)
def test_bytes_are_those_that_a_device_holds(mirrored, num_devices, tables, groups):
    run, lines = build(mirrored(num_devices), tables, groups)
    model, strategy = run.model, run.strategy

    def held(variable):
        """Of each device the same, scratch and padding rows included."""
        sizes = {c.numpy().nbytes for c in strategy.experimental_local_results(variable)}
        (size,) = sizes
        return size

    variables, slots = {}, {}
    for name, table in model.tables.items():
        for parameter, variable in table.parameters.items():
            path = f"tables/{name}/{parameter}"
            variables[path] = held(variable)
            slots[path] = sum(held(slot) for slot in table.slots[parameter].values())
    for path, variable in model.layers.variables.items():
        variables[path] = held(variable.value)
        slots[path] = sum(held(slot) for slot in model.layer_slots.get(path, {}).values())
    assert {path: line.bytes_per_device for path, line in lines.items()} == variables
    assert {path: line.slot_bytes_per_device for path, line in lines.items()} == slots
    assert sum(line.all_bytes_per_device for line in lines.values()) == sum(variables.values()) + sum(
        slots.values()
    )
    # No parameter is left out, and each has its shape and type.
    saved = {p.path: p for p in model.parameters() if not p.path.startswith("slots/")}
    assert lines.keys() == saved.keys()
    for path, line in lines.items():
        assert (line.shape, np.dtype(line.dtype)) == (saved[path].shape, saved[path].dtype), path
        assert line.sharded == saved[path].sharded


def test_lines_say_what_groups_say(mirrored):
    _, lines = build(mirrored(2), "untied", "many")
    told = {path: (line.initializer, line.group, line.trained) for path, line in lines.items()}
    layers, embeddings, tables = "layers/.*", "tables/.*/embedding", "tables/.*"
    normal = "RandomNormal(mean=0.0, stddev=0.3)"
    turns, later = "1 of 3 steps, from 0", "from step 1,200"
    for path, (initializer, group, trained) in {
        "tables/outputs/bias": ("Zeros()", tables, "yes"),
        "layers/lstm_0/kernel": (normal, "layers/lstm_0/.*kernel", later),
        "layers/lstm_0/recurrent_kernel": (normal, "layers/lstm_0/.*kernel", later),
        "layers/lstm_0/bias": ("Zeros (forget gate 1)", layers, later),
        "layers/lstm_1/kernel": ("GlorotUniform", "layers/lstm_1/.*", "no"),
        "layers/lstm_1/recurrent_kernel": ("Orthogonal", "layers/lstm_1/.*", "no"),
        "layers/projection/kernel": ("GlorotUniform", layers, later),
    }.items():
        assert told[path] == (initializer, group, trained), path
    for name in ("inputs", "outputs"):
        assert told[f"tables/{name}/embedding"][1:] == (embeddings, turns)


def test_the_table_shows_every_line_and_the_sums(mirrored):
    _, lines = build(mirrored(3), "tied", "many")
    console = Console(width=240, file=io.StringIO(), no_color=True)
    console.print(as_table(list(lines.values())))
    text = console.file.getvalue()
    rows = [
        [cell.strip() for cell in row.strip("│┃ ").replace("┃", "│").split("│")] for row in text.splitlines()
    ]
    by_path = {row[0]: row for row in rows}
    for path, line in lines.items():
        row = by_path[path]
        assert row[1] == (" x ".join(f"{n:,}" for n in line.shape) or "scalar")
        assert row[2:5] == [line.initializer, line.group, line.trained]
        assert row[5] == ("1/N of it" if path.startswith("tables/") else "a copy")
    total = mib(sum(line.bytes_per_device for line in lines.values()))
    slots = mib(sum(line.slot_bytes_per_device for line in lines.values()))
    assert any(row[-3:] == ["all", total, slots] for row in rows)


def test_mib():
    assert mib(1_536 * 2**20 + 5243) == "1,536.01"


def test_vectors_are_named_where_rows_start_from_them():
    body = functools.partial(lstm_body, num_layers=1, hidden_dim=4)
    starts = []
    for pretrained in (None, PretrainedVectors(path="folder/words.vec")):
        tables = {"words": TableConfig(embed_dim=7, bias="log_frequency", pretrained=pretrained)}
        experiment = tiny_experiments.experiment(
            task=language_model(body=body, tables=tables), groups=GROUPS["one_rule"]
        )
        task = make_task(experiment, data=Text(vocab_size=VOCAB_SIZE), num_replicas=1)
        layers = Layers(task.layers, num_replicas=1)
        treatments = treat(experiment.groups, [*table_paths(task.tables), *layers.trainable_variables])
        lines = parameter_lines(task, layers, treatments, num_devices=1)
        starts.append({line.path: line.initializer for line in lines})
    plain, with_vectors = starts
    path = "tables/words/embedding"
    assert with_vectors.pop(path) == f"words.vec, else {plain.pop(path)}"
    assert plain == with_vectors
