"""From an experiment to what its steps need: the task, settings that it could not train by, what a step moves."""

import math

from lmscale import communication, keras_settings
from lmscale.parameters import averages
from lmscale.tasks.task import TaskContext


def make_task(experiment, *, data, num_replicas, training=True):
    """The task of an experiment, with Keras's settings those of the experiment. In `strategy.scope()`.

    Args:
      experiment: `Experiment`.
      data: `PreparedData`.
      num_replicas: devices.
      training: whether steps of training will follow.

    Returns:
      `Task`.
    """
    keras_settings.reset(seed=experiment.seed, compute_dtype=experiment.compute_dtype)
    context = TaskContext(
        data=data,
        seed=experiment.seed,
        global_batch_size=experiment.global_batch_size,
        eval_batch_size=experiment.eval_batch_size,
        num_replicas=num_replicas,
        training=training,
    )
    return experiment.task(context)


def learning_rates(treatments, step):
    """{pattern of a group: learning rate of the update number `step`, a float}, of the groups that have a rule."""
    rules = {t.group: t.update for t in treatments.values() if t.update}
    return {group: float(rule.learning_rate_at(step)) for group, rule in rules.items()}


def check_treatments(experiment, treatments):
    """Raises ValueError for groups that the run could not train by, or evaluate: learning rates, averages.

    Of each learning rate, the first and the last are looked at: finite, and 0 or more. Runs operations.
    """
    if experiment.evaluate_averages:
        averages.check_any(treatments)
    for which, step in (("first", 0), ("last", experiment.train_steps - 1)):
        for group, rate in learning_rates(treatments, step).items():
            if not 0 <= rate < math.inf:
                raise ValueError(
                    "A learning rate must be finite and at least 0. Received: "
                    f"{rate} at the {which} step, of the group {group!r}. Set LEARNING_RATE and ROW_LEARNING_RATE to "
                    "positive numbers, and a schedule so that it stays above 0."
                )


def step_traffic(experiment, task, batches, *, treatments, num_devices):
    """What the first step moves between devices: what exchanges are chosen by, the same in every process.

    Args:
      experiment: `Experiment`.
      task: `Task`, and its training `batches`.
      treatments: {path: `Treatment`}.
      num_devices: devices.

    Returns:
      `StepTraffic`.
    """
    updated = {
        path.split("/")[1] for path, t in treatments.items() if t.update and path.startswith("tables/")
    }
    return communication.StepTraffic(
        task,
        batches.at(0).features,
        num_devices=num_devices,
        seed=experiment.seed,
        frozen_tables=set(task.tables) - updated,
    )
