"""Batches of histories as pure functions of (seed, step): windows of users in training, targets in evaluations."""

import numpy as np

from lmscale.data.batches import ALL, Batch, checked_step, permuted
from lmscale.data.columns import Lists


class HistoryWindows:
    """Training batches: each history in windows of so many predictions, in a new order each epoch.

    A window predicts up to `window` items, each from those before it, which begin with the last item of the window
    before; a history of one item predicts nothing. What is behind the end of a history has the weight 0.
    """

    def __init__(self, histories: Lists, *, global_batch_size: int, window: int, seed: int):
        """Args:
          histories: of the training.
          global_batch_size: windows of a batch, over all devices.
          window: predictions of a window.
          seed: integer >= 0.

        Raises:
          ValueError: if there are not enough windows for a batch.
        """
        num_labels = np.maximum(histories.lengths - 1, 0)
        num_windows = -(-num_labels // window)
        owners = np.repeat(np.arange(len(histories)), num_windows)
        number = np.arange(len(owners)) - np.repeat(np.cumsum(num_windows) - num_windows, num_windows)
        # From the end, so that the last window of a history is a whole one, as evaluations see it.
        self._stops = histories.offsets[owners + 1] - (number * window)
        self._starts = np.maximum(histories.offsets[owners], self._stops - window - 1)
        self.steps_per_epoch = len(owners) // global_batch_size
        if self.steps_per_epoch < 1:
            raise ValueError(
                "The histories must have as many windows as a batch. Received: "
                f"{len(owners):,} windows of {window} predictions, global_batch_size={global_batch_size}. Set "
                f"GLOBAL_BATCH_SIZE to at most {len(owners):,}, or prepare more data."
            )
        # Of the batches of an epoch on average: how many are no padding.
        self.labels_per_step = round(int(num_labels.sum()) * global_batch_size / len(owners))
        self._histories, self._window, self._seed = histories, window, seed
        self._rows = np.arange(global_batch_size, dtype=np.int64)

    def at(self, step: int, examples: slice = ALL) -> Batch:
        """ "ids" [examples, window + 1] int32 and "weights" [examples, window] float32 of all but the first."""
        epoch, step_in_epoch = divmod(checked_step(step), self.steps_per_epoch)
        places = step_in_epoch * len(self._rows) + self._rows[examples]
        chosen = permuted(places, len(self._starts), seed=self._seed, epoch=epoch)
        starts, stops = self._starts[chosen], self._stops[chosen]
        ids = self._histories.between(starts, stops, self._window + 1)
        weights = (np.arange(1, self._window + 1) < (stops - starts)[:, None]).astype(np.float32)
        return Batch({"ids": ids, "weights": weights}, starts_epoch=True, epoch=epoch)


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
