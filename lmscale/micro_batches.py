"""Gradient accumulation: a replica's examples in parts, one after the other, with the gradients of the whole.

The rows of the whole batch are pulled once, and their gradients pushed once; only what lies between, activations and
logits, is computed part by part. So a step equals that of the undivided batch up to the rounding of sums.
"""

import dataclasses

import tensorflow as tf

from lmscale.distribution import collectives
from lmscale.loss_scaling import unscaled
from lmscale.reading import Reading, StepRows
from lmscale.tables.rows import Rows, ShardRows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gradients:
    """What one replica's examples, or some of them, give.

    Attributes:
      losses: {head: scalar}, shares of the mean losses.
      penalty: scalar, share of the penalty.
      d_rows: `StepRows`.
      d_shards: {table: {parameter: gradient of every row of this shard}}, complete over all replicas.
      d_shard_rows: {head: `ShardRows`}, complete, of the same rows in all parts.
      d_layers: {path: tensor}, shares of the gradients of the layers.
      state: list of [examples, ...], what is carried on.
    """

    losses: dict
    penalty: tf.Tensor
    d_rows: StepRows
    d_shards: dict
    d_shard_rows: dict
    d_layers: dict
    state: list

    def unscaled(self, loss_scale):
        """Those of the loss, float32, where these are of the loss times a scale; losses and penalty have none."""

        def rows(of):
            return of and Rows(*unscaled((of.embedding, of.bias), loss_scale))

        return dataclasses.replace(
            self,
            d_rows=StepRows(
                **{
                    kind: {key: rows(each) for key, each in of.items()}
                    for kind, of in vars(self.d_rows).items()
                }
            ),
            d_shards=unscaled(self.d_shards, loss_scale),
            d_shard_rows={
                head: dataclasses.replace(of, gradients=rows(of.gradients))
                for head, of in self.d_shard_rows.items()
            },
            d_layers=unscaled(self.d_layers, loss_scale),
        )


def accumulate(value_and_gradients, reading, state, *, num_parts, communicates):
    """`Gradients` of a replica's examples, computed in equal parts.

    Args:
      value_and_gradients: function (part of the reading, part of the state, number of its first example) that returns
        the part's `Gradients`.
      reading: `Reading`.
      state: list of [examples, ...].
      num_parts: int, which divides the examples.
      communicates: whether `value_and_gradients` uses collectives.

    Returns:
      `Gradients`, whose losses, penalty and gradients are the sums of the parts'.
    """
    if num_parts == 1:
        return value_and_gradients(reading, state, 0)
    num_examples = next(iter(reading.features.values())).shape[0]
    size = num_examples // num_parts

    def part(k):
        return value_and_gradients(
            _part_of(reading, k, num_parts=num_parts), [_slice(s, k, num_parts) for s in state], k * size
        )

    if communicates and collectives.num_replicas() > 1:
        return _accumulate_without_loop(part, num_parts=num_parts)
    # The first part is outside the loop: it tells which gradients there are, and their shapes.
    first = part(0)
    summed, joined = _split(first)
    template = (summed, joined)
    flat_summed, flat_joined = tf.nest.flatten(summed), tf.nest.flatten(joined)
    arrays = [tf.TensorArray(x.dtype, size=num_parts, element_shape=x.shape).write(0, x) for x in flat_joined]

    def body(k, sums, arrays):
        own_summed, own_joined = _split(part(k))
        tf.nest.assert_same_structure((own_summed, own_joined), template)
        sums = [total + x for total, x in zip(sums, tf.nest.flatten(own_summed), strict=True)]
        arrays = [array.write(k, x) for array, x in zip(arrays, tf.nest.flatten(own_joined), strict=True)]
        return k + 1, sums, arrays

    _, sums, arrays = tf.while_loop(
        lambda k, *_: k < num_parts,
        body,
        [tf.constant(1), flat_summed, arrays],
        parallel_iterations=1,  # One part's activations at a time.
    )
    whole = [
        tf.ensure_shape(array.concat(), [num_parts * x.shape[0], *x.shape[1:]])
        for array, x in zip(arrays, flat_joined, strict=True)
    ]
    return _together(first, tf.nest.pack_sequence_as(summed, sums), tf.nest.pack_sequence_as(joined, whole))


def _accumulate_without_loop(part, *, num_parts):
    """`accumulate` as that many copies of the part's operations: replicas cannot meet within a loop of TensorFlow."""
    first = part(0)
    summed, parts_joined = _split(first)
    parts_joined = [parts_joined]
    for k in range(1, num_parts):
        # One part's activations at a time.
        with tf.control_dependencies(tf.nest.flatten(summed)):
            own_summed, own_joined = _split(part(k))
        summed = tf.nest.map_structure(tf.add, summed, own_summed)
        parts_joined.append(own_joined)
    joined = tf.nest.map_structure(lambda *parts: tf.concat(parts, axis=0), *parts_joined)
    return _together(first, summed, joined)


def _slice(x, k, num_parts):
    """Part k of equal parts along the first axis."""
    size = x.shape[0] // num_parts
    part = (
        x[k * size : (k + 1) * size]
        if isinstance(k, int)
        else tf.slice(x, [k * size] + [0] * (len(x.shape) - 1), [size, *x.shape[1:]])
    )
    return tf.ensure_shape(part, [size, *x.shape[1:]])


def _part_of(reading, k, *, num_parts):
    def cut(tree):
        return tf.nest.map_structure(lambda x: _slice(x, k, num_parts), tree)

    def rows(of):
        return {key: Rows(cut(r.embedding), None if r.bias is None else cut(r.bias)) for key, r in of.items()}

    return Reading(
        features=cut(dict(reading.features)),
        labels={
            name: label.part(lambda x: _slice(x, k, num_parts), num_parts=num_parts)
            for name, label in reading.labels.items()
        },
        candidates=reading.candidates,
        rows=StepRows(
            roles=rows(reading.rows.roles),
            labels=rows(reading.rows.labels),
            candidates=reading.rows.candidates,
        ),
        receipts=reading.receipts,
    )


def _tensors(rows):
    """{key: {"embedding": ..., "bias": ...}} of {key: `Rows` or None}, without what is None."""
    return {
        key: {name: x for name, x in (("embedding", r.embedding), ("bias", r.bias)) if x is not None}
        for key, r in rows.items()
        if r is not None
    }


def _split(gradients):
    """(what is summed over the parts, what is joined), as structures of tensors."""
    summed = {
        "losses": gradients.losses,
        "penalty": gradients.penalty,
        "candidates": _tensors(gradients.d_rows.candidates),
        "shards": gradients.d_shards,
        "shard_rows": _tensors({head: rows.gradients for head, rows in gradients.d_shard_rows.items()}),
        "layers": gradients.d_layers,
    }
    joined = {
        "roles": _tensors(gradients.d_rows.roles),
        "labels": _tensors(gradients.d_rows.labels),
        "state": gradients.state,
    }
    return summed, joined


def _together(first, summed, joined):
    """`Gradients` of all parts; `first` tells what is None."""

    def rows(of, tensors):
        return {
            key: None if r is None else Rows(tensors[key].get("embedding"), tensors[key].get("bias"))
            for key, r in of.items()
        }

    return Gradients(
        losses=summed["losses"],
        penalty=summed["penalty"],
        d_rows=StepRows(
            roles=rows(first.d_rows.roles, joined["roles"]),
            labels=rows(first.d_rows.labels, joined["labels"]),
            candidates=rows(first.d_rows.candidates, summed["candidates"]),
        ),
        d_shards=summed["shards"],
        d_shard_rows={
            head: ShardRows(rows.local_rows, Rows(**{"embedding": None} | summed["shard_rows"][head]))
            for head, rows in first.d_shard_rows.items()
        },
        d_layers=summed["layers"],
        state=joined["state"],
    )
