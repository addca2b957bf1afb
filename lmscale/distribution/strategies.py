"""Choose the `tf.distribute` strategy of a run."""

import functools
import logging

import tensorflow as tf


def make_strategy(*, cpu_devices=None):
    """Builds the strategy that a run uses on this host.

    Must be called before TensorFlow initialises its devices (before any op runs) when `cpu_devices` is given.

    Args:
      cpu_devices: None for all GPUs of the host (or one CPU if there is none); or N to split the host CPU
        into N logical devices, so that a laptop rehearses an N-GPU job.

    Returns:
      A `tf.distribute.Strategy`.

    Raises:
      ValueError: if `cpu_devices` is below 1, or TensorFlow has already been initialised otherwise.
    """
    # TensorFlow tells of every collective that it traces: it would drown the run's own lines.
    logging.getLogger("tensorflow").setLevel(logging.WARNING)
    if cpu_devices is None:
        gpus = tf.config.list_logical_devices("GPU")
        devices = [gpu.name for gpu in gpus] or ["CPU:0"]
        return mirrored_strategy(tuple(devices))
    if cpu_devices < 1:
        raise ValueError(
            f"cpu_devices must be at least 1. Received: cpu_devices={cpu_devices}. Give --cpu_devices=1 or more."
        )
    cpu = tf.config.list_physical_devices("CPU")[0]
    try:
        tf.config.set_logical_device_configuration(
            cpu, [tf.config.LogicalDeviceConfiguration()] * cpu_devices
        )
    except RuntimeError as error:
        started = len(tf.config.list_logical_devices("CPU"))
        if started < cpu_devices:
            raise ValueError(
                f"cpu_devices={cpu_devices} must be set before TensorFlow starts its devices. Received: a process "
                f"that has started {started} CPU device(s). Call make_strategy first."
            ) from error
    return mirrored_strategy(tuple(f"CPU:{i}" for i in range(cpu_devices)))


@functools.cache
def mirrored_strategy(devices):
    """A `MirroredStrategy` over a tuple of device names: the same object each time.

    So one process may hold several models, also on different numbers of devices.
    """
    # Collectives find each other by a key in the whole process, and fail where groups of different sizes share one.
    key_base = {"_collective_key_base": 100 * len(devices)}
    kind = type("MirroredStrategy", (tf.distribute.MirroredStrategy,), key_base)
    return kind(list(devices))


def first_local_replica(strategy, *, num_local):
    """Number of this process's first replica among all of a strategy's; 0 where one process has them all.

    Args:
      strategy: `tf.distribute.Strategy`.
      num_local: replicas of this process, the same in every process.
    """
    resolver = strategy.cluster_resolver
    if resolver is None or num_local == strategy.num_replicas_in_sync:
        return 0
    return resolver.task_id * num_local


def runs_on_cpu():
    """Whether every device of the current strategy (without one: of the process) is a CPU."""
    if not tf.distribute.has_strategy():
        return not tf.config.list_logical_devices("GPU") + tf.config.list_logical_devices("TPU")
    devices = tf.distribute.get_strategy().extended.worker_devices
    return all(tf.DeviceSpec.from_string(device).device_type == "CPU" for device in devices)
