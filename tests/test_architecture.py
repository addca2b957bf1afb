"""Imports point down: from commands to the run, the step, tasks, and what these are made of; and never in a circle."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lmscale"

# From top to bottom. A module may import those of layers below its own, and those of its own layer.
LAYERS = [
    {
        "train",
        "evaluate",
        "prepare",
        "bench",
        "plot",
        "plan",
        "score",
        "generate",
        "neighbors",
        "recommend",
        "export",
        "word_vectors",
    },
    {"run_flags"},
    {"workdir_flags"},
    {"machine_flags"},
    {"benchmarks"},
    {"run", "dry_run", "follow", "serving"},
    {"reports", "planning"},
    {"scoring"},
    {"evaluation", "generation", "nearest", "recommendation", "start"},
    {"trainer", "restored"},
    {"configuration", "assembly", "micro_batches"},
    {"gin_text", "experiment", "model", "communication"},
    {"reading"},
    {"tasks", "measures", "parameters.warm_start", "parameters.report", "loss_scaling", "carried_state"},
    {"word_rows"},
    {"checkpoints", "bodies", "softmax"},
    {"tables", "parameters"},
    {"data", "distribution", "metrics", "hparams_tab", "event_files", "profiling", "projector"},
    {
        "command_line",
        "sampling",
        "user_errors",
        "workdir",
        "storage",
        "stop_signals",
        "quiet_start",
        "factories",
        "doing",
        "paths",
        "keras_settings",
        "analogies",
        "word_similarity",
    },
]


def modules():
    """{name below lmscale: path}."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path, names):
    """Modules of the package that a file imports, anywhere in it, but for what only a type checker reads."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "lmscale":
            module = node.module.partition(".")[2]
            for alias in node.names:
                whole = f"{module}.{alias.name}".strip(".")
                found.add(whole if whole in names else module)
        elif isinstance(node, ast.Import):
            found |= {
                alias.name.partition(".")[2] for alias in node.names if alias.name.startswith("lmscale.")
            }
    return found - {""}


def layer_of(name):
    """Number of a module's layer: of the longest name that the layers have of it."""
    known = {entry: number for number, layer in enumerate(LAYERS) for entry in layer}
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        if (entry := ".".join(parts[:length])) in known:
            return known[entry]
    raise AssertionError(f"{name} is in no layer: give it one")


MODULES = modules()
GRAPH = {name: imports(path, MODULES) for name, path in MODULES.items() if name}


@pytest.mark.parametrize("name", sorted(GRAPH))
def test_imports_point_down(name):
    above = {other for other in GRAPH[name] if layer_of(other) < layer_of(name)}
    assert not above, f"{name} imports {sorted(above)}, of layers above its own"


def test_no_circles():
    done = set()

    def visit(name, path):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for other in sorted(GRAPH[name]):
                visit(other, [*path, name])
            done.add(name)

    for name in sorted(GRAPH):
        visit(name, [])


def test_a_task_knows_neither_devices_nor_collectives_nor_optimizers():
    forbidden = {"distribution.collectives", "trainer", "model", "parameters.update_rules"}
    for name, imported in GRAPH.items():
        if name.startswith("tasks."):
            assert not imported & forbidden, name
