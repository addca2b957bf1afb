"""Exact loss of a model over a piece of text: the full softmax, every token once."""

import dataclasses
import math
import time

import numpy as np
import tensorflow as tf

from lmscale.checkpoints.directory import Checkpoints
from lmscale.data.batches import EvaluationBatches
from lmscale.data.token_files import PreparedData
from lmscale.distribution import collectives
from lmscale.doing import doing
from lmscale.metrics import progress
from lmscale.model import LanguageModel
from lmscale.softmax.full import full_softmax_loss


@dataclasses.dataclass(frozen=True)
class EvaluationResult:
    """Mean losses over `tokens` tokens, in nats. `training_loss_nats` is None unless it was asked for."""

    loss_nats: float
    tokens: int
    seconds: float
    training_loss_nats: float | None = None

    @property
    def perplexity(self):
        """exp(loss_nats), infinite where that overflows."""
        return math.exp(self.loss_nats) if self.loss_nats < 700 else math.inf


class Evaluator:
    """Evaluates a model on the devices of a strategy.

    The text is cut into `batch_size` lanes, each of which starts without context, so the batch size belongs to the
    result; the number of devices does not: lanes of padding fill up what does not divide.
    """

    def __init__(
        self, model, *, strategy, batch_size, window, eos_id, compute_dtype="float32", loss=None, seed=0
    ):
        """Args:
        model: `LanguageModel`.
        strategy: the one that it was built under.
        batch_size, window: lanes, and time steps of each in a batch.
        eos_id: what comes before the first token.
        compute_dtype: of the products.
        loss: a `Head` to measure beside the exact one, on the same hidden states; None for none.
        seed: of that loss's candidates.
        """
        self._model = model
        self._strategy = strategy
        self._batch_size = batch_size
        self._window = window
        self._eos_id = eos_id
        self._compute_dtype = compute_dtype
        self._loss = loss
        self._seed = seed
        self._num_replicas = strategy.num_replicas_in_sync
        self._lanes_per_replica = -(-batch_size // self._num_replicas)

    def evaluate(self, tokens, *, with_training_loss=False, on_step=None):
        """Exact mean loss over `tokens`.

        Args:
          tokens: [n] ids. Every one is predicted once, the first from `eos_id`.
          with_training_loss: also measure the training loss, without dropout.
          on_step: called with the number of batches done after each, of `num_steps` in all.

        Returns:
          `EvaluationResult`.
        """
        start = time.perf_counter()
        batches = self._batches(tokens)
        padding = [(0, self._lanes_per_replica * self._num_replicas - self._batch_size), (0, 0)]
        state = self._initial_state()
        sums = np.zeros([2], np.float64)
        for i in range(batches.num_steps):
            batch = batches.at(i)
            arrays = [np.pad(x, padding) for x in (batch.input_ids, batch.labels, batch.loss_weights)]
            step_sums, state = self._step(
                state,
                *(tf.constant(x) for x in arrays),
                tf.constant(i),
                with_training_loss=with_training_loss,
            )
            sums += self._strategy.experimental_local_results(step_sums)[0].numpy()
            if on_step:
                on_step(i + 1)
        mean = sums / len(tokens)
        return EvaluationResult(
            loss_nats=float(mean[0]),
            tokens=len(tokens),
            seconds=time.perf_counter() - start,
            training_loss_nats=float(mean[1]) if with_training_loss else None,
        )

    def num_steps(self, tokens):
        """Batches that an evaluation of `tokens` takes."""
        return self._batches(tokens).num_steps

    def _batches(self, tokens):
        return EvaluationBatches(
            tokens, batch_size=self._batch_size, window=self._window, eos_id=self._eos_id
        )

    @tf.function(autograph=False)
    def _initial_state(self):
        return self._strategy.run(lambda: self._model.encoder.body.initial_state(self._lanes_per_replica))

    @tf.function(autograph=False)
    def _step(self, state, input_ids, labels, loss_weights, step, *, with_training_loss):
        def replica_step(state):
            lanes = self._lanes_per_replica
            first = collectives.replica_id() * lanes
            own_labels = tf.reshape(labels[first : first + lanes], [-1])
            own_weights = tf.reshape(loss_weights[first : first + lanes], [-1])
            pulled = self._model.table.pull(input_ids[first : first + lanes])
            hidden, new_state = self._model.encoder(pulled.embedding, state, dropout=None)
            hidden = tf.reshape(tf.cast(hidden, tf.float32), [-1, self._model.table.embed_dim])
            table = self._model.table
            loss = full_softmax_loss(
                hidden,
                labels=own_labels,
                rows=table.local_parameter("embedding"),
                bias=table.local_parameter("bias"),
                num_valid_rows=table.num_valid_rows,
                compute_dtype=self._compute_dtype,
            )
            # Padding may have a non-finite loss of its own: it must not reach the sum.
            sums = [tf.reduce_sum(tf.where(own_weights > 0, loss, 0.0))]
            if with_training_loss:
                candidates = self._loss.candidates(
                    seed=tf.stack([self._seed, step]),
                    # Without the lanes that fill up the devices: candidates must not depend on their number.
                    labels=tf.reshape(labels[: self._batch_size], [-1]),
                )
                training_loss = self._loss.value_and_gradients(
                    hidden,
                    labels=own_labels,
                    loss_weights=own_weights,
                    pulled=table.pull(own_labels, None if candidates is None else candidates.sampled_ids),
                    candidates=candidates,
                    table=table,
                ).loss
                sums.append(tf.reduce_sum(tf.where(own_weights > 0, training_loss, 0.0)))
            else:
                sums.append(tf.constant(0.0))
            return collectives.all_reduce_sum(tf.stack(sums)), new_state

        return self._strategy.run(replica_step, args=(state,))


def evaluate_checkpoint(experiment, *, workdir, strategy, split, checkpoint):
    """Restores a checkpoint of a run and evaluates it exactly.

    Args:
      experiment: `Experiment` of the run.
      workdir: its `Workdir`; only read.
      strategy: `tf.distribute.Strategy`, of any number of devices.
      split: "train", "valid" or "test".
      checkpoint: a step as a string, "latest" or "best".

    Returns:
      {"split", "step", "loss_nats", "perplexity", "tokens", "vocab_size", "num_devices", "seconds"}.

    Raises:
      ValueError: if there is no such checkpoint or split, or it does not fit the experiment.
    """
    checkpoints = Checkpoints(workdir.checkpoints_dir, keep=experiment.keep_checkpoints, readonly=True)
    step = {"latest": None, "best": checkpoints.best_step()}.get(checkpoint, checkpoint)
    if checkpoint == "best" and step is None:
        raise ValueError(f"No checkpoint of {workdir.path} has a validation loss. Pass --checkpoint=latest.")
    with doing(f"reading the data of {experiment.data_dir}"):
        data = PreparedData.open(experiment.data_dir)
    tokens = data.split(split)
    if not len(tokens):
        raise ValueError(
            f"The split to evaluate must have tokens. Received: {split} of {experiment.data_dir}, empty."
        )
    rows = f"{data.vocab_size:,} rows of {experiment.embed_dim:,}"
    with doing(f"building the model, with a table of {rows}"), strategy.scope():
        # No optimizer: an evaluation holds the parameters alone.
        model = LanguageModel(experiment, vocab_size=data.vocab_size, trainable=False)
    with doing("restoring the checkpoint"):
        metadata = checkpoints.restore(
            model.checkpoint_items(), step=None if step is None else int(step), subset=True
        )
    if metadata is None:
        raise ValueError(
            f"{workdir.path} has no checkpoint yet. Wait for the run's first, or shorten SAVE_EVERY."
        )
    if metadata["vocabulary_sha256"] != data.vocabulary_sha256:
        raise ValueError(
            "A model must be evaluated with the vocabulary it was trained with. Received: "
            f"{experiment.data_dir}, whose vocab.txt is another one. Set DATA_DIR to data of the same vocabulary."
        )
    evaluator = Evaluator(
        model,
        strategy=strategy,
        batch_size=experiment.eval_batch_size,
        window=experiment.eval_window,
        eos_id=data.eos_id,
        compute_dtype=experiment.compute_dtype,
    )
    with (
        doing(f"evaluating {split}"),
        progress(
            total=evaluator.num_steps(tokens), initial=0, description=f"evaluating {split}"
        ) as show_step,
    ):
        result = evaluator.evaluate(tokens, on_step=show_step)
    return {
        "split": split,
        "step": metadata["step"],
        "loss_nats": result.loss_nats,
        "perplexity": result.perplexity,
        "tokens": result.tokens,
        "vocab_size": data.vocab_size,
        "num_devices": strategy.num_replicas_in_sync,
        "seconds": result.seconds,
    }
