"""Batches of histories as pure functions of (seed, step): windows of users in training, targets in evaluations."""

import numpy as np

from lmscale.data.batches import ALL, Batch, checked_step, permuted
from lmscale.data.columns import Lists


class _Windows:
    """Histories cut into windows that predict up to `window` items each, from those before them in the window.

    Cut from the end, so that the last window of a history is a whole one, as evaluations see it. A window begins with
    the last item of the one before; a history of one item has none.

    Attributes:
      num_labels: [windows] int64, items that each predicts.
    """

    def __init__(self, histories: Lists, *, window: int):
        of_histories = -(-np.maximum(histories.lengths - 1, 0) // window)
        owners = np.repeat(np.arange(len(histories)), of_histories)
        number = np.arange(len(owners)) - np.repeat(np.cumsum(of_histories) - of_histories, of_histories)
        self._histories, self._window = histories, window
        self._stops = histories.offsets[owners + 1] - number * window
        self._starts = np.maximum(histories.offsets[owners], self._stops - window - 1)
        self.num_labels = self._stops - self._starts - 1

    def __len__(self):
        return len(self._starts)

    def at(self, chosen) -> dict[str, np.ndarray]:
        """{"ids" [n, window + 1] int32, "weights" [n, window] float32 of all but the first} of some windows."""
        ids = self._histories.between(self._starts[chosen], self._stops[chosen], self._window + 1)
        weights = np.arange(self._window) < self.num_labels[chosen][:, None]
        return {"ids": ids, "weights": weights.astype(np.float32)}


class HistoryWindows:
    """Training batches: each history in windows, in a new order each epoch, but for a last part of a batch."""

    def __init__(self, histories: Lists, *, global_batch_size: int, window: int, seed: int):
        """Args:
          histories: of the training.
          global_batch_size: windows of a batch, over all devices.
          window: predictions of a window at most; behind them the weight is 0.
          seed: integer >= 0.

        Raises:
          ValueError: if there are not enough windows for a batch.
        """
        self._windows = _Windows(histories, window=window)
        num_windows = len(self._windows)
        self.steps_per_epoch = num_windows // global_batch_size
        if not num_windows:
            raise ValueError(
                f"A history must have two items or more to predict one from another. Received: {len(histories):,} "
                "histories of at most one. Prepare data with longer ones."
            )
        if self.steps_per_epoch < 1:
            raise ValueError(
                "The histories must have as many windows as a batch. Received: "
                f"{num_windows:,} windows of {window} predictions, global_batch_size={global_batch_size}. Set "
                f"GLOBAL_BATCH_SIZE to at most {num_windows:,}, or prepare more data."
            )
        # Of the batches of an epoch on average: those that are no padding.
        self.labels_per_step = round(int(self._windows.num_labels.sum()) * global_batch_size / num_windows)
        self._seed = seed
        self._rows = np.arange(global_batch_size, dtype=np.int64)

    def at(self, step: int, examples: slice = ALL) -> Batch:
        """The batch of a step, or some of its examples: features as of `_Windows.at`."""
        epoch, step_in_epoch = divmod(checked_step(step), self.steps_per_epoch)
        places = step_in_epoch * len(self._rows) + self._rows[examples]
        chosen = permuted(places, len(self._windows), seed=self._seed, epoch=epoch)
        return Batch(self._windows.at(chosen), starts_epoch=True, epoch=epoch)


class EveryWindow:
    """Evaluation batches: the windows of all histories in order, each prediction once."""

    def __init__(self, histories: Lists, *, batch_size: int, window: int, limit: int | None = None):
        """Args:
        histories: [users].
        batch_size: windows of a batch.
        window: as of `HistoryWindows`.
        limit: predictions to stop after; None for all.
        """
        self._windows = _Windows(histories, window=window)
        ends = np.cumsum(self._windows.num_labels)
        total = int(ends[-1]) if len(ends) else 0
        self.num_labels = total if limit is None else min(limit, total)
        # How many labels of each window count.
        self._num_counted = np.clip(
            self.num_labels - (ends - self._windows.num_labels), 0, self._windows.num_labels
        )
        self.num_steps = -(-int(np.count_nonzero(self._num_counted)) // batch_size)
        self._batch_size = batch_size

    def at(self, step: int, examples: slice = ALL) -> Batch:
        """The batch of a step, or some of its examples."""
        places = step * self._batch_size + np.arange(self._batch_size)[examples]
        is_window = places < len(self._windows)
        places = np.where(is_window, places, 0)
        features = self._windows.at(places)
        counted = np.where(is_window, self._num_counted[places], 0)
        counts = np.arange(features["weights"].shape[1]) < counted[:, None]
        return Batch(features | {"weights": features["weights"] * counts})


class TargetBatches:
    """Evaluation batches: the target of each user, from the end of the history before it."""

    def __init__(self, histories: Lists, targets, *, batch_size: int, window: int, longest_seen: int):
        """Args:
        histories: [users].
        targets: [users] ids.
        batch_size: users of a batch.
        window: items of a history that are read, the last ones.
        longest_seen: items of a history at most that "seen" tells, the last ones; 0 for no "seen".
        """
        self.num_labels = len(targets)
        self.num_steps = -(-len(targets) // batch_size)
        self._histories, self._targets, self._window = histories, targets, window
        self._batch_size = batch_size
        self._longest = int(longest_seen)

    def at(self, step: int, examples: slice = ALL) -> Batch:
        """ "ids" [examples, window], "last" [examples] of the place of the last item, "target", "weights", "seen"."""
        users = step * self._batch_size + np.arange(self._batch_size)[examples]
        is_user = users < len(self._targets)
        users = np.where(is_user, users, 0)
        lengths = self._histories.lengths[users]
        features = {
            "ids": self._histories.padded(users, self._window),
            "last": np.clip(lengths, 1, self._window).astype(np.int32) - 1,
            "target": np.asarray(self._targets)[users].astype(np.int32),
            "weights": is_user.astype(np.float32),
        }
        if self._longest:
            features["seen"] = self._histories.padded(users, self._longest, padding=-1)
        return Batch(features)
