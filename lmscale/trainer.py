"""The step, for any task: pull, compute, push."""

import tensorflow as tf

from lmscale import communication
from lmscale.assembly import check_treatments, learning_rates, make_task, step_traffic
from lmscale.bodies.dropout import DropoutStream
from lmscale.carried_state import CarriedState
from lmscale.data.batches import Prefetcher
from lmscale.distribution import collectives, ledger
from lmscale.distribution.strategies import first_local_replica
from lmscale.loss_scaling import LossScale, LossScaling
from lmscale.micro_batches import Gradients, accumulate
from lmscale.model import Model, replicated
from lmscale.parameters.clipping import clipping, norm, scalar_sum
from lmscale.parameters.layers import check_all_listed
from lmscale.reading import StepRows
from lmscale.tables.rows import Rows


class Trainer:
    """An experiment on the devices of a strategy: its task, its model, and the step that joins them.

    Attributes:
      step: updates done.
      task, model, batches: `Task`, `Model`, and the task's training batches.
      traffic: `StepTraffic` of the first batch; None on one device.
    """

    def __init__(self, experiment, *, data, strategy, static_shapes=False):
        """Builds the model; the loop is that of `run.py`.

        Args:
          experiment: `Experiment`.
          data: `PreparedData`.
          strategy: `tf.distribute.Strategy`.
          static_shapes: whether `replica_step` is to be compiled by XLA, which needs shapes that do not depend on ids.

        Raises:
          ValueError: if the experiment does not fit the devices or the data.
        """
        num_replicas = strategy.num_replicas_in_sync
        experiment.check_devices(num_replicas)
        self.experiment = experiment
        self.strategy = strategy
        self.data = data
        if experiment.deterministic_ops:
            tf.config.experimental.enable_op_determinism()
        with strategy.scope():
            self.task = make_task(experiment, data=data, num_replicas=num_replicas)
            self.model = Model(
                self.task,
                groups=experiment.groups,
                seed=experiment.seed,
                static_shapes=static_shapes,
            )
            self.batches = self.task.training_batches()
            self.traffic = None
            if num_replicas > 1:
                self.traffic = step_traffic(
                    experiment,
                    self.task,
                    self.batches,
                    treatments=self.model.treatments,
                    num_devices=num_replicas,
                )
                no_dynamic_shapes = static_shapes or isinstance(strategy, tf.distribute.TPUStrategy)
                self.model.exchanges |= self.traffic.chosen(static_shapes=no_dynamic_shapes)
        self._per_replica_batch_size = experiment.global_batch_size // num_replicas
        # Rules are often shared by parameters: what depends on the step alone is computed once for each.
        self._rules = list(
            {id(t.update): t.update for t in self.model.treatments.values() if t.update}.values()
        )
        check_treatments(experiment, self.model.treatments)
        self.step = 0
        num_local = len(strategy.extended.worker_devices)
        self._first_local = first_local_replica(strategy, num_local=num_local) * self._per_replica_batch_size
        stop = self._first_local + num_local * self._per_replica_batch_size
        self._prefetcher = Prefetcher(
            self.batches,
            steps_per_call=experiment.steps_per_call,
            examples=slice(self._first_local, stop),
        )
        with strategy.scope():
            self._state = CarriedState(
                self.task.initial_state(self._per_replica_batch_size), strategy=strategy
            )
            self._loss_scale = None
            if experiment.compute_dtype == "float16":
                self._loss_scale = LossScale(experiment.loss_scaling or LossScaling())

    def learning_rates(self, step):
        """{pattern of a group: learning rate of the update number `step`, a float}, of the groups that have a rule."""
        return learning_rates(self.model.treatments, step)

    # -- the step -------------------------------------------------------------------------------------------------

    def train_steps(self, num_steps=1):
        """Does the updates `self.step` (0-based) to `self.step + num_steps - 1` in one call of TensorFlow.

        Args:
          num_steps: 1 to the experiment's steps_per_call.

        Returns:
          {metric: [num_steps] tensor}; "rows_touched/TABLE" is [num_steps, shards of this process].

        Raises:
          ValueError: if num_steps is out of range.
        """
        steps_per_call = self.experiment.steps_per_call
        if not 1 <= num_steps <= steps_per_call:
            raise ValueError(
                f"num_steps must be in 1 .. {steps_per_call}, the experiment's steps_per_call. Received: "
                f"num_steps={num_steps}. Call more often, or raise steps_per_call."
            )
        features, starts_epoch = self._prefetcher.batches(self.step, num_steps)
        metrics = self._train_steps(
            {name: tf.constant(x) for name, x in features.items()},
            tf.constant(starts_epoch),
            tf.constant(self.step),
            tf.constant(num_steps),
        )
        self.step += num_steps
        return metrics

    @tf.function(autograph=False)
    def _train_steps(self, features, starts_epoch, step, num_steps):
        """`num_steps` of the steps_per_call steps for which there is room: one trace for any number."""
        steps_per_call = self.experiment.steps_per_call

        def one_step(i, arrays):
            batch = {name: x[i] for name, x in features.items()}
            metrics = self.strategy.run(self.replica_step, args=(batch, step + i, starts_epoch[i]))
            of_replicas = {
                name: self.strategy.experimental_local_results(values) for name, values in metrics.items()
            }
            metrics = {
                name: tf.stack(values) if name.startswith("rows_touched/") else values[0]
                for name, values in of_replicas.items()
            }
            return i + 1, {name: arrays[name].write(i, metrics[name]) for name in arrays}

        arrays = {
            name: tf.TensorArray(dtype, size=steps_per_call)
            for name, dtype in {
                **{f"loss/{name}": tf.float32 for name in self.task.heads},
                "loss": tf.float32,
                "penalty": tf.float32,
                "gradient_norm": tf.float32,
                "is_finite": tf.bool,
                **({"loss_scale": tf.float32, "overflowed": tf.bool} if self._loss_scale else {}),
                **{f"rows_touched/{name}": tf.int32 for name in self.model.tables},
                **{f"bytes_received/{part}": tf.int64 for part in self._parts_that_move},
            }.items()
        }
        _, arrays = tf.while_loop(
            lambda i, _: i < num_steps, one_step, [tf.constant(0), arrays], parallel_iterations=1
        )
        return {name: array.stack()[:num_steps] for name, array in arrays.items()}

    def replica_step(self, features, step, starts_epoch):
        """One replica's part of an update: pull, compute, push. In `strategy.run`.

        Args:
          features: {name: [examples, ...] tensor} of all replicas of this process: ids, a few kilobytes.
          step: int32 scalar, updates done before.
          starts_epoch: bool scalar: the carried state does not belong to this batch.

        Returns:
          {metric: scalar}; on several devices also the bytes that this one has received, by part.
        """
        with ledger.recording() as moved:
            metrics = self._replica_step(features, step, starts_epoch)
        received = moved.received()
        return metrics | {
            f"bytes_received/{part}": tf.cast(received.get(part, 0), tf.int64)
            for part in self._parts_that_move
        }

    @property
    def _parts_that_move(self):
        """Parts of a step whose bytes it reports; on one device nothing moves."""
        return communication.PARTS if self.strategy.num_replicas_in_sync > 1 else ()

    def _replica_step(self, features, step, starts_epoch):
        """`replica_step` without what has moved."""
        model, seed = self.model, self.experiment.seed
        first = collectives.replica_id() * self._per_replica_batch_size
        state = self._state.read(starts_epoch=starts_epoch)
        # What a bad step makes of what Keras changes within the call is taken back.
        statistics = [(v, tf.identity(v.value)) for v in model.layers.statistics.values()]
        loss_scale = self._loss_scale.read() if self._loss_scale else None

        start = first - self._first_local
        own = {
            name: collectives.block(x, start, self._per_replica_batch_size) for name, x in features.items()
        }
        reading = model.read(own, first, seed=seed, step=step)
        total_weights = _total_weights(reading.labels)
        gradients = accumulate(
            lambda part, its_state, offset: self._value_and_gradients(
                part,
                its_state,
                dropout=DropoutStream(seed=seed, step=step, first_example=first + offset),
                total_weights=total_weights,
                loss_scale=loss_scale,
            ),
            reading,
            state,
            num_parts=self.experiment.gradient_accumulation_steps,
            communicates=model.communicates,
        )
        collected = model.collect(
            reading, gradients.d_rows, d_shards=gradients.d_shards, d_shard_rows=gradients.d_shard_rows
        )
        with ledger.part("layers"):
            d_layers, losses, penalty, row_squares = collectives.all_reduce_sum(
                [
                    gradients.d_layers,
                    gradients.losses,
                    gradients.penalty,
                    {name: c.squared_norm for name, c in collected.items()},
                ]
            )
        squares = {path: tf.reduce_sum(tf.square(g)) for path, g in d_layers.items()} | {
            f"tables/{name}/{p}": square for name, of in row_squares.items() for p, square in of.items()
        }
        active = {path: self.model.treatments[path].active.at(step) for path in squares}
        squares = {
            path: square if active[path] is True else tf.where(active[path], square, 0.0)
            for path, square in squares.items()
        }
        loss = scalar_sum([*losses.values(), penalty])
        gradient_norm = norm(squares.values())
        loss_is_finite, gradient_is_finite = tf.math.is_finite(loss), tf.math.is_finite(gradient_norm)
        is_finite = loss_is_finite & gradient_is_finite
        scaling = {}
        if self._loss_scale:
            overflowed = self._loss_scale.update(
                loss_is_finite=loss_is_finite, gradient_is_finite=gradient_is_finite
            )
            scaling = {"loss_scale": loss_scale, "overflowed": overflowed}
        self._apply(collected, d_layers, step=step, active=active, is_finite=is_finite, squares=squares)
        self._state.assign(
            [tf.where(is_finite, new, old) for new, old in zip(gradients.state, state, strict=True)]
        )
        for variable, old in statistics:
            variable.assign(tf.where(is_finite, variable.value, old))
        return {
            **{f"loss/{name}": value for name, value in losses.items()},
            "loss": loss,
            "penalty": penalty,
            "gradient_norm": gradient_norm,
            "is_finite": is_finite,
            **scaling,
            **{
                f"rows_touched/{name}": collected[name].num_rows if name in collected else tf.constant(0)
                for name in model.tables
            },
        }

    def _value_and_gradients(self, reading, state, *, dropout, total_weights, loss_scale=None):
        """Rows to losses and back on one replica, without any collective but those of the heads.

        Args:
          reading: `Reading`.
          state: list of [examples, ...], what is carried.
          dropout: `DropoutStream`.
          total_weights: {head: scalar}, of all labels of the global batch.
          loss_scale: float32 scalar by which the loss is multiplied for the backward pass; None for none. What is
            returned is without it.

        Returns:
          `Gradients`.
        """
        task, model = self.task, self.model
        variables = model.updated_layer_variables()
        roles = {
            role: Rows(tf.identity(r.embedding), None if r.bias is None else tf.identity(r.bias))
            for role, r in reading.rows.roles.items()
        }
        sources = {
            role: {"embedding": r.embedding} if r.bias is None else {"embedding": r.embedding, "bias": r.bias}
            for role, r in roles.items()
        }
        with tf.GradientTape() as tape:
            tape.watch(sources)
            hidden, new_state = model.forward(roles, reading.features, state, dropout=dropout)
            # Regularisers of layers, and what they add to the loss: means over the examples here, or the same for all
            # examples. The shares of replicas and parts add up, and so do their gradients.
            penalties = model.layers.penalties()
            num_shares = self.strategy.num_replicas_in_sync * self.experiment.gradient_accumulation_steps
            penalty = [tf.add_n(penalties) / num_shares] if penalties else []
        check_all_listed(tape.watched_variables(), layers=task.layers, reader=task)
        loss_weights = {name: labels.weights / total_weights[name] for name, labels in reading.labels.items()}
        d_penalty = tf.ones([]) if loss_scale is None else loss_scale
        if loss_scale is not None:
            loss_weights = {name: weights * loss_scale for name, weights in loss_weights.items()}
        results = model.head_gradients(hidden, reading, loss_weights=loss_weights)
        d_roles, d_layers = tape.gradient(
            [*hidden.values(), *penalty],
            (sources, variables),
            output_gradients=[
                *(results[name].d_hidden for name in hidden),
                *(d_penalty for _ in penalty),
            ],
        )
        gradients = Gradients(
            losses={
                name: tf.reduce_sum(r.loss * reading.labels[name].weights) / total_weights[name]
                for name, r in results.items()
            },
            penalty=penalty[0] if penalty else tf.zeros([]),
            d_rows=StepRows(
                roles={role: Rows(**{"bias": None} | d) for role, d in d_roles.items()},
                labels={name: r.d_label_rows for name, r in results.items()},
                candidates={name: r.d_candidate_rows for name, r in results.items()},
            ),
            d_shards=_d_shards(task, results),
            d_shard_rows={name: r.d_shard_rows for name, r in results.items() if r.d_shard_rows is not None},
            d_layers={
                # A layer that looks rows up has sparse gradients; one that is not used has none.
                path: tf.zeros(variables[path].shape)
                if g is None
                else tf.cast(tf.convert_to_tensor(g), tf.float32)
                for path, g in d_layers.items()
            },
            state=new_state,
        )
        return gradients if loss_scale is None else gradients.unscaled(loss_scale)

    def _apply(self, collected, d_layers, *, step, active, is_finite, squares):
        """Updates rows and layers, each as its groups say.

        Args:
          collected, d_layers: gradients of rows {table: `CollectedGradients`} and of layers {path: tensor}.
          step: int32 scalar.
          active: {path: whether its groups are active}.
          is_finite: bool scalar: whether anything may be updated.
          squares: {path: squared norm of its gradient}, over all replicas; 0 where inactive.
        """
        model = self.model
        rates = {id(rule): rule.learning_rate_at(step) for rule in self._rules}
        scales = clipping(squares, model.treatments, clip_norm=self.experiment.clip_norm)
        steps, learning_rates, keeps = {}, {}, {}
        for path in squares:
            treatment = model.treatments[path]
            steps[path] = model.num_updates(path, step)
            learning_rates[path] = rates.get(id(treatment.update))
            keeps[path] = is_finite if active[path] is True else is_finite & active[path]
        for name, gradients in collected.items():
            prefix = f"tables/{name}/"
            model.tables[name].apply(
                gradients,
                **{
                    key: {p: values[prefix + p] for p in gradients.gradients}
                    for key, values in (
                        ("step", steps),
                        ("learning_rate", learning_rates),
                        ("scale", scales),
                        ("keep", keeps),
                    )
                },
            )
        model.apply_layer_gradients(
            d_layers, step=steps, learning_rate=learning_rates, scale=scales, keep=keeps
        )

    # -- state ----------------------------------------------------------------------------------------------------

    def parameters(self):
        """`Parameter`s of all that the next step depends on, but for `self.step`, which goes with the metadata."""
        found = self.model.parameters() + self._state.parameters()
        if self._loss_scale:
            found += [
                replicated(f"state/{name}", variable, trainable=False)
                for name, variable in self._loss_scale.variables.items()
            ]
        return found


def _total_weights(labels):
    """{head: sum of the weights of all replicas' labels}.

    Communication: an all-reduce of a scalar, of heads whose weights are not known when the step is traced.
    """
    totals = {name: tf.reduce_sum(own.weights) for name, own in labels.items()}
    known = {name: tf.get_static_value(own.weights) is not None for name, own in labels.items()}
    unknown = {name: x for name, x in totals.items() if not known[name]}
    summed = collectives.all_reduce_sum(unknown) if unknown else {}
    return {
        name: x * collectives.num_replicas() if known[name] else summed[name] for name, x in totals.items()
    }


def _d_shards(task, results):
    """{table: {parameter: sum of the gradients that heads give for every row}}."""
    sums: dict = {}
    for name, result in results.items():
        for parameter, d in (result.d_shard or {}).items():
            of_table = sums.setdefault(task.heads[name].table, {})
            of_table[parameter] = of_table[parameter] + d if parameter in of_table else d
    return sums
