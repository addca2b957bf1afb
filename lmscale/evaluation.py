"""Exact loss of a model over a piece of text: the full softmax, every token once."""

import dataclasses
import math
import time

import numpy as np
import tensorflow as tf

from lmscale.distribution import collectives
from lmscale.distribution.strategies import first_local_replica
from lmscale.doing import doing
from lmscale.metrics import progress


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

    The batch size belongs to the result where a state is carried: a text is cut into so many lanes, each of which
    starts without context. The number of devices does not: examples of padding fill up what does not divide.
    """

    def __init__(self, model, *, strategy, batch_size, compute_dtype="float32", seed=0):
        """Args:
        model: `Model`.
        strategy: the one that it was built under.
        batch_size: examples of a batch.
        compute_dtype: of the products of the exact softmax.
        seed: of the candidates where training losses are measured beside the exact ones.
        """
        self._model = model
        self._strategy = strategy
        self._batch_size = batch_size
        self._compute_dtype = compute_dtype
        self._seed = seed
        self._num_replicas = strategy.num_replicas_in_sync
        self._per_replica_batch_size = -(-batch_size // self._num_replicas)
        num_local = len(strategy.extended.worker_devices)
        first_replica = first_local_replica(strategy, num_local=num_local)
        self._local_examples = (
            first_replica * self._per_replica_batch_size,
            (first_replica + num_local) * self._per_replica_batch_size,
        )

    @classmethod
    def of_experiment(cls, experiment, model, *, strategy):
        """The evaluator of an experiment's model."""
        return cls(
            model,
            strategy=strategy,
            batch_size=experiment.eval_batch_size,
            compute_dtype=experiment.compute_dtype,
            seed=experiment.seed,
        )

    def evaluate(self, batches, *, with_training_loss=False, on_step=None):
        """Exact mean loss over `batches`.

        Args:
          batches: as `Task.evaluation_batches` returns them.
          with_training_loss: also measure the training loss, without dropout.
          on_step: called with the number of batches done after each.

        Returns:
          `EvaluationResult`, of all heads together.
        """
        start = time.perf_counter()
        first, stop = self._local_examples
        examples = slice(min(first, self._batch_size), min(stop, self._batch_size))
        padding = stop - first - (examples.stop - examples.start)
        state = self._initial_state()
        sums = np.zeros([2], np.float64)
        for i in range(batches.num_steps):
            features = {
                # Ids of 0, with the weight 0.
                name: np.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1))
                for name, x in batches.at(i, examples).features.items()
            }
            step_sums, state = self._step(
                state,
                {name: tf.constant(x) for name, x in features.items()},
                tf.constant(i),
                with_training_loss=with_training_loss,
            )
            sums += self._strategy.experimental_local_results(step_sums)[0].numpy()
            if on_step:
                on_step(i + 1)
        mean = sums / batches.num_labels
        return EvaluationResult(
            loss_nats=float(mean[0]),
            tokens=batches.num_labels,
            seconds=time.perf_counter() - start,
            training_loss_nats=float(mean[1]) if with_training_loss else None,
        )

    @tf.function(autograph=False)
    def _initial_state(self):
        initial_state = self._model.task.initial_state
        return self._strategy.run(lambda: initial_state(self._per_replica_batch_size))

    @tf.function(autograph=False)
    def _step(self, state, features, step, *, with_training_loss):
        def replica_step(state):
            model = self._model
            first = collectives.replica_id() * self._per_replica_batch_size
            start = first - self._local_examples[0]
            reading = model.read(
                {
                    name: collectives.block(x, start, self._per_replica_batch_size)
                    for name, x in features.items()
                },
                first,
                # Without the examples that fill up the devices: candidates must not depend on their number.
                num_examples=self._batch_size,
                seed=self._seed,
                step=step if with_training_loss else None,
            )
            hidden, new_state = model.forward(reading.rows.roles, reading.features, state, dropout=None)
            exact = model.exact_losses(hidden, reading, compute_dtype=self._compute_dtype)
            sums = [_sum_of_labels(exact, reading.labels), tf.zeros([])]
            if with_training_loss:
                weights = {name: labels.weights for name, labels in reading.labels.items()}
                results = model.head_gradients(hidden, reading, loss_weights=weights)
                sums[1] = _sum_of_labels({name: r.loss for name, r in results.items()}, reading.labels)
            return collectives.all_reduce_sum(tf.stack(sums)), new_state

        return self._strategy.run(replica_step, args=(state,))


def _sum_of_labels(losses, labels):
    """Sum over heads and labels; a loss may be the mean of several of these.

    Padding may have a non-finite loss of its own: it must not reach the sum.
    """
    return tf.add_n(
        [
            tf.reduce_sum(tf.where(labels[name].weights > 0, loss * labels[name].weights, 0.0))
            for name, loss in losses.items()
        ]
    )


class CheckpointEvaluator:
    """Evaluates checkpoints of a run exactly. Data, model and graph are there once, for any number of them."""

    def __init__(self, restored, *, split):
        """Args:
          restored: `RestoredModel` of the run.
          split: "train", "valid" or "test".

        Raises:
          ValueError: if the split does not fit the experiment.
        """
        self._restored = restored
        self._split = split
        self._batches = restored.task.evaluation_batches(split)
        self._evaluator = Evaluator.of_experiment(
            restored.experiment, restored.model, strategy=restored.strategy
        )

    def evaluate(self, step=None):
        """Restores a checkpoint and evaluates it.

        Args:
          step: int; None for the newest.

        Returns:
          {"split", "step", "loss_nats", "perplexity", "tokens", "vocab_size", "num_devices", "seconds"}.

        Raises:
          As `RestoredModel.restore`.
        """
        restored = self._restored
        metadata = restored.restore(step)
        with (
            doing(f"evaluating {self._split}"),
            progress(
                total=self._batches.num_steps,
                initial=0,
                description=f"evaluating {self._split}",
                is_shown=restored.group.is_chief,
            ) as show_step,
            restored.weights(metadata),
        ):
            result = self._evaluator.evaluate(self._batches, on_step=show_step)
        return {
            "split": self._split,
            "step": metadata["step"],
            "loss_nats": result.loss_nats,
            "perplexity": result.perplexity,
            "tokens": result.tokens,
            "vocab_size": max(restored.task.num_rows(head.table) for head in restored.task.heads.values()),
            "num_devices": restored.strategy.num_replicas_in_sync,
            "seconds": result.seconds,
        }
