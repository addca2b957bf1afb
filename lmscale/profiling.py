"""A profile of chosen steps, for TensorBoard's Profile tab."""

import contextlib
import logging
from pathlib import Path

import tensorflow as tf

_logger = logging.getLogger(__name__)


class Profiler:
    """Profiles the steps `first` to `last` of a run. Use it as a context manager.

    It costs nothing where there is nothing to profile. A profile that cannot be made or written does not end the run.
    Every process of a run has one and asks it the same, since calls of several steps end where the profile does.
    """

    def __init__(self, steps: tuple[int, int] | None, *, directory: Path, is_written: bool = True):
        """Args:
        steps: (first, last), from 1; None for no profile.
        directory: TensorBoard's folder of the training.
        is_written: False for a process that writes nothing.
        """
        self._first, self._last = steps or (1, 0)
        self._directory = directory
        self._is_written = is_written
        self._is_on = False

    def due(self, step: int) -> int | None:
        """How many steps after `step` the profile begins or ends; None if it does neither any more."""
        ahead = [boundary - step for boundary in (self._first - 1, self._last) if boundary > step]
        return min(ahead, default=None)

    def resume(self, step: int) -> None:
        """Says so if a run that goes on after `step` has nothing to profile."""
        if self._is_written and self._first <= self._last <= step:
            _logger.warning(
                "nothing is profiled: the run goes on after step %d, and --profile_steps=%d:%d are done",
                step,
                self._first,
                self._last,
            )

    def call(self, step: int) -> contextlib.AbstractContextManager:
        """A context for the call that does the updates after `step`; turns the profile on if they are part of it."""
        if not (self._is_written and self._first - 1 <= step < self._last):
            return contextlib.nullcontext()
        if not self._is_on:
            try:
                tf.profiler.experimental.start(str(self._directory))
            except tf.errors.OpError as error:
                self._give_up(error)
                return contextlib.nullcontext()
            self._is_on = True
        # TensorBoard knows a step by this name and `_r`.
        return tf.profiler.experimental.Trace("train", step_num=step + 1, _r=1)

    def is_last(self, step: int) -> bool:
        """Whether the profile ends with this step."""
        return step == self._last

    def close(self) -> None:
        """Writes the profile, if it is on. The steps of it must be done: a GPU may be behind."""
        if not self._is_on:
            return
        self._is_on = False
        try:
            tf.profiler.experimental.stop()
        except (tf.errors.OpError, OSError) as error:
            self._give_up(error)
        else:
            _logger.info("a profile is in %s", self._directory / "plugins" / "profile")

    def _give_up(self, error):
        self._is_written = False
        _logger.warning("NOT PROFILED: %s", getattr(error, "message", error))

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *exception) -> None:
        self.close()
