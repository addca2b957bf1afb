"""The training run: the loop around the step, which logs, evaluates, saves and stops."""

import dataclasses
import logging
import math
import re
import time

import numpy as np

from lmscale import communication, evaluation
from lmscale.checkpoints import format_1
from lmscale.checkpoints.directory import Checkpoints
from lmscale.data.prepared import open_prepared
from lmscale.distribution.process_group import ProcessGroup
from lmscale.doing import doing
from lmscale.metrics import device_memory_mib, format_log_line, progress, read_metrics
from lmscale.parameters.report import as_table, as_text, parameter_lines
from lmscale.profiling import Profiler
from lmscale.reports import NoReports, Reports
from lmscale.restored import evaluated_weights
from lmscale.start import report_names, start_from_elsewhere
from lmscale.stop_signals import collect_stop_signals
from lmscale.trainer import Trainer

_logger = logging.getLogger(__name__)


class StoppedEarlyError(Exception):
    """A signal asked the run to stop; it has saved a checkpoint and can be resumed."""


class NonFiniteError(Exception):
    """The loss or the gradient was NaN or infinite, at the smallest loss scale too. No such step was applied."""


def check_same_run(config, workdir):
    """Raises ValueError if the work directory is that of a run of other settings, which has saved."""
    checkpoints = Checkpoints(workdir.checkpoints_dir, readonly=True)
    has_saved = workdir.has_saved() or checkpoints.newest_step() is not None
    if not workdir.config_path.exists() or not has_saved:
        return
    refused = config.refused_changes(workdir.config_path.read_text(encoding="utf-8"))
    if refused:
        raise ValueError(
            f"The run in {workdir.path} goes on with the settings it started with. Received other ones:\n  "
            + "\n  ".join(refused)
            + f"\nRun with the old settings, --gin_file={workdir.config_path}, or give another --workdir."
        )


def train(experiment, *, workdir, strategy, config_text, hparams, group=None, profile_steps=None):
    """Runs an experiment to its last step, from wherever the work directory's checkpoints have got to.

    Args:
      experiment: `Experiment`.
      workdir: `Workdir`, opened for writing by the chief, readonly by others.
      strategy: `tf.distribute.Strategy`.
      config_text: the resolved configuration, written to the work directory and to TensorBoard.
      hparams: {name: value} for TensorBoard's HParams tab.
      group: `ProcessGroup` of the run, all of which call this; None for one process.
      profile_steps: (first, last) to be profiled by the chief, in the training's folder; None for none.

    Returns:
      {"step", "validation_loss_nats", "best_step", ...}: the summary that marks the run finished.

    Raises:
      ValueError: for settings that do not fit the data, the devices or the checkpoints.
      StoppedEarlyError: on a signal of `lmscale.stop_signals`, at the next step boundary, after saving.
      NonFiniteError: with on_bad_step="stop".
    """
    group = group or ProcessGroup()
    with doing(f"reading the data of {experiment.data_dir}"):
        data = open_prepared(experiment.data_dir)
    group.check_same("The data", f"{experiment.data_dir} with the fingerprint {data.fingerprint[:12]}")
    with doing(f"building the model, with tables of {data.rows_text} rows"):
        trainer = Trainer(experiment, data=data, strategy=strategy)
    _logger.info("%s", _parameter_table(trainer))
    if trainer.traffic is not None:
        _logger.info("%s", _traffic_table(trainer))
    checkpoints = Checkpoints(workdir.checkpoints_dir, keep=experiment.keep_checkpoints, group=group)
    with doing("restoring the newest checkpoint"):
        parameters = trainer.parameters()
        metadata = checkpoints.restore(
            parameters, format_1_names=format_1.names([p.path for p in parameters], trainer.task.layers)
        )
    is_new = metadata is None
    profiler = Profiler(profile_steps, directory=workdir.train_dir, is_written=group.is_chief)
    run = _Run(trainer, checkpoints=checkpoints, group=group, profiler=profiler)
    reports: NoReports = NoReports()
    if group.is_chief:
        reports = Reports(workdir, resume_step=None if is_new else metadata["step"])
    texts = {}
    if is_new:
        _check_nothing_lost(workdir)
        with doing("reading what the run starts from"):
            found = start_from_elsewhere(experiment, trainer)
        texts = {name: found.get(name) for name in report_names(trainer.task)}
    else:
        run.resume(metadata)
        reports.saved()
        _logger.info("resuming at step %d", trainer.step)
        profiler.resume(trainer.step)
    for text in filter(None, texts.values()):
        _logger.info("%s", text)
    with (
        collect_stop_signals() as stop,  # First, so last: what closes files is not interrupted.
        reports,
        profiler,
        progress(
            total=experiment.train_steps,
            initial=trainer.step,
            description="training",
            is_shown=group.is_chief,
        ) as show_step,
    ):
        reports.start(
            config_text=config_text,
            vocabulary_files=sorted(set(data.vocabulary_files.values())),
            texts=texts,
            hparams=hparams,
        )
        run.loop(reports=reports, stop=stop, show_step=show_step)
    # When all others have done their part as well.
    group.gather()
    reports.finished()
    return run.summary()


def _parameter_table(trainer):
    """The table of parameters as text."""
    model = trainer.model
    lines = parameter_lines(
        trainer.task,
        model.layers,
        model.treatments,
        num_devices=trainer.strategy.num_replicas_in_sync,
    )
    return as_text(as_table(lines))


def _traffic_table(trainer):
    """The table of what a step moves as text."""
    layer_values = communication.num_layer_values(trainer.model.layers, trainer.model.treatments)
    return as_text(
        communication.as_table(trainer.traffic, trainer.traffic.chosen(), layer_values=layer_values)
    )


def _check_nothing_lost(workdir):
    """Without a checkpoint: raises ValueError where there was one; says so where an earlier start got nowhere."""
    if workdir.has_saved():
        raise ValueError(
            f"The run in {workdir.path} has saved checkpoints, as saved.json or finished.json there tells. Received: "
            f"none in {workdir.checkpoints_dir}. Put the checkpoints back, or start a new work directory."
        )
    steps = [line["step"] for line in read_metrics(workdir.train_dir)]
    if steps:
        _logger.warning(
            "starting over: an earlier start in %s ended before its first checkpoint; it had logged step %d",
            workdir.path,
            max(steps),
        )


@dataclasses.dataclass
class _Pending:
    """The metrics of a call whose steps have not been logged."""

    first_step: int
    metrics: dict
    checked: bool = False


class _Run:
    """The loop around `Trainer.train_steps`: when to log, evaluate, save and stop."""

    def __init__(self, trainer, *, checkpoints, group, profiler):
        self.trainer = trainer
        self.experiment = trainer.experiment
        self.checkpoints = checkpoints
        self.group = group
        self.profiler = profiler
        self.evaluator = evaluation.Evaluator.of_experiment(
            trainer.experiment, trainer.model, strategy=trainer.strategy
        )
        self.best_validation_loss = math.inf
        self.last_validation_loss = None
        self.last_validation_tokens = None
        self.skipped_steps = 0
        self._pending = []
        self._seconds = 0.0
        self._told_what_moves = False

    def resume(self, metadata):
        self.trainer.step = metadata["step"]
        if self.trainer.step > self.experiment.train_steps:
            raise ValueError(
                "train_steps must be at least the steps that the run has done. Received: "
                f"train_steps={self.experiment.train_steps}, {self.trainer.step} steps done. Set TRAIN_STEPS to at "
                f"least {self.trainer.step}, or start a new work directory."
            )
        fingerprint = self.trainer.data.fingerprint
        if metadata["data_fingerprint"] != fingerprint:
            raise ValueError(
                "A run must go on with the data it started with. Received: "
                f"{self.experiment.data_dir}, whose fingerprint is {fingerprint[:12]}; the checkpoint's is "
                f"{metadata['data_fingerprint'][:12]}. Set DATA_DIR to the old data, or start a new work directory."
            )
        best = metadata["best_validation_loss_nats"]
        self.best_validation_loss = math.inf if best is None else best
        self.last_validation_loss = metadata["last_validation_loss_nats"]
        self.last_validation_tokens = metadata.get("last_validation_tokens")
        self._resume_unlogged(metadata.get("unlogged"))
        self.skipped_steps = metadata["skipped_steps"]
        self.trainer.model.restore_clocks(metadata.get("updates"), step=self.trainer.step)

    def summary(self):
        return {
            "step": self.trainer.step,
            "validation_loss_nats": _finite_or_none(self.last_validation_loss),
            "validation_tokens": self.last_validation_tokens,
            "best_step": self.checkpoints.best_step(),
            "skipped_steps": self.skipped_steps,
        }

    def loop(self, *, reports, stop, show_step):
        experiment, trainer = self.experiment, self.trainer
        while trainer.step < experiment.train_steps:
            start = time.perf_counter()
            with doing(f"training step {trainer.step + 1:,}"), self.profiler.call(trainer.step):
                self._pending.append(_Pending(trainer.step, trainer.train_steps(self._steps_of_next_call())))
            self._seconds += time.perf_counter() - start
            step = trainer.step
            if self.profiler.is_last(step):
                self._check_finite()  # Which waits until a GPU has done the steps.
                self.profiler.close()
            show_step(step)
            is_last = step == experiment.train_steps
            if step % experiment.log_every == 0 or is_last:
                self._log(reports)
            loss, is_best = None, False
            if step % experiment.eval_every == 0 or is_last:
                self._check_finite()
                with doing(f"evaluating after step {step:,}"):
                    loss = self._evaluate(reports, show_step=show_step)
                is_best = loss < self.best_validation_loss
                self.best_validation_loss = (
                    min(self.best_validation_loss, loss) if is_best else self.best_validation_loss
                )
                self.last_validation_loss = loss
            stopped_by = self._stopped_by(stop)
            if step % experiment.save_every == 0 or is_last or is_best or stopped_by:
                with doing(f"saving the checkpoint of step {step:,}"):
                    self._save(loss)
                reports.saved()
            if stopped_by and not is_last:
                raise StoppedEarlyError(f"stopped by {stopped_by} after step {step}; the checkpoint is saved")

    def _stopped_by(self, stop):
        """The first signal that a process has received, and by which; None for none. The same in all of them."""
        signals = self.group.gather(stop[0] if stop else None)
        for rank, name in enumerate(signals):
            if name:
                return name if len(signals) == 1 else f"{name} to {self.group.name(rank)}"
        return None

    def _save(self, validation_loss):
        self._check_finite()
        self.checkpoints.save(
            self.trainer.step,
            self.trainer.parameters(),
            metadata={
                "step": self.trainer.step,
                "data_fingerprint": self.trainer.data.fingerprint,
                "vocabularies": {
                    name: vocabulary.sha256 for name, vocabulary in self.trainer.task.vocabularies.items()
                },
                # Of tables whose rows have words: not those of hashed values.
                "vocabulary_files": {
                    name: self.trainer.data.vocabulary_files[config.vocabulary].name
                    for name, config in self.trainer.task.tables.items()
                    if config.vocabulary in self.trainer.data.vocabulary_files
                },
                # Fewer than the steps where a group rests; more where its slots are of another run.
                "updates": {
                    path: int(self.trainer.model.num_updates(path, self.trainer.step))
                    for path, treatment in self.trainer.model.treatments.items()
                    if treatment.update
                },
                "num_devices": self.trainer.strategy.num_replicas_in_sync,
                "best_validation_loss_nats": _finite_or_none(self.best_validation_loss),
                "last_validation_loss_nats": _finite_or_none(self.last_validation_loss),
                "last_validation_tokens": self.last_validation_tokens,
                "unlogged": self._unlogged(),
                "skipped_steps": self.skipped_steps,
            },
            validation_loss_nats=validation_loss,
        )

    def _unlogged(self):
        """What the next log line will tell of the steps that are done, for `_resume_unlogged`: JSON."""
        metrics = self._pending_metrics()
        return {
            "seconds": self._seconds,
            # JSON has neither NaN nor infinity.
            "metrics": {
                name: np.where(np.isfinite(x), x, None).tolist() if x.dtype.kind == "f" else x.tolist()
                for name, x in metrics.items()
            },
        }

    def _resume_unlogged(self, unlogged):
        """Goes on with the log line that a checkpoint was saved in the middle of."""
        if not unlogged or not unlogged["metrics"]:
            return
        metrics = {
            name: np.array(x)
            if name in ("is_finite", "overflowed") or name.startswith("rows_touched/")
            else np.array(x, np.float32)
            for name, x in unlogged["metrics"].items()
        }
        num_shards = self.trainer.strategy.num_replicas_in_sync
        num_own = num_shards // self.group.size
        for name, x in metrics.items():
            if name.startswith("rows_touched/"):
                if x.shape[1] != num_shards:
                    return  # Of other shards: the line begins here.
                metrics[name] = x[:, self.group.rank * num_own : (self.group.rank + 1) * num_own]
        first_step = self.trainer.step - len(metrics["is_finite"])
        self._pending = [_Pending(first_step, metrics, checked=True)]
        self._seconds = unlogged["seconds"]

    def _pending_metrics(self):
        """{metric: array over the steps since the last log line}, those of shards of all shards."""
        metrics = {
            name: np.concatenate([np.asarray(call.metrics[name]) for call in self._pending])
            for name in (self._pending[0].metrics if self._pending else ())
        }
        own = {name: x.T.tolist() for name, x in metrics.items() if name.startswith("rows_touched/")}
        of_processes = self.group.gather(own)
        for name in own:
            metrics[name] = np.array([shard for shards in of_processes for shard in shards[name]]).T
        return metrics

    def _steps_of_next_call(self):
        """steps_per_call, or fewer up to the next step at which something is due."""
        experiment, step = self.experiment, self.trainer.step
        due = (experiment.log_every, experiment.eval_every, experiment.save_every)
        next_due = min(every - step % every for every in due)
        profile_due = self.profiler.due(step) or next_due
        return min(experiment.steps_per_call, next_due, profile_due, experiment.train_steps - step)

    def _check_finite(self):
        """Reads the flags of the steps since the last check. Non-finite steps were never applied."""
        start = time.perf_counter()
        for call in self._pending:
            if call.checked:
                continue
            call.checked = True
            is_bad = ~call.metrics["is_finite"].numpy()
            if "overflowed" in call.metrics:
                # By its scale alone: the next ones have a smaller one.
                is_bad &= ~call.metrics["overflowed"].numpy()
            for offset in np.flatnonzero(is_bad):
                seen = (
                    f"step {call.first_step + 1 + offset}: loss {float(call.metrics['loss'][offset])}, "
                    f"gradient norm {float(call.metrics['gradient_norm'][offset])}"
                )
                if self.experiment.on_bad_step == "stop":
                    raise NonFiniteError(
                        f"The loss or the gradient is not finite at {seen}. The update was not applied. Go on with "
                        "Experiment.on_bad_step = 'skip'. Or start a new work directory (from a copy of this one's "
                        "checkpoints, if you like): Lower LEARNING_RATE there, or set Experiment.clip_norm."
                    )
                self.skipped_steps += 1
                _logger.warning("skipped the update of %s", seen)
        # Reading waits for the steps that a GPU has not done yet: it is their time.
        self._seconds += time.perf_counter() - start

    def _log(self, reports):
        self._check_finite()
        step = self.trainer.step
        metrics = self._pending_metrics()
        finite = metrics["is_finite"]
        num_steps = len(finite)
        values = {"gradient_norm": metrics["gradient_norm"][finite]}
        loss_tag, loss_tags = _loss_tags(self.trainer.task.heads)
        values |= {tag: metrics[name][finite] for tag, name in loss_tags.items()}
        if np.any(metrics["penalty"]):
            values["penalty_nats"] = metrics["penalty"][finite]
        for name in self.trainer.model.tables:
            for shard_id, rows in enumerate(metrics[f"rows_touched/{name}"][finite].T):
                values[f"rows_touched/{name}/shard_{shard_id}"] = rows
        scaling = {}
        if "loss_scale" in metrics:
            scaling["loss_scale"] = float(metrics["loss_scale"][-1])
            scaling["overflowed_steps"] = int(np.count_nonzero(metrics["overflowed"]))
        moved = {name: x for name, x in metrics.items() if name.startswith("bytes_received/") and np.any(x)}
        values |= moved
        if moved and not self._told_what_moves:
            self._told_what_moves = True
            _logger.info("bytes that a step moves to this device, as counted in its graph: %s", _means(moved))
        step_secs = self._seconds / num_steps
        scalars = {
            **{tag: float(np.mean(x, dtype=np.float64)) if len(x) else math.nan for tag, x in values.items()},
            **_by_tag("learning_rate", self.trainer.learning_rates(step - 1)),
            "tokens_per_sec": self.trainer.batches.labels_per_step / step_secs,
            "step_secs": step_secs,
            "epoch": step / self.trainer.batches.steps_per_epoch,
            "skipped_steps": self.skipped_steps,
            **scaling,
            **{f"memory_mib/{device}": value for device, value in device_memory_mib().items()},
        }
        reports.training(step, scalars)
        shown = (loss_tag, "gradient_norm", "tokens_per_sec", "epoch")
        _logger.info("%s", format_log_line(step, {name: scalars[name] for name in shown}))
        self._pending, self._seconds = [], 0.0

    def _evaluate(self, reports, *, show_step):
        evaluator, task = self.evaluator, self.trainer.task
        batches = task.evaluation_batches("valid", limit=self.experiment.eval_tokens)
        probe = None
        with evaluated_weights(self.experiment, self.trainer.model, step=self.trainer.step):
            with show_step.part(total=batches.num_steps, description="evaluating valid") as show_batch:
                valid = evaluator.evaluate(batches, on_step=show_batch)
            if self.experiment.probe_tokens:
                probe_batches = task.evaluation_batches("train", limit=self.experiment.probe_tokens)
                probe = evaluator.evaluate(probe_batches, with_training_loss=True)
        self.last_validation_tokens = valid.tokens
        scalars = evaluation.scalars(valid.report(), prefix="valid")
        if probe is not None:
            scalars["probe/exact_loss_nats"] = probe.loss_nats
            scalars["probe/exact_perplexity"] = probe.perplexity
            names = {head.name for head in task.heads.values()}
            if names != {"exact"}:
                name = "_".join(sorted(names))
                scalars[f"probe/{name}_loss_nats"] = probe.training_loss_nats
                scalars[f"probe/{name}_minus_exact_nats"] = probe.training_loss_nats - probe.loss_nats
        reports.evaluation(self.trainer.step, scalars)
        shown = ["valid/exact_loss_nats", "valid/exact_perplexity", "valid/eval_tokens", "valid/eval_secs"]
        for name, measures in task.measures.items():
            own = f"valid/{name}" if len(task.heads) > 1 else "valid"
            shown += [f"{own}/{measure}" for measure in measures]
        _logger.info("%s", format_log_line(self.trainer.step, {name: scalars[name] for name in shown}))
        # One loss for all: what follows from it, all must do.
        return self.group.of_chief(valid.loss_nats)


def _loss_tags(heads):
    """(tag of the loss that is trained, {tag: metric}): of one head, that of the head; of several, also theirs."""
    if len(heads) == 1:
        (head,) = heads.values()
        return f"{head.name}_loss_nats", {f"{head.name}_loss_nats": "loss"}
    of_heads = {f"{name}/{head.name}_loss_nats": f"loss/{name}" for name, head in heads.items()}
    return "loss_nats", {"loss_nats": "loss"} | of_heads


def _by_tag(prefix, by_pattern):
    """{tag: value} of values by the patterns of groups: `layers/.*` under `PREFIX/layers`."""
    tags: dict = {}
    for pattern, value in by_pattern.items():
        tag = f"{prefix}/{re.sub(r'[^A-Za-z0-9_/]+', '', pattern).strip('/') or 'all'}"
        tags[f"{tag}_{len(tags)}" if tag in tags else tag] = value
    return tags


def _means(metrics):
    """`PART 1,234, ...` of {".../PART": array}."""
    return ", ".join(f"{name.partition('/')[2]} {np.mean(x):,.0f}" for name, x in metrics.items())


def _finite_or_none(loss):
    """JSON has neither NaN nor infinity."""
    return loss if loss is not None and math.isfinite(loss) else None
