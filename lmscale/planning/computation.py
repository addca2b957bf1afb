"""What body, heads and updates of a step compute on one device, and what an evaluation does, traced and gone through.

Each is the function that a run computes, for whatever body, task and head, over tensors of the run's shapes in the
place of rows; `graphs.py` goes through it operation by operation.
"""

import functools

import numpy as np
import tensorflow as tf

from lmscale.bodies.dropout import DropoutStream
from lmscale.planning.graphs import cost_of
from lmscale.softmax.exact import full_softmax_loss
from lmscale.tables.rows import Rows

_HEAD_SCOPE, _EVALUATION_SCOPE, _ROWS_SCOPE = "plan_head", "plan_evaluation", "plan_rows"


def training_cost(step):
    """`GraphCost` of body and heads, forward and back, over one part of the examples of a device."""
    lookups, labels = step.examples(step.part_size)
    _, all_labels = step.examples(step.experiment.global_batch_size)
    specs = (
        {role: _rows_spec(step, lookup.table, np.shape(lookup.ids)) for role, lookup in lookups.items()},
        {
            name: _head_specs(step, head, labels=labels[name], all_labels=all_labels[name].ids)
            for name, head in step.task.heads.items()
        },
        [tf.TensorSpec(x.shape, x.dtype) for x in step.task.initial_state(step.part_size)],
        {name: tf.TensorSpec([step.part_size, *x.shape[1:]], x.dtype) for name, x in step.features.items()},
    )
    return cost_of(functools.partial(_compute, step), *specs, part_of=_part_of_training)


def _head_specs(step, head, *, labels, all_labels):
    has_candidates = step.has_candidates(head)
    # A head without candidates compares its shard with the tokens of all devices.
    times = 1 if has_candidates else step.num_devices
    num_labels = labels.ids.shape[0] * times
    specs = {
        "labels": tf.TensorSpec([num_labels], tf.int32),
        "all_labels": tf.TensorSpec(all_labels.shape, tf.int32),
        "loss_weights": tf.TensorSpec([labels.weights.shape[0] * times], tf.float32),
        "shard": _shard_spec(step, head),
    }
    if head.needs_label_rows:
        specs["label_rows"] = _rows_spec(step, head.table, [num_labels])
    if has_candidates:
        number = head.num_candidates(global_tokens=all_labels.shape[0])
        specs["candidate_rows"] = _rows_spec(step, head.table, [number])
    return specs


def _shard_spec(step, head):
    return _rows_spec(step, head.table, [step.table_uses[head.table].held_rows])


def _rows_spec(step, table, shape):
    config = step.task.tables[table]
    spec = {"embedding": tf.TensorSpec([*shape, config.embed_dim], tf.float32)}
    if config.bias != "none":
        spec["bias"] = tf.TensorSpec(shape, tf.float32)
    return spec


def _compute(step, roles, heads, state, features):
    """What `Trainer` does with a part of the examples between pull and push."""
    rows = {role: Rows(of["embedding"], of.get("bias")) for role, of in roles.items()}
    variables = step.updated_layers()
    with tf.GradientTape() as tape:
        tape.watch(roles)
        dropout = DropoutStream(seed=0, step=tf.constant(0), first_example=0)
        hidden, new_state = step.layers.call(
            lambda: step.task.forward(rows, features, state, dropout=dropout),
            {role: r.embedding for role, r in rows.items()},
            training=True,
        )
        penalties = step.layers.penalties()
    results = {}
    with tf.name_scope(_HEAD_SCOPE):
        labels = step.task.labels(features)
        for name, head in step.task.heads.items():
            several = {} if labels[name].neighbours is None else {"neighbours": labels[name].neighbours}
            results[name] = _head_gradients(step, head, hidden[name], heads[name], **several)
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


def _head_gradients(step, head, hidden, specs, **several):
    if specs["loss_weights"].shape[0] > hidden.shape[0]:
        hidden = tf.tile(hidden, [specs["loss_weights"].shape[0] // hidden.shape[0], 1])

    def rows(name):
        return Rows(specs[name]["embedding"], specs[name].get("bias")) if name in specs else None

    return head.value_and_gradients(
        hidden,
        labels=specs["labels"],
        loss_weights=specs["loss_weights"],
        label_rows=rows("label_rows"),
        candidate_rows=rows("candidate_rows"),
        candidates=head.candidates(seed=tf.constant([0, 0]), labels=specs["all_labels"]),
        table=_Shard(specs["shard"], num_valid_rows=step.placements[head.table].rows_per_shard),
        **several,
    )


def update_cost(step):
    """`GraphCost` of the update of all rows that a step touches on one device, and of the layers."""
    rules, specs = [], []
    for name, use in step.table_uses.items():
        number = use.held_rows if use.is_dense else use.num_touched
        its_rules, its_specs = _row_updates(step, name, number=number, is_dense=use.is_dense)
        rules += its_rules
        specs += its_specs
    for path, variable in step.updated_layers().items():
        rule = step.treatments[path].update
        rules.append((rule, False))
        specs.append(_update_specs(rule, 1, variable.shape, held_rows=1))
    return _cost_of_updates(rules, specs)


def row_update_cost(step, table, *, number, is_dense):
    """`GraphCost` of the update of `number` rows of a table, or of every row of a shard."""
    return _cost_of_updates(*_row_updates(step, table, number=number, is_dense=is_dense))


def _row_updates(step, table, *, number, is_dense):
    rules, specs = [], []
    for parameter, rule in step.rules(table).items():
        if rule is not None:
            row_shape = [step.task.tables[table].embed_dim] if parameter == "embedding" else []
            rules.append((rule, not is_dense))
            specs.append(_update_specs(rule, number, row_shape, held_rows=step.table_uses[table].held_rows))
    return rules, specs


def evaluation_cost(step):
    """`GraphCost` of an evaluation step of the run, on one device."""
    experiment, size = step.experiment, step.evaluated_size
    features = {name: x[:size] for name, x in step.evaluated_features.items()}
    lookups, labels = step.task.lookups(features), step.task.labels(features)
    specs = (
        {role: _rows_spec(step, lookup.table, np.shape(lookup.ids)) for role, lookup in lookups.items()},
        {
            name: (
                tf.TensorSpec([label.weights.shape[0] * step.num_devices], tf.int32),
                _shard_spec(step, step.task.heads[name]),
            )
            for name, label in labels.items()
        },
        [tf.TensorSpec(x.shape, x.dtype) for x in step.task.initial_state(size)],
        {name: tf.TensorSpec(x.shape, x.dtype) for name, x in features.items()},
    )

    def evaluate(roles, heads, state, features):
        rows = {role: Rows(of["embedding"], of.get("bias")) for role, of in roles.items()}
        # The rows that an evaluation pulls.
        with tf.name_scope(_ROWS_SCOPE):
            rows = {role: Rows(r.embedding + 1.0, r.bias) for role, r in rows.items()}
        hidden, new_state = step.layers.call(
            lambda: step.task.forward(rows, features, state, dropout=None),
            {role: r.embedding for role, r in rows.items()},
            training=False,
        )
        with tf.name_scope(_EVALUATION_SCOPE):
            losses = [
                full_softmax_loss(
                    tf.tile(hidden[name], [step.num_devices, 1]),
                    labels=labels,
                    rows=shard["embedding"],
                    bias=shard.get("bias"),
                    num_valid_rows=step.placements[step.task.heads[name].table].rows_per_shard,
                    compute_dtype=experiment.compute_dtype,
                )
                for name, (labels, shard) in heads.items()
            ]
        return losses, new_state

    return cost_of(evaluate, *specs, part_of=_part_of_evaluation)


class _Shard:
    """Stands in for a `ShardedTable` where a head asks for the shard itself. Its step has shapes that are known."""

    static_shapes = True

    def __init__(self, parameters, *, num_valid_rows):
        self._parameters, self.num_valid_rows = parameters, num_valid_rows

    def local_parameter(self, name):
        return self._parameters.get(name)


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
