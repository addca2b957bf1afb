"""What a run has trained, on devices again: its task and its model, with the parameters of one of its checkpoints."""

import contextlib

from lmscale.assembly import make_task
from lmscale.checkpoints import document, format_1
from lmscale.checkpoints.directory import Checkpoints
from lmscale.data.prepared import open_prepared
from lmscale.distribution.process_group import ProcessGroup
from lmscale.doing import doing
from lmscale.model import Model
from lmscale.parameters import averages


def evaluated_weights(experiment, model, *, step):
    """A context in which the parameters hold what the experiment evaluates: its weights, or averages of them."""
    if not experiment.evaluate_averages:
        return contextlib.nullcontext()
    return averages.in_place_of_weights(model, step=step)


class RestoredModel:
    """The model of a run, for any of its checkpoints, one after the other. No training follows.

    Attributes:
      experiment, workdir, strategy, group: as given.
      data: its `PreparedData`.
      task, model: `Task` and `Model`, on any number of devices.
      checkpoints: `Checkpoints`, readonly.
    """

    def __init__(self, experiment, *, workdir, strategy, group=None):
        """Reads the data and builds the model.

        Args:
          experiment: `Experiment` of the run.
          workdir: its `Workdir`; only read.
          strategy: `tf.distribute.Strategy`, of any number of devices.
          group: `ProcessGroup`, all of which do the same; None for one process.

        Raises:
          ValueError: if the data do not fit the experiment; if averages are to be evaluated and no group keeps any.
        """
        self.experiment = experiment
        self.workdir = workdir
        self.strategy = strategy
        self.group = group = group or ProcessGroup()
        self.checkpoints = Checkpoints(
            workdir.checkpoints_dir, keep=experiment.keep_checkpoints, readonly=True, group=group
        )
        with doing(f"reading the data of {experiment.data_dir}"):
            self.data = open_prepared(experiment.data_dir)
        group.check_same("The data", self.data.fingerprint)
        with doing(f"building the model, with tables of {self.data.rows_text} rows"), strategy.scope():
            self.task = make_task(
                experiment, data=self.data, num_replicas=strategy.num_replicas_in_sync, training=False
            )
            # No update rules: what is not trained holds the parameters alone. But averages are slots.
            self.model = Model(
                self.task,
                groups=experiment.groups,
                seed=experiment.seed,
                training=experiment.evaluate_averages,
            )
        if experiment.evaluate_averages:
            averages.check_any(self.model.treatments)

    def step_of(self, checkpoint):
        """The step of a checkpoint.

        Args:
          checkpoint: a step as a string, "latest" or "best".

        Returns:
          int; None for the newest.

        Raises:
          ValueError: if no checkpoint has a validation loss.
        """
        if checkpoint != "best":
            return None if checkpoint == "latest" else int(checkpoint)
        step = self.group.of_chief(self.checkpoints.best_step() if self.group.is_chief else None)
        if step is None:
            raise ValueError(
                f"No checkpoint of {self.workdir.path} has a validation loss. Pass --checkpoint=latest."
            )
        return step

    def restore(self, step=None):
        """Fills the model from a checkpoint.

        Args:
          step: int; None for the newest.

        Returns:
          Its metadata, {"step", ...}.

        Raises:
          UnavailableError: if `step` has no checkpoint, or a damaged one; if it is removed while it is read.
          ValueError: if there is none at all, or it does not fit the experiment or its data.
        """
        with doing("restoring the checkpoint"):
            parameters = self.model.parameters()
            metadata = self.checkpoints.restore(
                parameters,
                step=step,
                subset=True,
                format_1_names=format_1.names([p.path for p in parameters], self.task.layers),
            )
        if metadata is None:
            raise ValueError(
                f"{self.workdir.path} has no checkpoint yet. Wait for the run's first, or shorten SAVE_EVERY."
            )
        for table, vocabulary in self.task.vocabularies.items():
            if document.vocabulary_sha256(metadata, table) not in (None, vocabulary.sha256):
                raise ValueError(
                    "A model must be evaluated with the vocabulary it was trained with. Received: "
                    f"{self.experiment.data_dir}, where that of the table {table!r} is another one. Set DATA_DIR to "
                    "data of the same vocabulary."
                )
        if self.experiment.evaluate_averages:
            self.model.restore_clocks(metadata.get("updates"), step=metadata["step"])
        return metadata

    def weights(self, metadata):
        """A context in which the model holds what the experiment evaluates; `metadata` as of `restore`."""
        return evaluated_weights(self.experiment, self.model, step=metadata["step"])
