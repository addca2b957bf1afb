"""What a step moves between devices, counted from the ids of a batch alone; and which way moves less.

Rows meet hidden states in one of two places (`Head.exchange`). "rows": a device gets each distinct row that its tokens
and candidates need from the shard that owns it, and sends the row's summed gradient back. "hidden": its hidden states
go to every shard, which compares them with the candidates that it holds, and their gradients come back; only the rows
of inputs and labels travel. The former grows with the distinct ids, the latter with the tokens of all devices; neither
with the vocabulary.

Nobody can move less than these counts on the way in question: a row that a device has not is sent to it once, and the
sum of what a device adds to a row is sent once. They are those that `lmscale.distribution.ledger` finds in a step that
runs in one process; between processes, all-to-alls are padded.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np
import tensorflow as tf
from rich.table import Table

from lmscale.softmax.head import candidates_seed
from lmscale.tables.placement import Placement

# Parts of a step, as its collectives are told apart by `ledger.part`, and what they are.
PARTS = {
    "ids": "ids of rows that are asked for, and of candidates",
    "rows": "rows",
    "row_gradients": "gradients of rows",
    "hidden_states": "hidden states, their gradients, logsumexps",
    "layers": "gradients of layers",
    "others": "all else",
}
_ID_BYTES = _FLOAT_BYTES = 4
# Hidden states take four collectives more than rows, which wait for one another: "auto" has them travel only if that
# moves less than this part of what rows do.
_WORTH_IT = 0.8


def row_bytes_received(ids, shared_ids, *, placement, row_bytes):
    """What devices receive for rows to come from their owners, and for their gradients to get back.

    Args:
      ids: [num_devices, n] int, those that each device needs the rows of.
      shared_ids: [s] int, those that every device needs.
      placement: `Placement` of the rows.
      row_bytes: int, bytes of a row or of its gradient.

    Returns:
      {part: [num_devices] int64} of the parts "ids", "rows" and "row_gradients".
    """
    num_devices = placement.num_shards
    # asked[i, j]: distinct rows of shard j that device i needs; nothing of its own travels.
    asked = np.stack(
        [
            np.bincount(placement.owner(np.union1d(own, shared_ids)).astype(np.int64), minlength=num_devices)
            for own in ids
        ]
    )
    np.fill_diagonal(asked, 0)
    of_others, of_own = asked.sum(axis=1), asked.sum(axis=0)
    return {
        "ids": _ID_BYTES * of_own,
        "rows": row_bytes * of_others,
        "row_gradients": row_bytes * of_own,
    }


@dataclasses.dataclass(frozen=True)
class _Reads:
    """What the devices read of a batch: of one head or lookup, of one table."""

    table: str
    ids: np.ndarray  # [num_devices, n]


class StepTraffic:
    """What the devices receive in the step of a given batch, by the exchange of its heads.

    Attributes:
      num_devices: N.
    """

    def __init__(self, task, features, *, num_devices, seed, step=0, frozen_tables=()):
        """Draws the candidates, by operations of TensorFlow.

        Args:
          task: `Task`.
          features: {name: [global examples, ...] array}, which num_devices divides.
          num_devices: N.
          seed, step: what candidates depend on, ints.
          frozen_tables: names of tables whose rows have no update rule: no gradients travel.
        """
        self._frozen_tables = frozenset(frozen_tables)
        self.num_devices = num_devices
        self._task = task
        of_devices = [
            {name: np.split(x, num_devices)[i] for name, x in features.items()} for i in range(num_devices)
        ]
        lookups = [task.lookups(own) for own in of_devices]
        labels = [task.labels(own) for own in of_devices]
        self._lookups = [
            _Reads(lookup.table, _stacked(own[role].ids for own in lookups))
            for role, lookup in lookups[0].items()
        ]
        self._labels = {
            name: _Reads(head.table, _stacked(own[name].ids for own in labels))
            for name, head in task.heads.items()
        }
        self._only_rows = {name for name in task.heads if labels[0][name].neighbours is not None}
        self._candidates = {}
        for number, (name, head) in enumerate(task.heads.items()):
            found = head.candidates(
                seed=candidates_seed(seed, head=number, step=tf.constant(step)),
                labels=tf.constant(self._labels[name].ids.reshape(-1), tf.int32),
            )
            if found is not None:
                self._candidates[name] = np.asarray(found.sampled_ids)

    def bytes_received(self, exchanges, *, layer_values=0):
        """{part: [num_devices] int64}: bytes that each device receives.

        Args:
          exchanges: {head: "rows" or "hidden"}, of those with candidates.
          layer_values: int, trained values of the layers, whose gradients are summed over the devices.
        """
        task, num_devices = self._task, self.num_devices
        total = {part: np.zeros([num_devices], np.int64) for part in PARTS}
        for name, config in task.tables.items():
            own = [reads.ids for reads in self._lookups if reads.table == name]
            shared = [np.zeros([0], np.int64)]
            for head_name, head in task.heads.items():
                if head.table != name:
                    continue
                rows_travel = head_name in self._candidates and exchanges[head_name] == "rows"
                if head.needs_label_rows and not (rows_travel and head.candidates_are_labels):
                    own.append(self._labels[head_name].ids)
                if rows_travel:
                    shared.append(self._candidates[head_name])
            if not own and len(shared) == 1:
                continue
            moved = row_bytes_received(
                np.concatenate([np.zeros([num_devices, 0], np.int64), *own], axis=1),
                np.concatenate(shared),
                placement=Placement(vocab_size=task.num_rows(name), num_shards=num_devices),
                row_bytes=_FLOAT_BYTES * (config.embed_dim + (config.bias != "none")),
            )
            for part, values in moved.items():
                if part != "row_gradients" or name not in self._frozen_tables:
                    total[part] += values
        for name, head in task.heads.items():
            if head.candidates_are_labels:
                total["ids"] += (num_devices - 1) * _ID_BYTES * self._labels[name].ids.shape[1]
            if name not in self._candidates or exchanges[name] == "hidden":
                total["hidden_states"] += (
                    (num_devices - 1)
                    * self._labels[name].ids.shape[1]
                    * head.hidden_bytes_per_token(
                        embed_dim=task.tables[head.table].embed_dim, num_devices=num_devices
                    )
                )
        total["layers"] += 2 * (num_devices - 1) * _FLOAT_BYTES * layer_values // num_devices
        return total

    def of_busiest_device(self, exchanges, *, layer_values=0):
        """{part: bytes} of the device that receives most; arguments as of `bytes_received`."""
        received = self.bytes_received(exchanges, layer_values=layer_values)
        device = int(np.argmax(sum(received.values())))
        return {part: int(values[device]) for part, values in received.items()}

    @property
    def has_choice(self):
        """Whether hidden states could travel in place of the candidates' rows of some head."""
        heads = [self._task.heads[name] for name in self._candidates if name not in self._only_rows]
        return any(
            head.hidden_bytes_per_token(
                embed_dim=self._task.tables[head.table].embed_dim, num_devices=self.num_devices
            )
            for head in heads
        )

    def everywhere(self, exchange):
        """{head: exchange} of the heads with candidates."""
        return dict.fromkeys(self._candidates, exchange)

    def chosen(self, *, static_shapes=False):
        """{head: "rows" or "hidden"} of the heads with candidates: as they say, "auto" by what the batch moves.

        With "auto", rows travel unless hidden states move less than 0.8 of their bytes.

        Args:
          static_shapes: whether shapes may not depend on ids; then only rows can travel.

        Raises:
          ValueError: if a head says "hidden" where it cannot be.
        """
        heads = {name: self._task.heads[name] for name in self._candidates}
        for name in self._only_rows & heads.keys():
            if heads[name].exchange == "hidden":
                raise ValueError(
                    "The exchange of a head must be 'rows' where a word has several labels. Received: "
                    "exchange='hidden'. Leave out SampledSoftmax.exchange."
                )
        given = {name: head.exchange for name, head in heads.items() if head.exchange != "auto"}
        if static_shapes and "hidden" in given.values():
            raise ValueError(
                "The exchange of a head must be 'rows' in a step of static shapes, as XLA compiles it. Received: "
                "exchange='hidden'. Leave out SampledSoftmax.exchange."
            )
        exchanges = self.everywhere("rows") | given
        if not static_shapes:
            for name in [name for name in heads if name not in given and name not in self._only_rows]:
                other = exchanges | {name: "hidden"}
                if _sum(self.of_busiest_device(other)) < _WORTH_IT * _sum(self.of_busiest_device(exchanges)):
                    exchanges = other
        return exchanges


def num_layer_values(layers, treatments):
    """How many trained values `Layers` have by {path: `Treatment`}: of those without an update rule, no gradient."""
    return sum(
        int(variable.shape.num_elements())
        for path, variable in layers.trainable_variables.items()
        if treatments[path].update is not None
    )


def as_table(traffic, exchanges, *, layer_values):
    """The bytes that the busiest device receives in a step, both ways, as a table to print.

    Args:
      traffic: `StepTraffic`.
      exchanges: {head: "rows" or "hidden"}, what was chosen.
      layer_values: as of `StepTraffic.bytes_received`.
    """
    ways: dict[str, Mapping[str, int]] = {
        exchange: traffic.of_busiest_device(traffic.everywhere(exchange), layer_values=layer_values)
        for exchange in ("rows", "hidden")
    }
    if not traffic.has_choice:
        ways = {"": ways["rows"]}
    elif len(set(exchanges.values())) > 1:
        ways["chosen"] = traffic.of_busiest_device(exchanges, layer_values=layer_values)
    table = Table(
        title=f"KiB that a step moves to each of {traffic.num_devices} device(s), from the first batch",
        title_justify="left",
    )
    table.add_column("part")
    for way in ways:
        is_chosen = way == "chosen" or set(exchanges.values()) == {way}
        table.add_column(f"{way} travel{', chosen' if is_chosen else ''}" if way else "KiB", justify="right")
    for part, meaning in PARTS.items():
        values = [of_parts[part] for of_parts in ways.values()]
        if any(values):
            table.add_row(meaning, *(f"{x / 2**10:,.1f}" for x in values))
    table.add_row("in all", *(f"{_sum(of_parts) / 2**10:,.1f}" for of_parts in ways.values()))
    return table


def _stacked(of_devices):
    """[num_devices, n] of the ids of each."""
    return np.stack([np.asarray(ids).reshape(-1) for ids in of_devices])


def _sum(of_parts):
    return sum(of_parts.values())
