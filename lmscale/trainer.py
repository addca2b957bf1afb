"""The training run: pull, compute, push; evaluate, save, log."""

import dataclasses
import logging
import math
import time

import numpy as np
import tensorflow as tf

from lmscale import hparams_tab
from lmscale.bodies.dropout import DropoutStream
from lmscale.checkpoints import CheckpointItem, Checkpoints
from lmscale.data.batches import ContiguousBatches, Prefetcher, ShuffledWindows
from lmscale.data.token_files import PreparedData
from lmscale.distribution import collectives
from lmscale.doing import doing
from lmscale.evaluation import Evaluator
from lmscale.metrics import MetricsWriter, device_memory_mib, format_log_line, progress, read_metrics
from lmscale.model import LanguageModel
from lmscale.stop_signals import collect_stop_signals
from lmscale.tables.table import RowGradients

_logger = logging.getLogger(__name__)


class StoppedEarlyError(Exception):
    """A signal asked the run to stop; it has saved a checkpoint and can be resumed."""


class NonFiniteError(Exception):
    """The loss or the gradient was NaN or infinite. No such step was applied or saved."""


def training_batches(experiment, *, body, tokens):
    """The batches of a run: streams that continue for a body with carried state, shuffled windows for others."""
    make = ContiguousBatches if body.stateful else ShuffledWindows
    return make(
        tokens,
        global_batch_size=experiment.global_batch_size,
        window=experiment.window,
        seed=experiment.seed,
    )


class Trainer:
    """An experiment on the devices of a strategy: its model, its data, and the step that joins them."""

    def __init__(self, experiment, *, data, strategy):
        """Builds the model; the training loop is `train`'s.

        Args:
          experiment: `Experiment`.
          data: `PreparedData`.
          strategy: `tf.distribute.Strategy`.

        Raises:
          ValueError: if the experiment does not fit the devices or the data.
        """
        experiment.check_devices(strategy.num_replicas_in_sync)
        experiment.check_learning_rates()
        self.experiment = experiment
        self.strategy = strategy
        self.data = data
        if experiment.deterministic_ops:
            tf.config.experimental.enable_op_determinism()
        with strategy.scope():
            self.loss = experiment.loss(vocab_size=self.data.vocab_size, counts=self.data.counts)
            self.model = LanguageModel(experiment, vocab_size=self.data.vocab_size, counts=self.data.counts)
        self.batches = training_batches(
            experiment, body=self.model.encoder.body, tokens=self.data.split("train")
        )
        self.evaluator = Evaluator(
            self.model,
            strategy=strategy,
            batch_size=experiment.eval_batch_size,
            window=experiment.eval_window,
            eos_id=self.data.eos_id,
            compute_dtype=experiment.compute_dtype,
            loss=self.loss,
            seed=experiment.seed,
        )
        self.step = 0
        self._prefetcher = Prefetcher(self.batches, steps_per_call=experiment.steps_per_call)
        self._per_replica_batch_size = experiment.global_batch_size // strategy.num_replicas_in_sync
        with strategy.scope():
            self._state = self._carried_state()

    # -- the step -------------------------------------------------------------------------------------------------

    def train_steps(self, num_steps=1):
        """Does the updates `self.step` (0-based) to `self.step + num_steps - 1` in one call of TensorFlow.

        Args:
          num_steps: 1 to the experiment's steps_per_call.

        Returns:
          {metric: [num_steps] tensor}; "rows_touched" is [num_steps, shards of this process].

        Raises:
          ValueError: if num_steps is out of range.
        """
        steps_per_call = self.experiment.steps_per_call
        if not 1 <= num_steps <= steps_per_call:
            raise ValueError(
                f"num_steps must be in 1 .. {steps_per_call}, the experiment's steps_per_call. Received: "
                f"num_steps={num_steps}. Call more often, or raise steps_per_call."
            )
        window_ids, starts_epoch = self._prefetcher.batches(self.step, num_steps)
        metrics = self._train_steps(
            tf.constant(window_ids),
            tf.constant(starts_epoch),
            tf.constant(self.step),
            tf.constant(num_steps),
        )
        self.step += num_steps
        return metrics

    @tf.function(autograph=False)
    def _train_steps(self, window_ids, starts_epoch, step, num_steps):
        """`num_steps` of the steps_per_call steps for which there is room: one trace for any number."""
        steps_per_call = self.experiment.steps_per_call

        def one_step(i, arrays):
            metrics = self.strategy.run(self._replica_step, args=(window_ids[i], step + i, starts_epoch[i]))
            metrics = {
                name: self.strategy.experimental_local_results(values) for name, values in metrics.items()
            }
            rows_touched = tf.stack(metrics.pop("rows_touched"))
            metrics = {name: values[0] for name, values in metrics.items()} | {"rows_touched": rows_touched}
            return i + 1, {name: arrays[name].write(i, metrics[name]) for name in arrays}

        arrays = {
            name: tf.TensorArray(dtype, size=steps_per_call)
            for name, dtype in {
                "loss": tf.float32,
                "penalty": tf.float32,
                "gradient_norm": tf.float32,
                "is_finite": tf.bool,
                "rows_touched": tf.int32,
            }.items()
        }
        _, arrays = tf.while_loop(
            lambda i, _: i < num_steps, one_step, [tf.constant(0), arrays], parallel_iterations=1
        )
        return {name: array.stack()[:num_steps] for name, array in arrays.items()}

    def _replica_step(self, window_ids, step, starts_epoch):
        """One replica's part of an update: pull, compute, push.

        Args:
          window_ids: [global_batch_size, window + 1] int32, the whole batch: a few kilobytes.
          step: int32 scalar, updates done before.
          starts_epoch: bool scalar: the carried state does not belong to these windows.

        Returns:
          {metric: scalar}.
        """
        experiment, table = self.experiment, self.model.table
        first = collectives.replica_id() * self._per_replica_batch_size
        ids = window_ids[first : first + self._per_replica_batch_size]
        labels = tf.reshape(ids[:, 1:], [-1])
        carried = [collectives.local_value(variable) for variable in self._state]
        state = [tf.where(starts_epoch, tf.zeros_like(s), s) for s in carried]
        candidates = self.loss.candidates(
            seed=tf.stack([experiment.seed, step]), labels=tf.reshape(window_ids[:, 1:], [-1])
        )

        # One pull serves the embedding, the labels' softmax rows and the candidates.
        window = table.pull(ids, None if candidates is None else candidates.sampled_ids)
        dropout = DropoutStream(seed=experiment.seed, step=step, first_example=first)
        body_variables = self.model.encoder.trainable_variables
        # Keras changes these within the call: what a bad step makes of them is taken back.
        statistics = [
            (variable, tf.identity(variable.value)) for variable in self.model.encoder.statistics.values()
        ]
        with tf.GradientTape() as tape:
            inputs = tf.identity(window.embedding[:, :-1])
            tape.watch(inputs)
            hidden, new_state = self.model.encoder(inputs, state, dropout=dropout)
            hidden = tf.reshape(tf.cast(hidden, tf.float32), [-1, table.embed_dim])
            # Regularisers of layers, and what they add to the loss: means over a replica's examples, or the same on
            # each replica. The shares of the replicas add up.
            penalties = self.model.encoder.penalties()
            penalty = [tf.add_n(penalties) / self.strategy.num_replicas_in_sync] if penalties else []
        self.model.encoder.check_all_listed(tape.watched_variables())
        num_tokens = experiment.global_batch_size * experiment.window
        loss = self.loss.value_and_gradients(
            hidden,
            labels=labels,
            loss_weights=tf.fill(labels.shape, 1 / num_tokens),
            pulled=window.labels_of_windows(),
            candidates=candidates,
            table=table,
        )
        input_gradient, body_gradients = tape.gradient(
            [hidden, *penalty],
            (inputs, body_variables),
            output_gradients=[loss.hidden, *(tf.ones([]) for _ in penalty)],
        )
        if input_gradient is None:
            input_gradient = tf.zeros_like(inputs)
        body_gradients = {
            # A layer that looks rows up has sparse gradients; one that is not used has none.
            name: tf.zeros(body_variables[name].shape) if g is None else tf.convert_to_tensor(g)
            for name, g in body_gradients.items()
        }

        # One push brings back the gradients of the three roles, summed before a single update of a row.
        collected = table.collect(window, window_gradients(window, input_gradient, loss), dense=loss.shard)
        body_gradients, mean_loss, penalty, row_squared_norm = collectives.all_reduce_sum(
            [
                {name: tf.cast(g, tf.float32) for name, g in body_gradients.items()},
                tf.reduce_sum(loss.loss) / num_tokens,
                penalty,
                tf.add_n(list(collected.squared_norm.values())),
            ]
        )
        mean_penalty = penalty[0] if penalty else tf.constant(0.0)
        mean_loss += mean_penalty
        gradient_norm = tf.sqrt(
            row_squared_norm
            + tf.add_n([tf.reduce_sum(tf.square(g)) for g in body_gradients.values()] or [0.0])
        )
        is_finite = tf.math.is_finite(mean_loss) & tf.math.is_finite(gradient_norm)
        scale = 1.0
        if experiment.clip_norm is not None:
            scale = tf.minimum(1.0, experiment.clip_norm / tf.maximum(gradient_norm, 1e-30))
        table.apply(collected, step=step, scale=scale, keep=is_finite)
        self.model.apply_body_gradients(body_gradients, step=step, scale=scale, keep=is_finite)
        for variable, new, old in zip(carried, new_state, state, strict=True):
            variable.assign(tf.where(is_finite, new, old))
        for variable, old in statistics:
            variable.assign(tf.where(is_finite, variable.value, old))
        metrics = {
            "loss": mean_loss,
            "penalty": mean_penalty,
            "gradient_norm": gradient_norm,
            "is_finite": is_finite,
            "rows_touched": collected.num_rows,
        }
        return metrics

    # -- state ----------------------------------------------------------------------------------------------------

    def checkpoint_items(self):
        """Everything that the next step depends on, but for `self.step`, which goes with the metadata."""
        items = self.model.checkpoint_items()
        for i, variable in enumerate(self._state):
            items.append(
                CheckpointItem(
                    name=f"carried_state/{i}",
                    shape=(self.experiment.global_batch_size, *variable.shape[1:]),
                    dtype=variable.dtype.as_numpy_dtype,
                    read=lambda start, stop, i=i: self._read_state(i)[start:stop],
                    write=lambda start, values, i=i: self._write_state(i, start, values),
                )
            )
        return items

    def _carried_state(self):
        """Variables for the state of the body: on each replica, that of its own examples."""
        return [
            collectives.local_variable(initial)
            for initial in self.model.encoder.body.initial_state(self._per_replica_batch_size)
        ]

    def _read_state(self, i):
        components = self.strategy.experimental_local_results(self._state[i])
        return np.concatenate([component.numpy() for component in components])

    def _write_state(self, i, start, values):
        whole = self._read_state(i)
        whole[start : start + len(values)] = values
        components = self.strategy.experimental_local_results(self._state[i])
        for component, part in zip(components, np.split(whole, len(components)), strict=True):
            component.assign(part)


def window_gradients(window, input_gradient, loss):
    """Gradients of the pulled window from its two roles: positions [:-1] were inputs, [1:] labels."""
    shape = window.embedding.shape
    embedding = tf.pad(input_gradient, [[0, 0], [0, 1], [0, 0]])
    if loss.true_rows is not None:
        as_labels = tf.reshape(tf.cast(loss.true_rows, tf.float32), [shape[0], shape[1] - 1, shape[2]])
        embedding += tf.pad(as_labels, [[0, 0], [1, 0], [0, 0]])
    bias = None
    if window.bias is not None and loss.true_bias is not None:
        bias = tf.pad(tf.reshape(loss.true_bias, [shape[0], shape[1] - 1]), [[0, 0], [1, 0]])
    return RowGradients(
        embedding=embedding,
        bias=bias,
        shared_embedding=loss.shared_rows,
        shared_bias=loss.shared_bias,
    )


def train(experiment, *, workdir, strategy, config_text, hparams):
    """Runs an experiment to its last step, from wherever the work directory's checkpoints have got to.

    Args:
      experiment: `Experiment`.
      workdir: `Workdir`, opened for writing.
      strategy: `tf.distribute.Strategy`.
      config_text: the resolved configuration, written to the work directory and to TensorBoard.
      hparams: {name: value} for TensorBoard's HParams tab.

    Returns:
      {"step", "validation_loss_nats", "best_step", ...}: the summary that marks the run finished.

    Raises:
      ValueError: for settings that do not fit the data, the devices or the checkpoints.
      StoppedEarlyError: on a signal of `lmscale.stop_signals`, at the next step boundary, after saving.
      NonFiniteError: with on_bad_step="stop".
    """
    with doing(f"reading the data of {experiment.data_dir}"):
        data = PreparedData.open(experiment.data_dir)
    with doing(f"building the model, with a table of {data.vocab_size:,} rows of {experiment.embed_dim:,}"):
        trainer = Trainer(experiment, data=data, strategy=strategy)
    checkpoints = Checkpoints(workdir.checkpoints_dir, keep=experiment.keep_checkpoints)
    with doing("restoring the newest checkpoint"):
        metadata = checkpoints.restore(trainer.checkpoint_items())
    run = _Run(trainer, checkpoints=checkpoints, workdir=workdir)
    if metadata is None:
        _check_nothing_lost(workdir)
    else:
        run.resume(metadata)
        workdir.mark_saved()
        _logger.info("resuming at step %d", trainer.step)
    # From here on it is another run than the one that finished; a mistake in the settings was noticed before.
    workdir.clear_finished()
    workdir.write_config(config_text)
    # Without a checkpoint, whatever an earlier start has logged is void: step 0 included.
    resume_step = -1 if metadata is None else trainer.step
    hparams_tab.list_run(workdir, settings=hparams)
    with (
        MetricsWriter(workdir.train_dir, resume_step=resume_step) as train_metrics,
        MetricsWriter(workdir.eval_dir, resume_step=resume_step) as eval_metrics,
        collect_stop_signals() as stop,
        progress(total=experiment.train_steps, initial=trainer.step, description="training") as show_step,
    ):
        # Of the first step that runs with it: a start that goes on from the same step replaces it.
        code_block = "\n".join("    " + line for line in config_text.splitlines())
        train_metrics.text("config", code_block, step=resume_step + 1)
        run.loop(train_metrics=train_metrics, eval_metrics=eval_metrics, stop=stop, show_step=show_step)
    hparams_tab.mark_finished(workdir)
    return run.summary()


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

    def __init__(self, trainer, *, checkpoints, workdir):
        self.trainer = trainer
        self.experiment = trainer.experiment
        self.checkpoints = checkpoints
        self.workdir = workdir
        self.best_validation_loss = math.inf
        self.last_validation_loss = None
        self.skipped_steps = 0
        self._pending = []
        self._seconds = 0.0

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
        self.skipped_steps = metadata["skipped_steps"]

    def summary(self):
        return {
            "step": self.trainer.step,
            "validation_loss_nats": _finite_or_none(self.last_validation_loss),
            "best_step": self.checkpoints.best_step(),
            "skipped_steps": self.skipped_steps,
        }

    def loop(self, *, train_metrics, eval_metrics, stop, show_step):
        experiment, trainer = self.experiment, self.trainer
        while trainer.step < experiment.train_steps:
            start = time.perf_counter()
            with doing(f"training step {trainer.step + 1:,}"):
                self._pending.append(_Pending(trainer.step, trainer.train_steps(self._steps_of_next_call())))
            self._seconds += time.perf_counter() - start
            step = trainer.step
            show_step(step)
            is_last = step == experiment.train_steps
            if step % experiment.log_every == 0 or is_last:
                self._log(train_metrics)
            loss, is_best = None, False
            if step % experiment.eval_every == 0 or is_last:
                self._check_finite()
                with doing(f"evaluating after step {step:,}"):
                    loss = self._evaluate(eval_metrics, show_step=show_step)
                is_best = loss < self.best_validation_loss
                self.best_validation_loss = (
                    min(self.best_validation_loss, loss) if is_best else self.best_validation_loss
                )
                self.last_validation_loss = loss
            if step % experiment.save_every == 0 or is_last or is_best or stop:
                with doing(f"saving the checkpoint of step {step:,}"):
                    self._save(loss)
            if stop and not is_last:
                raise StoppedEarlyError(f"stopped by {stop[0]} after step {step}; the checkpoint is saved")

    def _save(self, validation_loss):
        self._check_finite()
        self.checkpoints.save(
            self.trainer.step,
            self.trainer.checkpoint_items(),
            metadata={
                "step": self.trainer.step,
                "data_fingerprint": self.trainer.data.fingerprint,
                "vocabulary_sha256": self.trainer.data.vocabulary_sha256,
                "num_devices": self.trainer.strategy.num_replicas_in_sync,
                "best_validation_loss_nats": _finite_or_none(self.best_validation_loss),
                "last_validation_loss_nats": _finite_or_none(self.last_validation_loss),
                "skipped_steps": self.skipped_steps,
            },
            validation_loss_nats=validation_loss,
        )
        self.workdir.mark_saved()

    def _steps_of_next_call(self):
        """steps_per_call, or fewer up to the next step at which something is due."""
        experiment, step = self.experiment, self.trainer.step
        due = (experiment.log_every, experiment.eval_every, experiment.save_every)
        next_due = min(every - step % every for every in due)
        return min(experiment.steps_per_call, next_due, experiment.train_steps - step)

    def _check_finite(self):
        """Reads the flags of the steps since the last check. Non-finite steps were never applied."""
        start = time.perf_counter()
        for call in self._pending:
            if call.checked:
                continue
            call.checked = True
            for offset in np.flatnonzero(~call.metrics["is_finite"].numpy()):
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

    def _log(self, writer):
        self._check_finite()
        step = self.trainer.step
        metrics = {
            name: np.concatenate([call.metrics[name].numpy() for call in self._pending])
            for name in self._pending[0].metrics
        }
        finite = metrics["is_finite"]
        num_steps = len(finite)
        values = {name: metrics[name][finite] for name in ("loss", "gradient_norm")}
        if np.any(metrics["penalty"]):
            values["penalty_nats"] = metrics["penalty"][finite]
        for shard_id, rows in enumerate(metrics["rows_touched"][finite].T):
            values[f"rows_touched/shard_{shard_id}"] = rows
        step_secs = self._seconds / num_steps
        tokens = self.experiment.global_batch_size * self.experiment.window
        mean = {name: float(np.mean(x, dtype=np.float64)) for name, x in values.items() if len(x)}
        loss_tag = f"{self.trainer.loss.name}_loss_nats"
        scalars = {
            loss_tag: mean.pop("loss", math.nan),
            "gradient_norm": mean.pop("gradient_norm", math.nan),
            "learning_rate": float(self.experiment.body_optimizer.learning_rate_at(step - 1)),
            "row_learning_rate": float(self.experiment.row_optimizer.learning_rate_at(step - 1)),
            "tokens_per_sec": tokens / step_secs,
            "step_secs": step_secs,
            "epoch": step / self.trainer.batches.steps_per_epoch,
            "skipped_steps": self.skipped_steps,
            **mean,
            **{f"memory_mib/{device}": value for device, value in device_memory_mib().items()},
        }
        writer.scalars(step, scalars)
        shown = (loss_tag, "gradient_norm", "learning_rate", "tokens_per_sec", "epoch")
        _logger.info("%s", format_log_line(step, {name: scalars[name] for name in shown}))
        self._pending, self._seconds = [], 0.0

    def _evaluate(self, writer, *, show_step):
        evaluator, tokens = self.trainer.evaluator, self.trainer.data.split("valid")
        with show_step.part(total=evaluator.num_steps(tokens), description="evaluating valid") as show_batch:
            valid = evaluator.evaluate(tokens, on_step=show_batch)
        scalars = {
            "valid/exact_loss_nats": valid.loss_nats,
            "valid/exact_perplexity": valid.perplexity,
            "valid/eval_secs": valid.seconds,
        }
        if self.experiment.probe_tokens:
            probe = evaluator.evaluate(
                self.trainer.data.split("train")[: self.experiment.probe_tokens], with_training_loss=True
            )
            name = self.trainer.loss.name
            scalars["probe/exact_loss_nats"] = probe.loss_nats
            scalars["probe/exact_perplexity"] = probe.perplexity
            if name != "exact":
                scalars[f"probe/{name}_loss_nats"] = probe.training_loss_nats
                scalars[f"probe/{name}_minus_exact_nats"] = probe.training_loss_nats - probe.loss_nats
        writer.scalars(self.trainer.step, scalars)
        shown = ("valid/exact_loss_nats", "valid/exact_perplexity", "valid/eval_secs")
        _logger.info("%s", format_log_line(self.trainer.step, {name: scalars[name] for name in shown}))
        return valid.loss_nats


def _finite_or_none(loss):
    """JSON has neither NaN nor infinity."""
    return loss if loss is not None and math.isfinite(loss) else None
