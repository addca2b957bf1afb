"""One step of an experiment on one of N devices, as far as its first batch tells: what is asked of each table."""

import dataclasses
import functools

import numpy as np
import tensorflow as tf

from lmscale.assembly import step_traffic
from lmscale.parameters.report import parameter_lines
from lmscale.planning import computation, messages
from lmscale.planning.memory import FLOAT_BYTES, device_memory
from lmscale.tables.placement import Placement


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableUse:
    """What a step does with one table on one device.

    Attributes:
      num_own: ids of the device's own examples, with duplicates.
      num_shared: ids that all devices need.
      num_distinct: different ones of both.
      num_answered: rows that all devices ask of a shard, together.
      num_touched: different rows of a shard that get a gradient.
      is_dense: whether every row gets one.
      row_values: numbers of a row.
      piece_bytes: of the rows that a device asks of one shard, as they travel between processes: padded.
      held_rows: rows of a shard, padding included.
      is_updated: whether any parameter of the table has an update rule.
    """

    num_own: int
    num_shared: int
    num_distinct: int
    num_answered: int
    num_touched: int
    is_dense: bool
    row_values: int
    piece_bytes: int
    held_rows: int
    is_updated: bool


class Step:
    """A step of an experiment and an evaluation beside it, on one of N devices.

    Attributes:
      experiment: `Experiment`.
      task, layers, treatments: what the model is made of.
      num_devices: N.
      num_parts, part_size: parts in which the examples of a device are computed, and examples of one.
      placements: {table: `Placement` of its rows}.
      features: of the first batch, of all devices.
      tokens: {head: hidden states of a device}.
      ids: {table: ([num_devices, n] ids that each device needs, [s] ids that all need)} of the first batch.
      lines: `ParameterLine`s.
      table_uses: {table: `TableUse`}, of the device or shard that has most, by the first batch.
    """

    def __init__(self, experiment, task, layers, treatments, *, num_devices):
        """Reads the first batch and draws its candidates.

        Args:
          experiment: `Experiment`.
          task: `Task`, made for `num_devices`.
          layers: `Layers`.
          treatments: {path: `Treatment`}.
          num_devices: devices that share them.
        """
        self.task, self.layers, self.treatments = task, layers, treatments
        self.num_devices = num_devices
        self.placements = {
            name: Placement(vocab_size=task.num_rows(name), num_shards=num_devices) for name in task.tables
        }
        self.experiment = experiment
        self.features = task.training_batches().at(0).features
        self.lines = parameter_lines(task, layers, treatments, num_devices=num_devices)
        self.num_parts = experiment.gradient_accumulation_steps
        self.part_size = experiment.global_batch_size // num_devices // self.num_parts
        own = self.examples(experiment.global_batch_size // num_devices)
        self.tokens = {name: int(label.weights.shape.num_elements()) for name, label in own[1].items()}
        self.ids = self._ids_by_device()
        self.table_uses = {name: self._table_use(name) for name in task.tables}

    def examples(self, count, *, first=0):
        """(lookups, labels) of `count` examples of the first batch, from `first` on."""
        features = {name: x[first : first + count] for name, x in self.features.items()}
        return self.task.lookups(features), self.task.labels(features)

    @functools.cached_property
    def traffic(self):
        """`StepTraffic` of the first batch."""
        return step_traffic(
            self.experiment,
            self.task,
            self.task.training_batches(),
            treatments=self.treatments,
            num_devices=self.num_devices,
        )

    def _ids_by_device(self):
        """{table: ([num_devices, n] ids that each device needs, [s] ids that all need)} of the first batch."""
        size = self.experiment.global_batch_size // self.num_devices
        own: dict = {name: [] for name in self.task.tables}
        shared: dict = {name: [np.zeros([0], np.int64)] for name in self.task.tables}
        _, all_labels = self.examples(self.experiment.global_batch_size)
        candidates = {}
        for number, (name, head) in enumerate(self.task.heads.items()):
            found = head.candidates(
                seed=tf.constant([(self.experiment.seed + number) % 2**31, 0]),
                labels=tf.cast(all_labels[name].ids, tf.int32),
            )
            candidates[name] = found is not None
            if found is not None:
                shared[head.table].append(np.asarray(found.sampled_ids, np.int64))
        for device in range(self.num_devices):
            lookups, labels = self.examples(size, first=device * size)
            parts: dict = {name: [np.zeros([0], np.int64)] for name in self.task.tables}
            for lookup in lookups.values():
                parts[lookup.table].append(np.asarray(lookup.ids, np.int64).reshape(-1))
            for name, head in self.task.heads.items():
                if head.needs_label_rows and not (head.candidates_are_labels and candidates[name]):
                    parts[head.table].append(np.asarray(labels[name].ids, np.int64).reshape(-1))
            for name, of_table in parts.items():
                own[name].append(np.concatenate(of_table))
        return {name: (np.stack(own[name]), np.concatenate(shared[name])) for name in self.task.tables}

    def _table_use(self, name):
        own, shared = self.ids[name]
        distinct = [np.union1d(ids, shared) for ids in own]
        placement = self.placements[name]
        owners = [np.bincount(placement.owner(ids), minlength=self.num_devices) for ids in distinct]
        touched = np.unique(np.concatenate(distinct))
        config = self.task.tables[name]
        return TableUse(
            num_own=own.shape[1],
            num_shared=len(shared),
            num_distinct=max(map(len, distinct)),
            num_answered=int(np.sum(owners, axis=0).max()),
            num_touched=int(np.bincount(placement.owner(touched), minlength=self.num_devices).max()),
            is_dense=any(
                head.table == name and not self.has_candidates(head) for head in self.task.heads.values()
            ),
            row_values=config.embed_dim + (config.bias != "none"),
            piece_bytes=self.piece_bytes(name, own, shared),
            held_rows=placement.allocated_rows,
            is_updated=any(self.rules(name).values()),
        )

    def piece_bytes(self, table, ids, shared_ids):
        """Of the rows that a device asks of one shard, padded as all are; ids as in `ids`."""
        config = self.task.tables[table]
        longest = messages.longest_piece(ids, shared_ids, self.placements[table])
        rows = messages.padded_rows(longest, max_size=ids.shape[1] + len(shared_ids))
        return FLOAT_BYTES * (config.embed_dim + (config.bias != "none")) * rows

    def has_candidates(self, head):
        """Whether a head compares tokens with some rows, rather than with all."""
        return head.num_candidates(global_tokens=1) > 0

    def rules(self, table):
        """{parameter: update rule or None} of a table."""
        prefix = f"tables/{table}/"
        return {
            path.removeprefix(prefix): t.update
            for path, t in self.treatments.items()
            if path.startswith(prefix)
        }

    def updated_layers(self):
        """{path: Keras variable} of the layers' variables that have an update rule."""
        return {
            path: variable
            for path, variable in self.layers.trainable_variables.items()
            if self.treatments[path].update is not None
        }

    @property
    def num_layer_values(self):
        """Numbers of the layers that are updated."""
        return sum(int(np.prod(v.shape, dtype=np.int64)) for v in self.updated_layers().values())

    @property
    def evaluated_size(self):
        """Examples of an evaluation step on one device."""
        return -(-self.experiment.eval_batch_size // self.num_devices)

    @functools.cached_property
    def evaluated_features(self):
        """Features of the first batch of an evaluation inside the run, filled up for all devices."""
        features = self.task.evaluation_batches("valid").at(0).features
        size = self.evaluated_size * self.num_devices
        return {
            name: np.pad(np.asarray(x), [(0, size - len(x))] + [(0, 0)] * (x.ndim - 1))
            for name, x in features.items()
        }

    @functools.cached_property
    def memory(self):
        """`DeviceMemory`."""
        return device_memory(self)

    @functools.cached_property
    def training_cost(self):
        """`GraphCost` of body and heads, forward and back, over one part of the examples of a device."""
        return computation.training_cost(self)

    @functools.cached_property
    def update_cost(self):
        """`GraphCost` of the update of all rows that a step touches on one device, and of the layers."""
        return computation.update_cost(self)

    @functools.cached_property
    def evaluation_cost(self):
        """`GraphCost` of an evaluation step inside the run, on one device."""
        return computation.evaluation_cost(self)
