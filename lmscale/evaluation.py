"""Exact loss of a model over a piece of text: the full softmax, every token once."""

import dataclasses
import time

import numpy as np
import tensorflow as tf

from lmscale.distribution import collectives
from lmscale.distribution.strategies import first_local_replica
from lmscale.doing import doing
from lmscale.measures import HeadMeasures, perplexity
from lmscale.metrics import progress


@dataclasses.dataclass(frozen=True)
class EvaluationResult:
    """Mean losses over `tokens` tokens, in nats: sums of those of the heads.

    `heads` {head: as `HeadMeasures.results`}; `training_loss_nats` is None unless it was asked for.
    """

    loss_nats: float
    tokens: int
    seconds: float
    heads: dict[str, dict]
    training_loss_nats: float | None = None

    @property
    def perplexity(self):
        """exp(loss_nats), infinite where that overflows."""
        return perplexity(self.loss_nats)

    def report(self):
        """What JSON can hold of it: {"loss_nats", "perplexity", "tokens", "seconds", "heads"}."""
        return {
            "loss_nats": self.loss_nats,
            "perplexity": self.perplexity,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "heads": self.heads,
        }


def scalars(report, *, prefix):
    """{TensorBoard tag: number} of a report, as of `EvaluationResult`; the tags of several heads name them."""
    tags = {
        "exact_loss_nats": report["loss_nats"],
        "exact_perplexity": report["perplexity"],
        "eval_tokens": report["tokens"],
        "eval_secs": report["seconds"],
    }
    for name, of_head in report["heads"].items():
        own = {
            tag: value
            for tag, value in of_head.items()
            if tag not in ("labels", "loss_nats", "perplexity", "by_frequency", "unknown")
        }
        if len(report["heads"]) > 1:
            own |= {"exact_loss_nats": of_head["loss_nats"], "exact_perplexity": of_head["perplexity"]}
        groups = {f"decile_{of['decile']:02}": of for of in of_head.get("by_frequency", ())}
        if "unknown" in of_head:
            groups["unknown"] = of_head["unknown"]
        own |= {
            f"by_frequency/{group}_loss_nats": of["loss_nats"] for group, of in groups.items() if of["labels"]
        }
        tags |= {f"{name}/{tag}" if len(report["heads"]) > 1 else tag: value for tag, value in own.items()}
    return {f"{prefix}/{tag}": value for tag, value in tags.items()}


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
        self._measures = {
            name: HeadMeasures(
                vocabulary=model.task.vocabularies[head.table], names=model.task.measures.get(name, ())
            )
            for name, head in model.task.heads.items()
        }
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
        state = self._initial_state()
        total: dict = {}
        for i in range(batches.num_steps):
            step_sums, state = self._step(
                state, self._local_features(batches, i), tf.constant(i), with_training_loss=with_training_loss
            )
            for name, x in step_sums.items():
                x = self._strategy.experimental_local_results(x)[0].numpy().astype(np.float64)
                total[name] = total[name] + x if name in total else x
            if on_step:
                on_step(i + 1)
        heads = {
            name: measures.results(
                {key.removeprefix(f"{name}/"): x for key, x in total.items() if key.startswith(f"{name}/")}
            )
            for name, measures in self._measures.items()
        }
        # Of heads together, as they are trained: each a mean over its own labels.
        return EvaluationResult(
            loss_nats=sum(of_head["loss_nats"] for of_head in heads.values()),
            tokens=batches.num_labels,
            seconds=time.perf_counter() - start,
            heads=heads,
            training_loss_nats=(
                sum(total[f"{name}/training_loss"] / total[f"{name}/weight"] for name in heads)
                if with_training_loss
                else None
            ),
        )

    def label_losses(self, batches, *, head):
        """The exact loss of each label of one head, batch by batch.

        Args:
          batches: as of `evaluate`.
          head: its name.

        Yields:
          [batch_size, labels of an example] float32 nats, at every process. That of padding has no meaning.
        """
        state = self._initial_state()
        for i in range(batches.num_steps):
            losses, state = self._label_step(state, self._local_features(batches, i), head=head)
            losses = self._strategy.experimental_local_results(losses)[0].numpy()
            examples = self._num_replicas * self._per_replica_batch_size
            yield losses.reshape([examples, -1])[: self._batch_size]

    def _local_features(self, batches, step):
        """{name: [examples of this process, ...] tensor} of a batch, filled up with padding."""
        first, stop = self._local_examples
        examples = slice(min(first, self._batch_size), min(stop, self._batch_size))
        padding = stop - first - (examples.stop - examples.start)
        return {
            # Ids of 0, with the weight 0.
            name: tf.constant(np.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1)))
            for name, x in batches.at(step, examples).features.items()
        }

    @tf.function(autograph=False)
    def _initial_state(self):
        initial_state = self._model.task.initial_state
        return self._strategy.run(lambda: initial_state(self._per_replica_batch_size))

    @tf.function(autograph=False)
    def _step(self, state, features, step, *, with_training_loss):
        def replica_step(state):
            model = self._model
            reading = self._read(features, step=step if with_training_loss else None)
            hidden, new_state = model.forward(reading.rows.roles, reading.features, state, dropout=None)
            exact = model.exact_losses(hidden, reading, compute_dtype=self._compute_dtype)
            sums = {}
            for name, measures in self._measures.items():
                labels, ranks = reading.labels[name], None
                if measures.uses_ranks:
                    ranks = model.ranks(hidden, reading, head=name, compute_dtype=self._compute_dtype)
                of_head = measures.sums(loss=exact[name], labels=labels, ranks=ranks)
                sums |= {f"{name}/{key}": x for key, x in of_head.items()}
            if with_training_loss:
                weights = {name: labels.weights for name, labels in reading.labels.items()}
                for name, result in model.head_gradients(hidden, reading, loss_weights=weights).items():
                    # Padding may have a non-finite loss of its own: it must not reach the sum.
                    loss = tf.where(weights[name] > 0, result.loss * weights[name], 0.0)
                    sums[f"{name}/training_loss"] = tf.reduce_sum(loss)
            return collectives.all_reduce_sum(sums), new_state

        return self._strategy.run(replica_step, args=(state,))

    @tf.function(autograph=False)
    def _label_step(self, state, features, *, head):
        def replica_step(state):
            model = self._model
            reading = self._read(features, step=None)
            hidden, new_state = model.forward(reading.rows.roles, reading.features, state, dropout=None)
            exact = model.exact_losses(hidden, reading, compute_dtype=self._compute_dtype)
            return collectives.all_gather(exact[head]), new_state

        return self._strategy.run(replica_step, args=(state,))

    def _read(self, features, *, step):
        """This replica's `Reading` of {name: [examples of this process, ...]}."""
        first = collectives.replica_id() * self._per_replica_batch_size
        start = first - self._local_examples[0]
        return self._model.read(
            {name: collectives.block(x, start, self._per_replica_batch_size) for name, x in features.items()},
            first,
            # Without the examples that fill up the devices: candidates must not depend on their number.
            num_examples=self._batch_size,
            seed=self._seed,
            step=step,
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
          {"split", "step", "loss_nats", "perplexity", "tokens", "seconds", "heads", "vocab_size", "num_devices"}; the
          vocab_size of several heads is that of the largest.

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
            **result.report(),
            "vocab_size": max(restored.task.num_rows(head.table) for head in restored.task.heads.values()),
            "num_devices": restored.strategy.num_replicas_in_sync,
        }
