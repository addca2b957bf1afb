"""Memory that a run takes of each device, by part, from its configuration: no table is made, and no step is taken.

What lasts (rows, layers, their slots, the carried state) is exact. What a step takes beside it is an estimate, made of
phases that follow each other: rows are pulled; body and heads compute, forward and back (`computation.py`); gradients
go home; rows and layers are updated. The memory of a step is that of the phase that takes most. An evaluation is
another such phase.

Phases and parts are those of a device that is alone with its memory, as devices are, but for the logical devices of a
CPU, whose phases may fall together or not.
"""

import collections
import dataclasses

import numpy as np

from lmscale.distribution.strategies import runs_on_cpu
from lmscale.planning import messages

FLOAT_BYTES = ID_BYTES = 4

# Parts of what lasts, and of what comes and goes, in the order in which they are told.
LASTING = {
    "table_rows": "rows of the tables, 1/N of them",
    "table_slots": "slots of the rows",
    "layers": "layers, a copy on each",
    "layer_slots": "slots of the layers",
    "state": "carried state of the body",
    "batch": "batch and ids",
}
PASSING = {
    "rows": "rows pulled for a step, and their gradients",
    "body": "activations of the body",
    "head": "logits of the heads",
    "exchange": "buffers of the exchange",
    "messages": "messages between processes",
    "update": "what an update makes of rows and layers",
    "evaluation": "blocks of the exact evaluation",
}
PHASES = ("pull", "compute", "push", "update", "evaluate")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceMemory:
    """Bytes on each device.

    Attributes:
      lasting: {part of `LASTING`: bytes}.
      phases: {phase: {part of `PASSING`: bytes}}, what each takes beside `lasting` when it takes most.
      most_of_parts: {part of `PASSING`: bytes} that a part ever takes, of those that are gone through by operation.
    """

    lasting: dict[str, int]
    phases: dict[str, dict[str, int]]
    most_of_parts: dict[str, int]

    @property
    def lasting_bytes(self):
        return sum(self.lasting.values())

    def phase_bytes(self, phase):
        """Of what a phase takes beside what lasts."""
        return sum(self.phases[phase].values())

    @property
    def largest_of_step(self):
        """The phase of a step that takes most."""
        return max((phase for phase in self.phases if phase != "evaluate"), key=self.phase_bytes)

    @property
    def step_bytes(self):
        """Of all while a step takes most."""
        return self.lasting_bytes + self.phase_bytes(self.largest_of_step)

    @property
    def evaluation_bytes(self):
        """Of all while an evaluation inside the run takes most."""
        return self.lasting_bytes + self.phase_bytes("evaluate")

    @property
    def peak_bytes(self):
        """The most that a run takes."""
        return max(self.step_bytes, self.evaluation_bytes)

    def most_of_part(self, part):
        """The most bytes that a part ever takes."""
        return max(self.most_of_parts.get(part, 0), *(of.get(part, 0) for of in self.phases.values()))


def device_memory(step):
    """`DeviceMemory` of a `Step` and of the evaluations beside it."""
    costs = (step.training_cost, step.evaluation_cost)
    parts = {part for cost in costs for part in cost.most_bytes}
    return DeviceMemory(
        lasting=_lasting(step),
        phases=_phases(step),
        most_of_parts={part: max(cost.most_bytes.get(part, 0) for cost in costs) for part in parts},
    )


def _lasting(step):
    """{part: bytes}."""
    per_device = step.experiment.global_batch_size // step.num_devices
    ids = sum(use.num_own + use.num_shared for use in step.table_uses.values())
    batch = sum(x.nbytes for x in step.features.values()) * step.experiment.steps_per_call
    return {
        "table_rows": sum(line.bytes_per_device for line in step.lines if line.sharded),
        "table_slots": sum(line.slot_bytes_per_device for line in step.lines if line.sharded),
        "layers": sum(line.bytes_per_device for line in step.lines if not line.sharded),
        "layer_slots": sum(line.slot_bytes_per_device for line in step.lines if not line.sharded),
        "state": sum(_bytes(x) for x in step.task.initial_state(per_device)),
        "batch": batch + ID_BYTES * ids,
    }


def _phases(step):
    """{phase: {part: bytes}}."""
    training, evaluation = step.training_cost.peak_bytes, step.evaluation_cost.peak_bytes
    uses = step.table_uses.values()
    rows = sum((use.num_own + use.num_shared) * use.row_values for use in uses) * FLOAT_BYTES
    travels = step.num_devices > 1
    # Of tables that are updated: their gradients go home.
    updated = [use for use in uses if use.is_updated]
    pushed = sum((use.num_own + use.num_shared) * use.row_values for use in updated) * FLOAT_BYTES
    sums, received, touched = (
        sum(getattr(use, number) * use.row_values for use in updated) * FLOAT_BYTES
        for number in ("num_distinct", "num_answered", "num_touched")
    )
    dense = sum(use.held_rows * use.row_values for use in updated if use.is_dense) * FLOAT_BYTES
    answers = sum(use.num_answered * use.row_values for use in uses) * FLOAT_BYTES
    # What is sent is padded and stacked, and as much is received.
    stacked, stacked_home = (
        2 * step.num_devices * sum(use.piece_bytes for use in of_tables) for of_tables in (uses, updated)
    )
    d_layers = FLOAT_BYTES * step.num_layer_values
    compute = collections.Counter(training)
    compute["rows"] += rows + dense
    # Gradients by part, those of the device's own ids side by side, all of them side by side.
    push_whole = {"rows": 3 * pushed, "body": d_layers}
    # Summed by row, sent, put side by side as received, summed again by who owns the row.
    push_sums = {
        "rows": sums if travels else pushed,
        "exchange": (stacked_home + received + touched + d_layers) if travels else touched,
        "body": d_layers,
    }
    push = max((push_whole, push_sums), key=lambda of: sum(of.values()))
    push["rows"] += 2 * dense
    phases = {
        "pull": {"rows": rows, "exchange": answers + stacked if travels else 0},
        "compute": dict(compute),
        "push": push,
        "update": {
            "rows": dense or touched,
            "body": d_layers,
            "update": sum(step.update_cost.peak_bytes.values()),
        },
        "evaluate": dict(evaluation),
    }
    if travels and runs_on_cpu():
        _add_messages(step, phases, d_layers=d_layers)
    return phases


def _add_messages(step, phases, *, d_layers):
    """Adds what gRPC takes, which stays from collective to collective; of those of rows all of it, as they run."""
    rows = [
        messages.of_all_to_all(use.piece_bytes, num_devices=step.num_devices)
        for use in step.table_uses.values()
    ]
    hidden = _messages_of_hidden(step, step.tokens)
    gathered = [of for name, of in hidden.items() if not step.has_candidates(step.task.heads[name])]
    layers = messages.of_all_reduce(d_layers, num_devices=step.num_devices)
    kept = sum(of.kept_bytes for of in [*rows, *gathered, layers])
    running = sum(of.all_bytes - of.kept_bytes for of in rows)
    for phase, of_phase in phases.items():
        if phase == "evaluate":
            of_phase["messages"] = sum(of.kept_bytes for of in _messages_of_evaluation(step))
        else:
            of_phase["messages"] = kept + (running if phase in ("pull", "push") else 0)


def _messages_of_hidden(step, tokens):
    """{head: `Messages`} of the hidden states of {head: tokens of a device}, gathered by a full softmax."""
    return {
        name: messages.of_all_gather(
            FLOAT_BYTES * number * step.task.tables[step.task.heads[name].table].embed_dim,
            num_devices=step.num_devices,
        )
        for name, number in tokens.items()
    }


def _messages_of_evaluation(step):
    """`Messages` of the rows that the first batch of an evaluation needs, and of its hidden states."""
    devices = [
        {name: x[i : i + step.evaluated_size] for name, x in step.evaluated_features.items()}
        for i in range(0, step.evaluated_size * step.num_devices, step.evaluated_size)
    ]
    ids: dict = collections.defaultdict(list)
    for features in devices:
        of_tables: dict = collections.defaultdict(list)
        for lookup in step.task.lookups(features).values():
            of_tables[lookup.table].append(np.asarray(lookup.ids, np.int64).reshape(-1))
        for table, found in of_tables.items():
            ids[table].append(np.concatenate(found))
    rows = [
        messages.of_all_to_all(
            step.piece_bytes(table, np.stack(own), np.zeros([0], np.int64)), num_devices=step.num_devices
        )
        for table, own in ids.items()
    ]
    labels = step.task.labels(devices[0])
    tokens = {name: label.weights.shape[0] for name, label in labels.items()}
    return [*rows, *_messages_of_hidden(step, tokens).values()]


def _bytes(x):
    return x.shape.num_elements() * x.dtype.size
