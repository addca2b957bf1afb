"""Memory that a run takes of each device, by part, from its configuration: no table is made, and no step is taken.

What lasts (rows, layers, their slots, the carried state) is exact. What a step takes beside it is an estimate, made of
phases that follow each other: rows are pulled; body and heads compute, forward and back (gone through operation by
operation in `graphs.py`, for whatever body, task and head); gradients go home; rows and layers are updated. The memory
of a step is that of the phase that takes most. An evaluation is another such phase.

Phases and parts are those of a device that is alone with its memory, as devices are, but for the logical devices of a
CPU, whose phases may fall together or not.
"""

import collections
import dataclasses
import functools

import numpy as np
import tensorflow as tf

from lmscale.assembly import step_traffic
from lmscale.bodies.dropout import DropoutStream
from lmscale.distribution.strategies import runs_on_cpu
from lmscale.parameters.report import parameter_lines
from lmscale.planning import messages
from lmscale.planning.graphs import GraphCost, cost_of
from lmscale.softmax.full import full_softmax_loss
from lmscale.tables.placement import Placement
from lmscale.tables.rows import Rows

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
    is_updated: bool


class Step:
    """A step of an experiment and an evaluation beside it, on one of N devices.

    Attributes:
      task, layers, treatments: what the model is made of.
      num_devices: N.
      num_parts: in which the examples of a device are computed.
      vocab_size, placement: rows of the tables, and where they are.
      tokens: {head: labels of a device}.
      ids: {table: ([num_devices, n] ids that each device needs, [s] ids that all need)} of the first batch.
      lines: `ParameterLine`s.
      table_uses: {table: `TableUse`}, of the device or shard that has most, by the first batch.
    """

    def __init__(self, experiment, task, layers, treatments, *, vocab_size, num_devices):
        """Reads the first batch and draws its candidates.

        Args:
          experiment: `Experiment`.
          task: `Task`, made for `num_devices`.
          layers: `Layers`.
          treatments: {path: `Treatment`}.
          vocab_size: rows of the tables.
          num_devices: devices that share them.
        """
        self.task, self.layers, self.treatments = task, layers, treatments
        self.num_devices = num_devices
        self.vocab_size = vocab_size
        self.placement = Placement(vocab_size=vocab_size, num_shards=num_devices)
        self._experiment = experiment
        self._features = task.training_batches().at(0).features
        self.lines = parameter_lines(task, layers, treatments, vocab_size=vocab_size, num_devices=num_devices)
        self.num_parts = experiment.gradient_accumulation_steps
        self._part_size = experiment.global_batch_size // num_devices // self.num_parts
        own = self._of_examples(experiment.global_batch_size // num_devices)
        self.tokens = {name: int(label.ids.shape.num_elements()) for name, label in own[1].items()}
        self.ids = self._ids_by_device()
        self.table_uses = {name: self._table_use(name) for name in task.tables}

    def _of_examples(self, count, *, first=0):
        features = {name: x[first : first + count] for name, x in self._features.items()}
        return self.task.lookups(features), self.task.labels(features)

    @functools.cached_property
    def traffic(self):
        """`StepTraffic` of the first batch."""
        return step_traffic(
            self._experiment,
            self.task,
            self.task.training_batches(),
            treatments=self.treatments,
            vocab_size=self.vocab_size,
            num_devices=self.num_devices,
        )

    def _ids_by_device(self):
        """{table: ([num_devices, n] ids that each device needs, [s] ids that all need)} of the first batch."""
        size = self._experiment.global_batch_size // self.num_devices
        own: dict = {name: [] for name in self.task.tables}
        shared: dict = {name: [np.zeros([0], np.int64)] for name in self.task.tables}
        _, all_labels = self._of_examples(self._experiment.global_batch_size)
        candidates = {}
        for number, (name, head) in enumerate(self.task.heads.items()):
            found = head.candidates(
                seed=tf.constant([(self._experiment.seed + number) % 2**31, 0]),
                labels=tf.cast(all_labels[name].ids, tf.int32),
            )
            candidates[name] = found is not None
            if found is not None:
                shared[head.table].append(np.asarray(found.sampled_ids, np.int64))
        for device in range(self.num_devices):
            lookups, labels = self._of_examples(size, first=device * size)
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
        owners = [np.bincount(self.placement.owner(ids), minlength=self.num_devices) for ids in distinct]
        touched = np.unique(np.concatenate(distinct))
        config = self.task.tables[name]
        return TableUse(
            num_own=own.shape[1],
            num_shared=len(shared),
            num_distinct=max(map(len, distinct)),
            num_answered=int(np.sum(owners, axis=0).max()),
            num_touched=int(np.bincount(self.placement.owner(touched), minlength=self.num_devices).max()),
            is_dense=any(
                head.table == name and not self.has_candidates(head) for head in self.task.heads.values()
            ),
            row_values=config.embed_dim + (config.bias != "none"),
            piece_bytes=self._piece_bytes(name, own, shared),
            is_updated=any(self._rules(name).values()),
        )

    def _piece_bytes(self, table, ids, shared_ids):
        """Of the rows that a device asks of one shard, padded as all are; ids as in `ids`."""
        config = self.task.tables[table]
        longest = messages.longest_piece(ids, shared_ids, self.placement)
        rows = messages.padded_rows(longest, max_size=ids.shape[1] + len(shared_ids))
        return FLOAT_BYTES * (config.embed_dim + (config.bias != "none")) * rows

    def has_candidates(self, head):
        """Whether a head compares tokens with some rows, rather than with all."""
        return head.num_candidates(global_tokens=1) > 0

    def _rules(self, table):
        """{parameter: update rule or None} of a table."""
        prefix = f"tables/{table}/"
        return {
            path.removeprefix(prefix): t.update
            for path, t in self.treatments.items()
            if path.startswith(prefix)
        }

    @functools.cached_property
    def memory(self):
        """`DeviceMemory`."""
        costs = (self.training_cost, self.evaluation_cost)
        parts = {part for cost in costs for part in cost.most_bytes}
        return DeviceMemory(
            lasting=self._lasting(),
            phases=self._phases(),
            most_of_parts={part: max(cost.most_bytes.get(part, 0) for cost in costs) for part in parts},
        )

    # -- what lasts -----------------------------------------------------------------------------------------------

    def _lasting(self):
        per_device = self._experiment.global_batch_size // self.num_devices
        ids = sum(use.num_own + use.num_shared for use in self.table_uses.values())
        batch = sum(x.nbytes for x in self._features.values()) * self._experiment.steps_per_call
        return {
            "table_rows": sum(line.bytes_per_device for line in self.lines if line.sharded),
            "table_slots": sum(line.slot_bytes_per_device for line in self.lines if line.sharded),
            "layers": sum(line.bytes_per_device for line in self.lines if not line.sharded),
            "layer_slots": sum(line.slot_bytes_per_device for line in self.lines if not line.sharded),
            "state": sum(_bytes(x) for x in self.task.initial_state(per_device)),
            "batch": batch + ID_BYTES * ids,
        }

    # -- phases ---------------------------------------------------------------------------------------------------

    def _phases(self):
        training, evaluation = self.training_cost.peak_bytes, self.evaluation_cost.peak_bytes
        uses = self.table_uses.values()
        rows = sum((use.num_own + use.num_shared) * use.row_values for use in uses) * FLOAT_BYTES
        travels = self.num_devices > 1
        # Of tables that are updated: their gradients go home.
        updated = [use for use in uses if use.is_updated]
        pushed = sum((use.num_own + use.num_shared) * use.row_values for use in updated) * FLOAT_BYTES
        sums, received, touched = (
            sum(getattr(use, number) * use.row_values for use in updated) * FLOAT_BYTES
            for number in ("num_distinct", "num_answered", "num_touched")
        )
        dense = (
            sum(self.placement.allocated_rows * use.row_values for use in updated if use.is_dense)
            * FLOAT_BYTES
        )
        answers = sum(use.num_answered * use.row_values for use in uses) * FLOAT_BYTES
        # What is sent is padded and stacked, and as much is received.
        stacked, stacked_home = (
            2 * self.num_devices * sum(use.piece_bytes for use in of_tables) for of_tables in (uses, updated)
        )
        d_layers = FLOAT_BYTES * self.num_layer_values
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
                "update": sum(self.update_cost.peak_bytes.values()),
            },
            "evaluate": dict(evaluation),
        }
        if travels and runs_on_cpu():
            self._add_messages(phases, d_layers=d_layers)
        return phases

    def _add_messages(self, phases, *, d_layers):
        """Adds what gRPC takes, which stays from collective to collective; of those of rows all of it, as they run."""
        rows = [
            messages.of_all_to_all(use.piece_bytes, num_devices=self.num_devices)
            for use in self.table_uses.values()
        ]
        hidden = self._messages_of_hidden(self.tokens)
        gathered = [of for name, of in hidden.items() if not self.has_candidates(self.task.heads[name])]
        layers = messages.of_all_reduce(d_layers, num_devices=self.num_devices)
        kept = sum(of.kept_bytes for of in [*rows, *gathered, layers])
        running = sum(of.all_bytes - of.kept_bytes for of in rows)
        for phase, of_phase in phases.items():
            if phase == "evaluate":
                of_phase["messages"] = sum(of.kept_bytes for of in self._messages_of_evaluation())
            else:
                of_phase["messages"] = kept + (running if phase in ("pull", "push") else 0)

    def _messages_of_hidden(self, tokens):
        """{head: `Messages`} of the hidden states of {head: tokens of a device}, gathered by a full softmax."""
        return {
            name: messages.of_all_gather(
                FLOAT_BYTES * number * self.task.tables[self.task.heads[name].table].embed_dim,
                num_devices=self.num_devices,
            )
            for name, number in tokens.items()
        }

    def _messages_of_evaluation(self):
        """`Messages` of the rows that the first batch of an evaluation needs, and of its hidden states."""
        devices = [
            {name: x[i : i + self._evaluated_size] for name, x in self._evaluated_features.items()}
            for i in range(0, self._evaluated_size * self.num_devices, self._evaluated_size)
        ]
        ids: dict = collections.defaultdict(list)
        for features in devices:
            of_tables: dict = collections.defaultdict(list)
            for lookup in self.task.lookups(features).values():
                of_tables[lookup.table].append(np.asarray(lookup.ids, np.int64).reshape(-1))
            for table, found in of_tables.items():
                ids[table].append(np.concatenate(found))
        rows = [
            messages.of_all_to_all(
                self._piece_bytes(table, np.stack(own), np.zeros([0], np.int64)), num_devices=self.num_devices
            )
            for table, own in ids.items()
        ]
        labels = self.task.labels(devices[0])
        tokens = {name: label.ids.shape[0] for name, label in labels.items()}
        return [*rows, *self._messages_of_hidden(tokens).values()]

    def _updated_layers(self):
        """{path: Keras variable} of the layers' variables that have an update rule."""
        return {
            path: variable
            for path, variable in self.layers.trainable_variables.items()
            if self.treatments[path].update is not None
        }

    @property
    def num_layer_values(self):
        """Numbers of the layers that are updated."""
        return sum(_num_elements(variable) for variable in self._updated_layers().values())

    @functools.cached_property
    def training_cost(self) -> GraphCost:
        """Of body and heads, forward and back, over one part of the examples of a device."""
        lookups, labels = self._of_examples(self._part_size)
        own_tokens = {name: int(label.ids.shape.num_elements()) for name, label in labels.items()}
        _, all_labels = self._of_examples(self._experiment.global_batch_size)
        specs = (
            {role: self._rows_spec(lookup.table, np.shape(lookup.ids)) for role, lookup in lookups.items()},
            {
                name: self._head_specs(head, tokens=own_tokens[name], all_labels=all_labels[name].ids)
                for name, head in self.task.heads.items()
            },
            [tf.TensorSpec(x.shape, x.dtype) for x in self.task.initial_state(self._part_size)],
            {
                name: tf.TensorSpec([self._part_size, *x.shape[1:]], x.dtype)
                for name, x in self._features.items()
            },
        )
        return cost_of(self._compute, *specs, part_of=_part_of_training)

    def _head_specs(self, head, *, tokens, all_labels):
        has_candidates = self.has_candidates(head)
        # A head without candidates compares its shard with the tokens of all devices.
        counted = tokens if has_candidates else tokens * self.num_devices
        specs = {
            "labels": tf.TensorSpec([counted], tf.int32),
            "all_labels": tf.TensorSpec(all_labels.shape, tf.int32),
            "loss_weights": tf.TensorSpec([counted], tf.float32),
            "shard": self._rows_spec(head.table, [self.placement.allocated_rows]),
        }
        if head.needs_label_rows:
            specs["label_rows"] = self._rows_spec(head.table, [counted])
        if has_candidates:
            number = head.num_candidates(global_tokens=all_labels.shape[0])
            specs["candidate_rows"] = self._rows_spec(head.table, [number])
        return specs

    def _rows_spec(self, table, shape):
        config = self.task.tables[table]
        spec = {"embedding": tf.TensorSpec([*shape, config.embed_dim], tf.float32)}
        if config.bias != "none":
            spec["bias"] = tf.TensorSpec(shape, tf.float32)
        return spec

    def _compute(self, roles, heads, state, features):
        """What `Trainer` does with a part of the examples between pull and push."""
        rows = {role: Rows(of["embedding"], of.get("bias")) for role, of in roles.items()}
        variables = self._updated_layers()
        with tf.GradientTape() as tape:
            tape.watch(roles)
            dropout = DropoutStream(seed=0, step=tf.constant(0), first_example=0)
            hidden, new_state = self.layers.call(
                lambda: self.task.forward(rows, features, state, dropout=dropout),
                {role: r.embedding for role, r in rows.items()},
                training=True,
            )
            penalties = self.layers.penalties()
        results = {}
        with tf.name_scope(_HEAD_SCOPE):
            for name, head in self.task.heads.items():
                results[name] = self._head_gradients(head, hidden[name], heads[name])
        d_hidden = [results[name].d_hidden[: hidden[name].shape[0]] for name in hidden]
        gradients = tape.gradient(
            [*hidden.values(), *penalties],
            (roles, variables),
            output_gradients=[*d_hidden, *(tf.ones([]) for _ in penalties)],
        )
        kept = [
            (r.loss, _of_rows(r.d_label_rows), _of_rows(r.d_candidate_rows), r.d_shard or {})
            for r in results.values()
        ]
        flat = [x for x in tf.nest.flatten((gradients, kept, new_state)) if x is not None]
        return [tf.convert_to_tensor(x) for x in flat]

    def _head_gradients(self, head, hidden, specs):
        if specs["labels"].shape[0] > hidden.shape[0]:
            hidden = tf.tile(hidden, [specs["labels"].shape[0] // hidden.shape[0], 1])

        def rows(name):
            return Rows(specs[name]["embedding"], specs[name].get("bias")) if name in specs else None

        return head.value_and_gradients(
            hidden,
            labels=specs["labels"],
            loss_weights=specs["loss_weights"],
            label_rows=rows("label_rows"),
            candidate_rows=rows("candidate_rows"),
            candidates=head.candidates(seed=tf.constant([0, 0]), labels=specs["all_labels"]),
            table=_Shard(specs["shard"], num_valid_rows=self.placement.rows_per_shard),
        )

    @functools.cached_property
    def update_cost(self) -> GraphCost:
        """Of the update of all rows that a step touches on one device, and of the layers."""
        rules, specs = [], []
        for name, use in self.table_uses.items():
            number = self.placement.allocated_rows if use.is_dense else use.num_touched
            its_rules, its_specs = self._row_updates(name, number=number, is_dense=use.is_dense)
            rules += its_rules
            specs += its_specs
        for path, variable in self._updated_layers().items():
            rule = self.treatments[path].update
            rules.append((rule, False))
            specs.append(_update_specs(rule, 1, variable.shape, held_rows=1))
        return _cost_of_updates(rules, specs)

    def row_update_cost(self, table, *, number, is_dense) -> GraphCost:
        """Of the update of `number` rows of a table, or of every row of a shard."""
        return _cost_of_updates(*self._row_updates(table, number=number, is_dense=is_dense))

    def _row_updates(self, table, *, number, is_dense):
        rules, specs = [], []
        for parameter, rule in self._rules(table).items():
            if rule is not None:
                row_shape = [self.task.tables[table].embed_dim] if parameter == "embedding" else []
                rules.append((rule, not is_dense))
                specs.append(_update_specs(rule, number, row_shape, held_rows=self.placement.allocated_rows))
        return rules, specs

    @property
    def _evaluated_size(self):
        """Examples of an evaluation step on one device."""
        return -(-self._experiment.eval_batch_size // self.num_devices)

    @functools.cached_property
    def _evaluated_features(self):
        """Features of the first batch of an evaluation inside the run, filled up for all devices."""
        features = self.task.evaluation_batches("valid").at(0).features
        size = self._evaluated_size * self.num_devices
        return {
            name: np.pad(np.asarray(x), [(0, size - len(x))] + [(0, 0)] * (x.ndim - 1))
            for name, x in features.items()
        }

    @functools.cached_property
    def evaluation_cost(self) -> GraphCost:
        """Of an evaluation step of the run."""
        experiment, size = self._experiment, self._evaluated_size
        features = {name: x[:size] for name, x in self._evaluated_features.items()}
        lookups, labels = self.task.lookups(features), self.task.labels(features)
        specs = (
            {role: self._rows_spec(lookup.table, np.shape(lookup.ids)) for role, lookup in lookups.items()},
            {
                name: (
                    tf.TensorSpec([label.ids.shape[0] * self.num_devices], tf.int32),
                    self._rows_spec(self.task.heads[name].table, [self.placement.allocated_rows]),
                )
                for name, label in labels.items()
            },
            [tf.TensorSpec(x.shape, x.dtype) for x in self.task.initial_state(size)],
            {name: tf.TensorSpec(x.shape, x.dtype) for name, x in features.items()},
        )

        def evaluate(roles, heads, state, features):
            rows = {role: Rows(of["embedding"], of.get("bias")) for role, of in roles.items()}
            # The rows that an evaluation pulls.
            with tf.name_scope(_ROWS_SCOPE):
                rows = {role: Rows(r.embedding + 1.0, r.bias) for role, r in rows.items()}
            hidden, new_state = self.layers.call(
                lambda: self.task.forward(rows, features, state, dropout=None),
                {role: r.embedding for role, r in rows.items()},
                training=False,
            )
            with tf.name_scope(_EVALUATION_SCOPE):
                losses = [
                    full_softmax_loss(
                        tf.tile(hidden[name], [self.num_devices, 1]),
                        labels=labels,
                        rows=shard["embedding"],
                        bias=shard.get("bias"),
                        num_valid_rows=self.placement.rows_per_shard,
                        compute_dtype=experiment.compute_dtype,
                    )
                    for name, (labels, shard) in heads.items()
                ]
            return losses, new_state

        return cost_of(evaluate, *specs, part_of=_part_of_evaluation)


class _Shard:
    """Stands in for a `ShardedTable` where a head asks for the shard itself."""

    def __init__(self, parameters, *, num_valid_rows):
        self._parameters, self.num_valid_rows = parameters, num_valid_rows

    def local_parameter(self, name):
        return self._parameters.get(name)


_HEAD_SCOPE, _EVALUATION_SCOPE, _ROWS_SCOPE = "plan_head", "plan_evaluation", "plan_rows"


def _part_of_training(name):
    return "head" if name.startswith(_HEAD_SCOPE) else "body"


def _part_of_evaluation(name):
    if name.startswith(_ROWS_SCOPE):
        return "rows"
    return "evaluation" if name.startswith(_EVALUATION_SCOPE) else "body"


def _update_specs(rule, number, row_shape, *, held_rows):
    def spec(rows, *, per_element=True, dtype=tf.float32):
        return tf.TensorSpec([rows, *(row_shape if per_element else [])], dtype)

    return {
        "rows": tf.TensorSpec([number], tf.int32),
        "weights": spec(held_rows),
        "gradients": spec(number),
        "slots": {
            name: spec(held_rows, per_element=slot.per_element, dtype=slot.dtype)
            for name, slot in rule.slots.items()
        },
    }


def _cost_of_updates(rules, specs):
    def update(of_parameters):
        return [
            _updated(rule, is_sparse=is_sparse, **of)
            for (rule, is_sparse), of in zip(rules, of_parameters, strict=True)
        ]

    return cost_of(update, specs, part_of=lambda name: "update")


def _updated(rule, *, is_sparse, rows, weights, gradients, slots):
    """What `ShardedTable.apply` computes for one parameter, before it writes it."""
    if is_sparse:
        weights = tf.gather(weights, rows)
        slots = {name: tf.gather(slot, rows) for name, slot in slots.items()}
    return rule.update(
        weights=weights,
        gradients=tf.where(tf.constant(True), gradients * 1.0, 0.0),
        slots=slots,
        step=tf.constant(0),
        learning_rate=tf.constant(0.0),
    )


def _of_rows(rows):
    return () if rows is None else [x for x in (rows.embedding, rows.bias) if x is not None]


def _bytes(x):
    return x.shape.num_elements() * x.dtype.size


def _num_elements(variable):
    return int(np.prod(variable.shape, dtype=np.int64))
