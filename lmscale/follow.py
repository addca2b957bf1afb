"""Evaluates the checkpoints of a run as they appear, in a job of its own beside the one that trains.

A checkpoint is evaluated once, in the order of steps, and reported to TensorBoard and metrics.jsonl in the folder
`eval_SPLIT` of the work directory. The lines there say what has been evaluated, also to a later start. Nothing else of
the run is written to.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator

from lmscale import evaluation
from lmscale.checkpoints.directory import Checkpoints, UnavailableError
from lmscale.distribution.process_group import ProcessGroup
from lmscale.metrics import MetricsWriter, format_log_line, read_metrics
from lmscale.restored import RestoredModel
from lmscale.storage import as_path
from lmscale.workdir import Workdir, locked

_logger = logging.getLogger(__name__)


class Follower:
    """Follows one run on one split, alone: the chief holds a lock in `eval_SPLIT`. Use it as a context manager.

    `wait_for_run`, then `reports`. Of several processes, each calls both; what to do next, the chief decides.
    """

    def __init__(
        self,
        path,
        *,
        split: str,
        poll_secs: float = 10.0,
        group: ProcessGroup | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ):
        """Args:
        path: work directory of the run, which need not be there yet.
        split: "train", "valid" or "test".
        poll_secs: how long to wait, in seconds, before looking again.
        group: `ProcessGroup`; None for one process.
        sleep: function of seconds that waits.
        """
        self._path = as_path(path)
        self._split = split
        self._poll_secs = poll_secs
        self._group = group or ProcessGroup()
        self._sleep = sleep
        self._unavailable: set[int] = set()
        self._open = contextlib.ExitStack()

    def wait_for_run(self) -> Workdir:
        """Waits until the run has a checkpoint, by when its configuration is final.

        Returns:
          Its `Workdir`, readonly.

        Raises:
          ValueError: if another process follows the run on this split; if the run is finished and has no checkpoint.
          OSError: if the folder cannot be made or written to.
        """
        if self._group.is_chief:
            if not self._path.is_dir():
                _logger.info("waiting for a run to start in %s", self._path)
            while not self._path.is_dir():
                self._sleep(self._poll_secs)
            workdir = Workdir(self._path, readonly=True)
            folder = workdir.followed_dir(self._split)
            self._open.enter_context(
                locked(
                    folder,
                    used=f"The folder {folder}",
                    by="another evaluation that follows the run",
                    otherwise="pass another --split",
                )
            )
            checkpoints = Checkpoints(workdir.checkpoints_dir, readonly=True)
            is_said = False
            while not checkpoints.steps():
                finished = workdir.finished()
                if finished is not None and not checkpoints.steps():
                    raise _lost(workdir, step=finished["step"])
                if not is_said:
                    _logger.info("waiting for the first checkpoint of %s", self._path)
                    is_said = True
                self._sleep(self._poll_secs)
        self._group.gather()
        return Workdir(self._path, readonly=True)

    def reports(self, experiment, *, workdir: Workdir, strategy) -> Iterator[dict]:
        """Evaluates each checkpoint that has not been, until the run is finished and its last one is evaluated.

        A checkpoint that is damaged, or removed while it is read, is left out, with a warning. Where the run has gone
        back to an earlier step, later ones are evaluated anew, and the metrics of before are void.

        Args:
          experiment: `Experiment` of the run.
          workdir: of `wait_for_run`.
          strategy: `tf.distribute.Strategy`, of any number of devices.

        Yields:
          As `CheckpointEvaluator.evaluate` returns, when it has been reported.

        Raises:
          ValueError: if a checkpoint does not fit the experiment or its data; if the run is finished and its last
            checkpoint cannot be had.
        """
        restored = RestoredModel(experiment, workdir=workdir, strategy=strategy, group=self._group)
        evaluator = evaluation.CheckpointEvaluator(restored, split=self._split)
        with _Metrics(workdir.followed_dir(self._split), is_written=self._group.is_chief) as metrics:
            while (step := self._next_step(workdir, restored.checkpoints, metrics)) is not None:
                try:
                    report = evaluator.evaluate(step)
                except UnavailableError as error:
                    self._unavailable.add(step)
                    _logger.warning("step %d is not evaluated: %s", step, error)
                    continue
                metrics.add(report)
                yield report

    def _next_step(self, workdir, checkpoints, metrics) -> int | None:
        """The next step to evaluate, as the chief decides, which waits for it; None when there will be none."""
        if not self._group.is_chief:
            return self._group.of_chief()
        while True:
            # Before the checkpoints: those of a run that is finished are all there.
            finished = workdir.finished()
            metrics.go_back(checkpoints.newest_step())
            new = [
                step
                for step in checkpoints.steps()
                if step > metrics.last_step and step not in self._unavailable
            ]
            if new:
                return self._group.of_chief(new[0])
            if finished is not None:
                if metrics.last_step < finished["step"]:
                    raise _lost(workdir, step=finished["step"])
                return self._group.of_chief(None)
            self._sleep(self._poll_secs)

    def __enter__(self) -> "Follower":
        return self

    def __exit__(self, *exception) -> None:
        self._open.close()


class _Metrics:
    """What has been evaluated, and where it is written. A context manager.

    Attributes:
      last_step: the last step evaluated; -1 before the first.
    """

    def __init__(self, directory, *, is_written):
        """Opens the folder and goes on from its lines; `is_written=False` for a process that writes nothing."""
        self.last_step = -1
        self._directory = directory
        self._writer = None
        if is_written:
            steps = [line["step"] for line in read_metrics(directory)]
            self._go_on_from(max(steps, default=-1))

    def _go_on_from(self, step):
        """Voids what is there of later steps: of a run that went back, or of a process that was killed midway."""
        self.close()
        self.last_step = step
        self._writer = MetricsWriter(self._directory, resume_step=step)

    def go_back(self, newest):
        """Voids the metrics of steps after the newest checkpoint of the run, if it has one: the run went back."""
        if newest is not None and newest < self.last_step:
            _logger.warning("the run went back to step %d: what was evaluated of later steps is void", newest)
            self._go_on_from(newest)

    def add(self, report):
        """Reports an evaluation, the chief's alone."""
        if self._writer is None:
            return
        scalars = evaluation.scalars(report, prefix=report["split"])
        self._writer.scalars(report["step"], scalars)
        self.last_step = report["step"]
        shown = {tag: value for tag, value in scalars.items() if "/by_frequency/" not in tag}
        _logger.info("%s", format_log_line(report["step"], shown))

    def close(self):
        if self._writer is not None:
            self._writer.close()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


def _lost(workdir, *, step):
    return ValueError(
        f"The run in {workdir.path} is finished after step {step}, whose checkpoint is damaged or not there: it cannot "
        f"be evaluated. Restore its files from a copy, or delete {workdir.finished_path.name} and train again: the run "
        "goes on from its last checkpoint."
    )
