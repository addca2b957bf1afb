"""The table of parameters that a run prints at its start, and a dry run before it."""

import dataclasses
import io
import math
from pathlib import Path

import tensorflow as tf
from rich.console import Console
from rich.table import Table

from lmscale.parameters import keras_layers
from lmscale.parameters.initializers import default_initializer, describe
from lmscale.tables.placement import Placement
from lmscale.tables.table import table_layout
from lmscale.tables.table_config import table_paths

_WIDTH = 140


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParameterLine:
    """What is told about one parameter, and about what its update rule keeps beside it.

    Attributes:
      path: its path.
      shape: logical shape.
      dtype: name of its type.
      initializer: what it starts from, as text.
      group: pattern of the group that says how it is updated; empty for what no group is asked about.
      trained: "yes", "no", or when: "from step 100"; empty likewise.
      sharded: whether each device holds a part of it.
      bytes_per_device: scratch and padding rows included.
      slot_bytes_per_device: of what the rule keeps.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    initializer: str
    group: str
    trained: str
    sharded: bool
    bytes_per_device: int
    slot_bytes_per_device: int

    @property
    def all_bytes_per_device(self):
        """Of the parameter and its slots."""
        return self.bytes_per_device + self.slot_bytes_per_device


def parameter_lines(task, layers, treatments, *, num_devices):
    """A line for each parameter, without making any of the tables.

    Args:
      task: `Task`.
      layers: `Layers` of the task.
      treatments: {path: `Treatment`}.
      num_devices: devices that share them.

    Returns:
      List of `ParameterLine`.
    """
    lines = []
    for path in table_paths(task.tables):
        _, table, parameter = path.split("/")
        config, vocab_size = task.tables[table], task.num_rows(table)
        placement = Placement(vocab_size=vocab_size, num_shards=num_devices)
        entry, *slots = table_layout(
            vocab_size=vocab_size,
            embed_dim=config.embed_dim,
            update_rules={parameter: treatments[path].update},
        )
        lines.append(
            ParameterLine(
                path=path,
                shape=(vocab_size, *entry.row_shape),
                dtype=entry.dtype.name,
                sharded=True,
                bytes_per_device=entry.bytes_on_shard(placement),
                slot_bytes_per_device=sum(slot.bytes_on_shard(placement) for slot in slots),
                **_told(treatments[path], _of_table(config, parameter), vectors=_vectors(config, parameter)),
            )
        )
    own = _layer_initializers(task.layers.values())
    for path, variable in layers.variables.items():
        treatment = treatments.get(path)
        dtype = tf.as_dtype(variable.dtype)
        size = math.prod(variable.shape)
        slots = treatment.update.slots if treatment and treatment.update else {}
        lines.append(
            ParameterLine(
                path=path,
                shape=tuple(variable.shape),
                dtype=dtype.name,
                sharded=False,
                bytes_per_device=size * dtype.size,
                slot_bytes_per_device=sum(
                    (size if slot.per_element else 1) * slot.dtype.size for slot in slots.values()
                ),
                **_told(treatment, own.get(id(variable), "")),
            )
        )
    return lines


def _told(treatment, initializer, *, vectors=""):
    if treatment is None:  # Not trained, by what the layer says.
        return {"initializer": initializer, "group": "", "trained": ""}
    active = repr(treatment.active)
    return {
        "initializer": vectors + (describe(treatment.initializer) if treatment.initializer else initializer),
        "group": treatment.group,
        "trained": {"always": "yes", "never": "no"}.get(active, active),
    }


def _vectors(config, parameter):
    if parameter == "bias" or config.pretrained is None:
        return ""
    return f"{Path(config.pretrained.path).name}, else "


def _of_table(config, parameter):
    if parameter == "bias":
        return {"zeros": "Zeros()", "log_frequency": "log frequency"}[config.bias]
    return describe(default_initializer(config.embed_dim))


def _layer_initializers(layers):
    """{id of a variable: text} of what layers say that their own variables start from."""
    found = {}
    for layer in keras_layers.flatten(layers):
        for attribute, value in vars(layer).items():
            # An LSTM's recurrent_kernel has a recurrent_initializer.
            name = attribute.lstrip("_")
            initializer = getattr(
                layer,
                f"{name}_initializer",
                getattr(layer, f"{name.removesuffix('_kernel')}_initializer", None),
            )
            if initializer is not None and hasattr(value, "trainable") and hasattr(value, "path"):
                text = type(initializer).__name__
                forget = " (forget gate 1)" if getattr(layer, "unit_forget_bias", False) else ""
                found[id(value)] = text + (forget if name == "bias" else "")
    return found


def as_table(lines):
    """The lines as a `rich.table.Table`, with the sums of the bytes."""
    table = Table(title="Parameters", title_justify="left", show_footer=True)
    for name, footer, justify in (
        ("path", "", "left"),
        ("shape", "", "right"),
        ("starts from", "", "left"),
        ("group", "", "left"),
        ("trained", "", "left"),
        ("each device has", "all", "left"),
        ("MiB", mib(sum(line.bytes_per_device for line in lines)), "right"),
        ("slots MiB", mib(sum(line.slot_bytes_per_device for line in lines)), "right"),
    ):
        # A path is there to be copied: in one piece.
        table.add_column(name, footer=footer, justify=justify, overflow="fold", no_wrap=name == "path")
    for line in lines:
        table.add_row(
            line.path,
            " x ".join(f"{n:,}" for n in line.shape) or "scalar",
            line.initializer,
            line.group,
            line.trained,
            "1/N of it" if line.sharded else "a copy",
            mib(line.bytes_per_device),
            mib(line.slot_bytes_per_device) if line.slot_bytes_per_device else "",
        )
    return table


def as_text(table):
    """A `rich.table.Table` as plain text, of the width that its longest lines need."""
    text = io.StringIO()
    Console(file=text, width=_WIDTH).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def mib(num_bytes):
    """`1,234.56`."""
    return f"{num_bytes / 2**20:,.2f}"
