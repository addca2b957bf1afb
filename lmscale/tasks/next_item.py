"""Recommendation of the next item: each item of a user's history from those before it."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import tensorflow as tf

from lmscale import measures as rank_measures
from lmscale.bodies.body import Body
from lmscale.bodies.encoder import Encoder
from lmscale.data.columns import Lists
from lmscale.data.history_batches import EveryWindow, HistoryWindows, TargetBatches
from lmscale.softmax.head import Head
from lmscale.tables.rows import Lookup
from lmscale.tables.table_config import TableConfig, check_inputs_and_outputs
from lmscale.tasks.task import Labels, Task, TaskContext

_ROLE, _HEAD = "history", "next"


class NextItem(Task):
    """A causal body over histories, between an input table and an output table; one for both is tied.

    Attributes:
      eval_window: items of a history that an evaluation reads.

    A body that carries a state starts each history without one. Evaluations of "valid" and "test" predict the target
    of each user from the end of the history, exactly, against the whole catalogue; those of "train" the windows of the
    training.

    Source: Kang & McAuley 2018, arXiv:1808.09781 (SASRec); Hidasi et al. 2016, arXiv:1511.06939 (GRU4Rec).
    """

    def __init__(
        self,
        context: TaskContext,
        *,
        tables: Mapping[str, TableConfig],
        inputs: str,
        outputs: str,
        body: Callable[[], Body],
        head: Callable[..., Head],
        window: int,
        eval_window: int | None = None,
        exclude_seen: bool = True,
        measures: Sequence[str] = ("ndcg@10", "hr@10", "mrr"),
        history: str = "history",
        target: str = "target",
    ):
        """Builds head and body.

        Args:
          context: `TaskContext`.
          tables: {name: `TableConfig`} of the tables named by `inputs` and `outputs`.
          inputs: name of the table whose rows the body reads.
          outputs: name of the table that holds the softmax rows.
          body: function of no arguments that returns a `Body`.
          head: function (table=, vocab_size=, counts=) that returns a `Head`.
          window: items of a history that a training example predicts.
          eval_window: items of a history that an evaluation reads, the last ones; None for `window`.
          exclude_seen: whether items of a user's history do not compete with the target in an evaluation's ranks.
          measures: of the ranks of targets, see `lmscale.measures`.
          history, target: names of the columns.

        Raises:
          ValueError: for data without these columns, tables that are not there or not used, sizes below 1, an unknown
            measure, and what `Encoder` refuses.
        """
        check_inputs_and_outputs(tables, inputs=inputs, outputs=outputs)
        super().__init__(context, tables=tables)
        for name, value in (("window", window), ("eval_window", eval_window)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1. Received: {name}={value}.")
        rank_measures.check_names(measures)
        self.heads = {_HEAD: self.make_head(head, table=outputs)}
        self.measures = {_HEAD: tuple(measures)}
        self._inputs = inputs
        self._window, self.eval_window = window, eval_window or window
        self._exclude_seen = exclude_seen
        self._columns = history, target
        trained = context.per_replica_batch_size, window
        evaluated = context.per_replica_eval_batch_size, self.eval_window
        batch_size, time = trained if context.training else evaluated
        self.encoder = Encoder(
            body(),
            input_dim=tables[inputs].embed_dim,
            output_dim=tables[outputs].embed_dim,
            batch_size=batch_size,
            window=time,
            probe_shape=evaluated,
        )
        self.layers = self.encoder.layers

    def training_batches(self):
        """Windows of histories, shuffled."""
        return HistoryWindows(
            self.context.columns.column("train", self._columns[0]),
            global_batch_size=self.context.global_batch_size,
            window=self._window,
            seed=self.context.seed,
        )

    def evaluation_batches(self, split, *, limit=None):
        """The targets of users, or windows of the training."""
        history, target = self._columns
        if split == "train":
            return EveryWindow(
                self.context.columns.column("train", history),
                batch_size=self.context.eval_batch_size,
                window=self._window,
                limit=limit,
            )
        targets = self.context.columns.column(split, target)[:limit]
        if not len(targets):
            raise ValueError(
                f"The split to evaluate must have users. Received: {split}, empty. Prepare data with such a split."
            )
        histories = self.context.columns.column(split, history)
        return TargetBatches(
            histories,
            targets,
            batch_size=self.context.eval_batch_size,
            window=self.eval_window,
            longest_seen=histories.lengths.max() if self._exclude_seen else 0,
        )

    def features_of(self, histories):
        """Features of histories whose next item is asked for, as `lookups` and `forward` take them.

        Args:
          histories: lists of ids, the oldest first, none empty.

        Returns:
          {name: [histories, ...]}; "seen" [histories, longest] are all items of each, -1 behind.
        """
        offsets = np.cumsum([0, *map(len, histories)])
        lists = Lists(np.concatenate(histories), offsets)
        longest = 1 << int(lists.lengths.max() - 1).bit_length()  # Few different shapes.
        none = np.zeros([len(histories)], np.int32)
        batch = TargetBatches(
            lists, none, batch_size=len(histories), window=self.eval_window, longest_seen=longest
        )
        return batch.at(0).features

    def lookups(self, features):
        """The items of the history."""
        ids = features["ids"] if "target" in features else features["ids"][:, :-1]
        return {_ROLE: Lookup(self._inputs, ids)}

    def labels(self, features):
        """The target of each user; in training, each item of a window but the first."""
        if "target" in features:
            return {_HEAD: Labels(features["target"], features["weights"], excluded=features.get("seen"))}
        ids, weights = features["ids"][:, 1:], features["weights"]
        return {_HEAD: Labels(tf.reshape(ids, [-1]), tf.reshape(weights, [-1]))}

    def forward(self, rows, features, state, *, dropout):
        """Histories to the hidden state before each label."""
        inputs = rows[_ROLE].embedding
        fresh = self.encoder.body.initial_state(inputs.shape[0])
        hidden, _ = self.encoder(inputs, fresh, dropout=dropout)
        hidden = tf.cast(hidden, tf.float32)
        if "target" in features:
            return {_HEAD: tf.gather(hidden, features["last"], axis=1, batch_dims=1)}, state
        return {_HEAD: tf.reshape(hidden, [-1, hidden.shape[-1]])}, state
