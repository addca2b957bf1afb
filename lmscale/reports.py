"""What a run writes for people: configuration, vocabulary, texts, metrics. Of several processes, the chief does."""

import contextlib
import errno
import logging

from lmscale import hparams_tab
from lmscale.metrics import MetricsWriter
from lmscale.workdir import Workdir

_logger = logging.getLogger(__name__)


class NoReports:
    """Those of a process that is not the chief: nothing. Use it as a context manager."""

    def start(self, *, config_text, vocabulary_files, texts, hparams):
        """Writes what a start has to tell.

        Args:
          config_text: the resolved configuration.
          vocabulary_files: paths of the vocabularies.
          texts: {name: text, or None to remove what an earlier start has written}.
          hparams: {name: value}, for TensorBoard's HParams tab.
        """

    def training(self, step, scalars):
        """Reports metrics of the training, {tag: number}."""

    def evaluation(self, step, scalars):
        """Reports metrics of an evaluation, {tag: number}."""

    def saved(self):
        """The run has a checkpoint."""

    def finished(self):
        """The run has done all its steps."""

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass


class Reports(NoReports):
    """The reports of one start of a run, in its work directory.

    A full disk is an error, with the file's name. Where TensorBoard's folders cannot be opened for another reason, the
    run goes on without them, and says so.
    """

    def __init__(self, workdir: Workdir, *, resume_step: int | None):
        """Args:
        workdir: opened for writing.
        resume_step: the step that the run goes on from; None if it starts, which voids what an earlier start logged.
        """
        self._workdir = workdir
        self._resume_step = -1 if resume_step is None else resume_step
        self._writers: dict[str, MetricsWriter] = {}
        self._open_files = contextlib.ExitStack()

    def start(self, *, config_text, vocabulary_files, texts, hparams):
        # From here on it is another run than the one that finished.
        self._workdir.clear_finished()
        self._workdir.write_config(config_text)
        for path in vocabulary_files:
            self._workdir.write_vocabulary(path)
        for name, text in texts.items():
            self._workdir.write_report(name, text=text)
        try:
            hparams_tab.list_run(self._workdir, settings=hparams)
            for directory in (self._workdir.train_dir, self._workdir.eval_dir):
                writer = MetricsWriter(directory, resume_step=self._resume_step)
                self._writers[directory.name] = self._open_files.enter_context(writer)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            self._writers = {}
            _logger.warning(
                "TRAINING WITHOUT METRICS, TensorBoard will show nothing of this start: %s", error
            )
            return
        # Of the first step that runs with it: a start that goes on from the same step replaces it.
        code_block = "\n".join("    " + line for line in config_text.splitlines())
        for name, text in {"config": code_block, **texts}.items():
            if text is not None:
                self._writers["train"].text(name, text, step=self._resume_step + 1)

    def training(self, step, scalars):
        self._scalars("train", step, scalars)

    def evaluation(self, step, scalars):
        self._scalars("eval", step, scalars)

    def _scalars(self, name, step, scalars):
        if name in self._writers:
            self._writers[name].scalars(step, scalars)

    def saved(self):
        self._workdir.mark_saved()

    def finished(self):
        if self._writers:
            hparams_tab.mark_finished(self._workdir)

    def __exit__(self, *exception):
        self._open_files.close()
