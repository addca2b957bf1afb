"""Classes, many of them, from categorical features, bags and numbers; one matrix may serve all features."""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import keras
import tensorflow as tf

from lmscale import measures as rank_measures
from lmscale.data.example_batches import EveryExample, Examples, ShuffledExamples
from lmscale.softmax.head import Head
from lmscale.tables.rows import Lookup
from lmscale.tables.table_config import TableConfig
from lmscale.tasks.task import Labels, Task, TaskContext

_WEIGHTS = "{}_weights"


class Classification(Task):
    """Rows of features, joined, through hidden layers, to one or several heads.

    Each categorical feature reads a row of its table, a bag the sum or mean of several. With `shared_dim` each of them
    is multiplied by one and the same matrix without bias (`layers/shared/kernel`), whatever table it is from. They are
    joined with the numbers, go through hidden layers (`layers/hidden_0`, ...), and a matrix for each head
    (`layers/to_HEAD`) brings them to the width of its table.

    How often the shared matrix is updated is a matter of its group: `Group(pattern="layers/shared/.*",
    active=Every(period=K))`. An early head reads the joined features themselves: so the shared matrix is trained
    directly, too.
    """

    def __init__(
        self,
        context: TaskContext,
        *,
        tables: Mapping[str, TableConfig],
        features: Mapping[str, str],
        labels: Mapping[str, str],
        head: Callable[..., Head],
        early_labels: Mapping[str, str] | None = None,
        numbers: Sequence[str] = (),
        bags: Literal["mean", "sum"] = "mean",
        bag_length: int = 32,
        shared_dim: int | None = None,
        hidden_dims: Sequence[int] = (),
        activation: str = "relu",
        dropout: float = 0.0,
        measures: Sequence[str] = ("accuracy@1", "accuracy@5", "mrr"),
    ):
        """Builds heads and layers.

        Args:
          context: `TaskContext`.
          tables: {name: `TableConfig`} of the tables named by features and labels.
          features: {column of ids or lists: table whose rows it reads}.
          labels: {column: table with a row for each class}, a head each, named as the column.
          head: function (table=, vocab_size=, counts=) that returns a `Head`.
          early_labels: likewise, of heads before the hidden layers, named COLUMN_early; None for none.
          numbers: columns of numbers.
          bags: what becomes of the rows of a bag; of an empty one, zeros.
          bag_length: ids of a bag at most, the last ones.
          shared_dim: columns of the matrix that all features are multiplied by; None for no such matrix.
          hidden_dims: widths of the hidden layers.
          activation: of the hidden layers, as Keras names it.
          dropout: rate after each hidden layer.
          measures: of the ranks of classes, see `lmscale.measures`.

        Raises:
          ValueError: for columns that the data has not or of another type, tables that are not there or not used, a
            bias without effect, widths that do not fit one matrix, sizes below 1, an unknown measure.
        """
        early_labels = early_labels or {}
        super().__init__(context, tables=tables)
        heads = {**labels, **{f"{name}_early": table for name, table in early_labels.items()}}
        _check_tables(tables, features=features, heads=heads)
        if shared_dim is not None:
            _check_one_width(tables, features)
        for name, values in (
            ("bag_length", [bag_length]),
            ("hidden_dims", hidden_dims),
            ("shared_dim", [shared_dim]),
        ):
            if any(value is not None and value < 1 for value in values):
                raise ValueError(f"{name} must be at least 1. Received: {name}={values}.")
        rank_measures.check_names(measures)
        self._features, self._numbers, self._bags = features, tuple(numbers), bags
        self._columns_of_heads = {**{n: n for n in labels}, **{f"{n}_early": n for n in early_labels}}
        self._names = list(dict.fromkeys([*features, *numbers, *labels, *early_labels]))
        _check_columns(
            context.columns.columns,
            tables,
            uses=[
                *((name, ("ids", "lists"), table) for name, table in features.items()),
                *((name, ("numbers",), None) for name in numbers),
                *((self._columns_of_heads[head], ("ids",), table) for head, table in heads.items()),
            ],
        )
        self._early = [f"{name}_early" for name in early_labels]
        self._bag_length, self._dropout = bag_length, dropout
        self.heads = {name: self.make_head(head, table=table) for name, table in heads.items()}
        self.measures = dict.fromkeys(heads, tuple(measures))
        self.layers = {}
        dims = {name: tables[table].embed_dim for name, table in features.items()}
        if shared_dim is not None:
            self._add("shared", shared_dim, next(iter(dims.values())), use_bias=False)
            dims = dict.fromkeys(dims, shared_dim)
        width = joined = sum(dims.values()) + sum(context.columns.columns[name].dim for name in numbers)
        for number, hidden_dim in enumerate(hidden_dims):
            self._add(f"hidden_{number}", hidden_dim, width, activation=activation)
            width = hidden_dim
        for name, table in heads.items():
            self._add(f"to_{name}", tables[table].embed_dim, joined if name in self._early else width)
        self._hidden_layers = [self.layers[f"hidden_{number}"] for number in range(len(hidden_dims))]

    def _add(self, name, units, input_dim, **settings):
        self.layers[name] = keras.layers.Dense(units, name=name, **settings)
        self.layers[name].build([None, input_dim])

    def examples(self, split):
        """The `Examples` of a split."""
        longest = dict.fromkeys(self._features, self._bag_length)
        return Examples(self.context.columns, split, self._names, longest=longest)

    def training_batches(self):
        """Every example once an epoch."""
        return ShuffledExamples(
            self.examples("train"),
            global_batch_size=self.context.global_batch_size,
            labels_per_example=len(self.heads),
            seed=self.context.seed,
        )

    def evaluation_batches(self, split, *, limit=None):
        """Every example once."""
        return EveryExample(self.examples(split), batch_size=self.context.eval_batch_size, limit=limit)

    def lookups(self, features):
        """The values of each feature."""
        return {name: Lookup(table, features[name]) for name, table in self._features.items()}

    def labels(self, features):
        """The class of each example, for each head."""
        found = {}
        for head, column in self._columns_of_heads.items():
            ids = features[column]
            weights = features.get("weights")
            found[head] = Labels(
                ids, tf.ones(ids.shape) if weights is None else tf.convert_to_tensor(weights)
            )
        return found

    def forward(self, rows, features, state, *, dropout):
        """Rows and numbers to the hidden state of each head."""
        parts = []
        for name in self._features:
            x = rows[name].embedding
            if len(x.shape) == 3:
                weights = features[_WEIGHTS.format(name)]
                x = tf.reduce_sum(x * weights[..., tf.newaxis], axis=1)
                if self._bags == "mean":
                    x /= tf.maximum(tf.reduce_sum(weights, axis=1, keepdims=True), 1.0)
            parts.append(self.layers["shared"](x) if "shared" in self.layers else x)
        parts += [features[name] for name in self._numbers]
        dtype = parts[0].dtype
        joined = x = tf.concat([tf.cast(part, dtype) for part in parts], axis=1)
        for layer in self._hidden_layers:
            x = layer(x)
            if dropout is not None:
                x = dropout.dropout(x[:, tf.newaxis], self._dropout)[:, 0]
        return {
            name: tf.cast(self.layers[f"to_{name}"](joined if name in self._early else x), tf.float32)
            for name in self.heads
        }, state


def _check_tables(tables, *, features, heads):
    wanted, given = {*features.values(), *heads.values()}, set(tables)
    if wanted != given:
        missing, unused = sorted(wanted - given), sorted(given - wanted)
        raise ValueError(
            "The tables must be those that features and labels name. Received: "
            f"features={dict(features)!r}, labels={dict(heads)!r}, tables {sorted(given)}"
            + (f"; missing: {', '.join(missing)}" if missing else "")
            + (f"; not used: {', '.join(unused)}" if unused else "")
            + "."
        )
    if not features or not heads:
        raise ValueError(f"There must be features and labels. Received: {dict(features)!r}, {dict(heads)!r}.")
    for name in set(features.values()) - set(heads.values()):
        if tables[name].bias != "none":
            raise ValueError(
                "A table that only features read must have no bias, which belongs to the softmax. Received: "
                f"bias={tables[name].bias!r} of the table {name!r}. Set its TableConfig.bias = 'none'."
            )


def _check_columns(columns, tables, *, uses):
    """Raises ValueError unless each of `uses`, (column, types, table or None), is of such a type and vocabulary."""
    for name, wanted, table in uses:
        found = columns[name].type if name in columns else None
        if found not in wanted:
            raise ValueError(
                f"The column {name!r} must be there, of {' or '.join(wanted)}. Received: "
                f"{found or 'no such column'}; there are {', '.join(columns)}. Correct Classification.features, "
                "numbers or labels, or prepare the data with another schema."
            )
        vocabulary = columns[name].vocabulary
        if table is not None and tables[table].vocabulary != vocabulary:
            raise ValueError(
                f"The table of a column must have rows of its vocabulary. Received: the column {name!r} of "
                f"{vocabulary!r}, the table {table!r} of {tables[table].vocabulary!r}. Set its "
                f"TableConfig.vocabulary = {vocabulary!r}."
            )


def _check_one_width(tables, features):
    widths = {table: tables[table].embed_dim for table in features.values()}
    if len(set(widths.values())) > 1:
        raise ValueError(
            "With shared_dim the tables of all features must have one width: one matrix multiplies them. Received: "
            f"embed_dim {widths}. Give them one, or leave shared_dim out."
        )
