"""A task's tables and layers on the devices of a strategy: one pull a table, and one push, for all that reads it."""

import dataclasses

import numpy as np
import tensorflow as tf

from lmscale.distribution import collectives, ledger
from lmscale.parameters.averages import check_constraints
from lmscale.parameters.groups import treat
from lmscale.parameters.initializers import initial_values
from lmscale.parameters.layers import Layers
from lmscale.parameters.tree import Parameter
from lmscale.reading import OwnLabels, Reading, Receipt, StepRows, joined, parted, stacked
from lmscale.softmax.head import candidates_seed
from lmscale.softmax.ranks import label_ranks
from lmscale.softmax.top_k import top_k
from lmscale.tables.rows import Rows
from lmscale.tables.table import RowGradients, ShardedTable
from lmscale.tables.table_config import table_paths


def layers_and_treatments(task, groups, *, num_replicas):
    """What a model begins with, and a dry run: before any table is made.

    Args:
      task: `Task`.
      groups: `Group`s for its parameters; None if no training follows.
      num_replicas: of the strategy.

    Returns:
      (`Layers`, {path: `Treatment`}, empty without groups).

    Raises:
      ValueError: if the groups do not fit the parameters, or the layers the devices.
    """
    layers = Layers(task.layers, num_replicas=num_replicas)
    if groups is None:
        return layers, {}
    treatments = treat(groups, [*table_paths(task.tables), *layers.trainable_variables])
    check_constraints(layers.trainable_variables, treatments)
    return layers, treatments


class Model:
    """What is trained: tables, sharded, and layers, a copy on each device. Build it inside `strategy.scope()`.

    Attributes:
      task: the `Task`.
      layers: `Layers`.
      tables: {name: `ShardedTable`}.
      treatments: {path: `Treatment`} of the parameters that may be trained; empty if no training follows.
      earlier_updates: {path: updates} of update rules whose slots another run has left, which count on from there. Set
        it before the first step, which is compiled with it.
      exchanges: {head: "rows" or "hidden"} of the heads with candidates: what travels. Set it before the first step.
    """

    def __init__(self, task, *, groups, seed, training=True, static_shapes=False):
        """Args:
          task: `Task`, built.
          groups: sequence of `Group`.
          seed: of initial values.
          training: whether to make optimizer slots, and initial values that are not about to be restored.
          static_shapes: as of `ShardedTable`.

        Raises:
          ValueError: if the groups do not fit the parameters, or the layers the devices.
        """
        self.task = task
        self._strategy = tf.distribute.get_strategy()
        self.layers, self.treatments = layers_and_treatments(
            task, groups if training else None, num_replicas=self._strategy.num_replicas_in_sync
        )
        self.tables = {
            name: self._make_table(name, config, seed=seed, static_shapes=static_shapes)
            for name, config in task.tables.items()
        }
        if training:
            for name, config in task.tables.items():
                if config.bias != "none":
                    self._initialise_bias(name, config, seed=seed)
            self._initialise_layers(seed)
        self.layer_slots = {
            path: _make_slots(variable, self.treatments[path].update)
            for path, variable in self.layers.trainable_variables.items()
            if training and self.treatments[path].update is not None
        }
        self.earlier_updates = {}
        self.exchanges = dict.fromkeys(task.heads, "rows")

    def num_updates(self, path, step):
        """What the clock of a parameter's update rule has counted before `step`, at which it is active; int scalar."""
        counted = self.treatments[path].active.num_active(step)
        earlier = self.earlier_updates.get(path, 0)
        return counted + earlier if earlier else counted

    def restore_clocks(self, updates, *, step):
        """Takes `earlier_updates` from {path: updates} that a checkpoint of this run counts in all; None for none."""
        counted = {path: int(self.treatments[path].active.num_active(step)) for path in updates or {}}
        self.earlier_updates = {
            path: updates[path] - number for path, number in counted.items() if updates[path] != number
        }

    def _make_table(self, name, config, *, seed, static_shapes):
        path = f"tables/{name}"
        treatments = {k.rpartition("/")[2]: t for k, t in self.treatments.items() if k.startswith(f"{path}/")}
        return ShardedTable(
            vocab_size=self.task.num_rows(name),
            embed_dim=config.embed_dim,
            bias=config.bias != "none",
            update_rule={parameter: t.update for parameter, t in treatments.items()},
            initializer=treatments["embedding"].initializer if treatments else None,
            seed=seed,
            path=path,
            static_shapes=static_shapes,
        )

    def _initialise_bias(self, name, config, *, seed):
        path, table = f"tables/{name}/bias", self.tables[name]
        initializer = self.treatments[path].initializer
        if initializer is not None:
            values = initial_values(initializer, [table.vocab_size], seed=seed, path=path)
            table.write_rows("bias", 0, values.numpy())
        elif config.bias == "log_frequency":
            table.write_rows("bias", 0, _log_frequency(self.task.vocabularies[name].counts))

    def _initialise_layers(self, seed):
        for path, variable in self.layers.trainable_variables.items():
            initializer = self.treatments[path].initializer
            if initializer is not None:
                variable.assign(initial_values(initializer, variable.shape, seed=seed, path=path))

    # -- inside strategy.run ------------------------------------------------------------------------------------

    @property
    def communicates(self):
        """Whether `head_gradients` uses collectives."""
        return any(
            head.communicates or self.exchanges[name] == "hidden" for name, head in self.task.heads.items()
        )

    def updated_layer_variables(self):
        """{path: Keras variable} of the layers' variables that steps update: not of those frozen for good."""
        return {path: self.layers.trainable_variables[path] for path in self.layer_slots}

    def read(self, features, first, *, num_examples=None, seed=0, step=None):
        """A replica's examples to what they ask for: labels, candidates and rows, with one pull a table.

        Args:
          features: {name: [examples, ...] tensor} of this replica's examples; as many on every replica.
          first: number of the first of them in the global batch.
          num_examples: how many examples of the global batch, the first ones, are no padding; None for all.
          seed, step: what the heads' candidates depend on, int and int32 scalar tensor; without a step, no candidates
            are read, and rows of labels only where a state has several.

        Returns:
          `Reading`.

        Communication: `ShardedTable.pull` of each table; with a step, an all-gather of [n] labels for heads whose
        candidates they are.
        """
        heads = self.task.heads
        batch_size = next(iter(features.values())).shape[0]
        num_global = collectives.num_replicas() * batch_size
        labels = self.task.labels(features)
        candidates = {}
        own = [
            ("roles", role, lookup.table, lookup.ids) for role, lookup in self.task.lookups(features).items()
        ]
        shared = []
        own_labels = {}
        if step is not None:
            for number, (name, head) in enumerate(heads.items()):
                rows_travel = self.exchanges[name] == "rows"
                everyones = None
                if head.candidates_are_labels:
                    per_example = labels[name].ids.shape[0] // batch_size
                    total = (num_global if num_examples is None else num_examples) * per_example
                    with ledger.part("ids"):
                        everyones = collectives.all_gather(labels[name].ids)[:total]
                if head.needs_label_rows and head.candidates_are_labels and rows_travel:
                    own_labels[name] = OwnLabels(
                        first * per_example,
                        batch_size * per_example,
                        total=total,
                        padding=num_global * per_example - total,
                    )
                elif head.needs_label_rows:
                    own.append(("labels", name, head.table, labels[name].ids))
                found = head.candidates(seed=candidates_seed(seed, head=number, step=step), labels=everyones)
                candidates[name] = found
                if found is not None and rows_travel:
                    shared.append(("candidates", name, head.table, found.sampled_ids))
        else:
            # Exact losses of states with several labels need their rows, too.
            own += [
                ("labels", name, head.table, labels[name].ids)
                for name, head in heads.items()
                if labels[name].neighbours is not None
            ]
        rows: dict[str, dict[str, Rows]] = {"roles": {}, "labels": {}, "candidates": {}}
        receipts = {}
        for name, table in self.tables.items():
            own_parts = [part for part in own if part[2] == name]
            shared_parts = [part for part in shared if part[2] == name]
            if not own_parts and not shared_parts:
                continue
            pulled = table.pull(joined(own_parts), joined(shared_parts))
            of_heads = {head: place for head, place in own_labels.items() if heads[head].table == name}
            receipts[name] = Receipt(pulled, own_parts, shared_parts, of_heads)
            for parts, embedding, bias in (
                (own_parts, pulled.embedding, pulled.bias),
                (shared_parts, pulled.shared_embedding, pulled.shared_bias),
            ):
                for (kind, key, _, ids), part in zip(parts, parted(parts, embedding, bias), strict=True):
                    rows[kind][key] = Rows(
                        tf.reshape(part.embedding, [*ids.shape, table.embed_dim]),
                        None if part.bias is None else tf.reshape(part.bias, ids.shape),
                    )
        for name, place in own_labels.items():
            rows["labels"][name] = place.of(rows["candidates"][name])
        return Reading(
            features=features,
            labels=labels,
            candidates=candidates,
            rows=StepRows(**rows),
            receipts=receipts,
        )

    def forward(self, rows, features, state, *, dropout):
        """The task's `forward`, as one call to Keras; arguments and results as there.

        Communication: none.
        """
        return self.layers.call(
            lambda: self.task.forward(rows, features, state, dropout=dropout),
            {role: r.embedding for role, r in rows.items()},
            training=dropout is not None,
        )

    def decode(self, rows, state):
        """The task's `decode`, as one call to Keras; arguments and results as of `LeftToRightTask.decode`.

        Communication: none.
        """
        return self.layers.call(
            lambda: self.task.decode(rows, state),
            {role: r.embedding for role, r in rows.items()},
            training=False,
        )

    def top_k(self, hidden, *, head, **options):
        """The best rows of a head's table for hidden states: `top_k` of `softmax/top_k.py`.

        Args:
          hidden: [n, embed_dim].
          head: name of the head.
          **options: `k`, `excluded`, and the others there that do not describe the table.

        Returns:
          `TopK`.

        Communication: that of `top_k`.
        """
        table = self.tables[self.task.heads[head].table]
        return top_k(
            hidden,
            rows=table.local_parameter("embedding"),
            bias=table.local_parameter("bias"),
            num_valid_rows=table.num_valid_rows,
            **options,
        )

    def head_gradients(self, hidden, reading, *, loss_weights):
        """Hidden states to the heads' training losses and gradients.

        Args:
          hidden: {head: [n, embed_dim]}, as `forward` returns it.
          reading: `Reading`.
          loss_weights: {head: [n] float32}.

        Returns:
          {head: `HeadGradients`}.

        Communication: that of the heads.
        """
        with ledger.part("hidden_states"):
            return {
                name: head.value_and_gradients(
                    hidden[name],
                    labels=reading.labels[name].ids,
                    loss_weights=loss_weights[name],
                    label_rows=reading.rows.labels.get(name),
                    candidate_rows=reading.rows.candidates.get(name),
                    candidates=reading.candidates.get(name),
                    table=self.tables[head.table],
                    **_neighbours_of(reading.labels[name]),
                )
                for name, head in self.task.heads.items()
            }

    def exact_losses(self, hidden, reading, *, compute_dtype):
        """{head: [n] float32}, nats: the full softmax over the head's table; arguments as of `head_gradients`.

        Communication: `Head.exact_loss` of each.
        """
        return {
            name: head.exact_loss(
                hidden[name],
                labels=reading.labels[name].ids,
                table=self.tables[head.table],
                compute_dtype=compute_dtype,
                **(
                    {"label_rows": reading.rows.labels[name]} | _neighbours_of(reading.labels[name])
                    if reading.labels[name].neighbours is not None
                    else {}
                ),
            )
            for name, head in self.task.heads.items()
        }

    def ranks(self, hidden, reading, *, head, compute_dtype):
        """[n] int32: the place of each label of `head` among all rows that compete, 1 for the first.

        Communication: that of `label_ranks`.
        """
        table, labels = self.tables[self.task.heads[head].table], reading.labels[head]
        return label_ranks(
            hidden[head],
            labels=labels.ids,
            excluded=labels.excluded,
            rows=table.local_parameter("embedding"),
            bias=table.local_parameter("bias"),
            num_valid_rows=table.num_valid_rows,
            compute_dtype=compute_dtype,
        )

    def collect(self, reading, d_rows, *, d_shards, d_shard_rows=None):
        """Brings the gradients of a step's rows home, with one push a table.

        Args:
          reading: `Reading` of the step.
          d_rows: `StepRows` of gradients of this replica's share of the loss.
          d_shards: {table: {parameter: gradient of every row of this shard}}, complete, for tables that have one.
          d_shard_rows: {head: `ShardRows`}, of heads whose candidates stayed on their shards.

        Returns:
          {table: collected gradients}, of the tables that were pulled from or have a gradient of every row, without
          those that are frozen for good.

        Communication: `ShardedTable.collect` of each table.
        """
        collected = {}
        for name, table in self.tables.items():
            if not any(table.update_rules.values()):
                continue
            receipt = reading.receipts.get(name)
            complete = {
                "dense": d_shards.get(name),
                "of_shard": [
                    rows for head, rows in (d_shard_rows or {}).items() if self.task.heads[head].table == name
                ],
            }
            if receipt is None:
                # A head that reads no rows of its table may well have gradients of them.
                if any(complete.values()):
                    collected[name] = table.collect(None, None, **complete)
                continue
            own = stacked(receipt.own_parts, d_rows, table=table)
            d_candidates = {
                head: place.added(d_rows.candidates.get(head), d_rows.labels.get(head))
                for head, place in receipt.own_labels.items()
            }
            shared = stacked(
                receipt.shared_parts,
                dataclasses.replace(d_rows, candidates={**d_rows.candidates, **d_candidates}),
                table=table,
            )
            collected[name] = table.collect(
                receipt.pulled,
                RowGradients(
                    embedding=own.embedding,
                    bias=own.bias,
                    shared_embedding=shared.embedding,
                    shared_bias=shared.bias,
                ),
                **complete,
            )
        return collected

    def apply_layer_gradients(self, gradients, *, step, learning_rate, scale, keep):
        """Updates this replica's copy of the layers; every replica is given the same gradients.

        Args:
          gradients: {path: gradient}, already summed over the replicas.
          step, learning_rate, scale, keep: {path: ...}, each as for `ShardedTable.apply`.

        Communication: none.
        """
        for path, slot_variables in self.layer_slots.items():
            variable = self.layers.trainable_variables[path]
            weights = collectives.local_value(variable.value)
            slots = {slot: collectives.local_value(v) for slot, v in slot_variables.items()}
            old_weights = weights.read_value()
            old_slots = {slot: v.read_value() for slot, v in slots.items()}
            # A variable of a layer is one row: it moves at every step.
            new_weights, new_slots = self.treatments[path].update.update(
                weights=tf.expand_dims(old_weights, 0),
                gradients=tf.expand_dims(tf.where(keep[path], gradients[path] * scale[path], 0.0), 0),
                slots=old_slots,
                step=step[path],
                learning_rate=learning_rate[path],
            )
            new_weights = tf.reshape(new_weights, old_weights.shape)
            if variable.constraint is not None:
                new_weights = variable.constraint(new_weights)
            weights.assign(tf.where(keep[path], new_weights, old_weights))
            for slot, value in new_slots.items():
                slots[slot].assign(tf.where(keep[path], value, old_slots[slot]))

    # -- on the host, outside strategy.run ------------------------------------------------------------------------

    def components(self, path):
        """[(variable, {slot: variable})] of the parameter at `path` on each device of this process.

        Of a table, rows [allocated_rows, ...] of each. A layer's variable is one row to its slots, [1, ...].
        """
        if path in self.layer_slots:
            variable, slots = self.layers.trainable_variables[path].value, self.layer_slots[path]
        else:
            _, table, name = path.split("/")
            variable, slots = self.tables[table].parameters[name], self.tables[table].slots[name]
        of_slots = {slot: self._strategy.experimental_local_results(v) for slot, v in slots.items()}
        return [
            (component, {slot: of_slots[slot][i] for slot in slots})
            for i, component in enumerate(self._strategy.experimental_local_results(variable))
        ]

    def parameters(self):
        """`Parameter`s of everything here, slots included."""
        found = []
        for table_name, table in self.tables.items():
            for name, variable in table.variables().items():
                is_slot = "/" in name
                path = f"tables/{table_name}/{name}"
                found.append(
                    Parameter(
                        path=f"slots/{path}" if is_slot else path,
                        shape=(table.vocab_size, *variable.shape[1:]),
                        dtype=variable.dtype.as_numpy_dtype,
                        sharded=True,
                        trainable=not is_slot and table.update_rules[name] is not None,
                        read=lambda start, stop, table=table, name=name: table.read_rows(name, start, stop),
                        write=lambda start, rows, table=table, name=name: table.send_rows(name, start, rows),
                        scatter=lambda ids, rows, table=table, name=name: table.write_ids(name, ids, rows),
                    )
                )
        for path, variable in self.layers.variables.items():
            found.append(replicated(path, variable.value, trainable=path in self.layer_slots))
        for path, slots in self.layer_slots.items():
            found += [
                replicated(f"slots/{path}/{slot}", variable, trainable=False)
                for slot, variable in slots.items()
            ]
        return found


def _neighbours_of(labels):
    """The argument that says which labels a hidden state has, where it has several."""
    return {} if labels.neighbours is None else {"neighbours": labels.neighbours}


def _make_slots(variable, rule):
    """{slot: variable [1, ...]} that the rule keeps beside a layer's variable."""
    return {
        name: tf.Variable(
            tf.fill(
                [1, *variable.shape] if slot.per_element else [1], tf.cast(slot.initial_value, slot.dtype)
            ),
            trainable=False,
        )
        for name, slot in rule.slots.items()
    }


def _log_frequency(counts):
    """log((count + 1) / total): one more than seen, for those never seen."""
    counts = np.asarray(counts, np.float64) + 1
    return np.log(counts / counts.sum()).astype(np.float32)


def replicated(path, variable, *, trainable):
    """The `Parameter` of a variable of which each device has a copy."""

    def scatter(rows, values):
        current = variable.numpy()
        current[rows] = values
        variable.assign(current)

    def write(start, values):
        if variable.shape.rank == 0:
            variable.assign(values)
        else:
            scatter(np.arange(start, start + len(values)), values)

    def read(start, stop):
        return variable.numpy() if variable.shape.rank == 0 else variable.numpy()[start:stop]

    return Parameter(
        path=path,
        shape=tuple(variable.shape),
        dtype=variable.dtype.as_numpy_dtype,
        sharded=False,
        trainable=trainable,
        read=read,
        write=write,
        scatter=scatter,
    )
