"""Choose the `tf.distribute` strategy of a run: CPUs, GPUs and how much of them, or a TPU."""

import contextlib
import functools
import logging
import os
import socket

import tensorflow as tf
from tensorflow.python.eager import context

from lmscale.distribution.clusters.gpus import gpus_of_process, share_of_process, visible_gpus
from lmscale.stop_signals import exit_on_stop_signals

_ANSWER_SECONDS = 10
_HEARTBEAT_TIMEOUT_MS = 24 * 60 * 60 * 1000


def make_strategy(*, cpu_devices=None, gpu_memory_mib=None, tpu=None, group=None):
    """Builds the strategy that a run uses: over the devices of this host, or over those of several processes.

    Must be called before TensorFlow initialises its devices (before any op runs) when an argument is given, and
    where other processes use the same GPUs.

    Args:
      cpu_devices: None for all GPUs of the host (or one CPU if there is none); or N to split the host CPU
        into N logical devices, so that a laptop rehearses an N-GPU job. GPUs are then not touched.
      gpu_memory_mib: as of `limit_gpu_memory`.
      tpu: None; or the TPU to run on, as of `tpu_strategy`.
      group: `ProcessGroup` of the run; None for one process. Of several, each must call this.

    Returns:
      A `tf.distribute.Strategy`.

    Raises:
      ValueError: if an argument is below 1, both are given, or TensorFlow has already been initialised otherwise; if
        there is no GPU whose memory could be limited; if TF_CONFIG in the environment is not of a cluster; if the TPU
        does not answer, or is asked for beside another argument.
    """
    # TensorFlow tells of every collective that it traces: it would drown the run's own lines.
    logging.getLogger("tensorflow").setLevel(logging.WARNING)
    if cpu_devices is not None and gpu_memory_mib is not None:
        raise ValueError(
            "gpu_memory_mib is for runs on GPUs. Received also: "
            f"cpu_devices={cpu_devices}. Leave out --cpu_devices or --gpu_memory_mib."
        )
    if group is not None and group.size > 1:
        if tpu is not None:
            raise ValueError(
                f"A TPU's cores, of all its hosts, are run by one process. Received: tpu={tpu!r}, {group.size} "
                "processes. Start one process, with --num_processes=1 if the environment tells of more."
            )
        return _multi_worker_strategy(group, cpu_devices=cpu_devices, gpu_memory_mib=gpu_memory_mib)
    _check_tf_config()
    if tpu is not None:
        for name, value in (("cpu_devices", cpu_devices), ("gpu_memory_mib", gpu_memory_mib)):
            if value is not None:
                raise ValueError(
                    f"tpu is for runs on TPUs. Received also: {name}={value}. Leave out --tpu or --{name}."
                )
        return tpu_strategy(tpu)
    if cpu_devices is None:
        limit_gpu_memory(gpu_memory_mib)
    if cpu_devices is None:
        gpus = tf.config.list_logical_devices("GPU")
        devices = [gpu.name for gpu in gpus] or ["CPU:0"]
        return mirrored_strategy(tuple(devices))
    if cpu_devices < 1:
        raise ValueError(
            f"cpu_devices must be at least 1. Received: cpu_devices={cpu_devices}. Give --cpu_devices=1 or more."
        )
    # Not by growing memory, which TensorFlow forgets where the CPU is split. A process that has started is left alone.
    with contextlib.suppress(RuntimeError):
        tf.config.set_visible_devices([], "GPU")
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


def _multi_worker_strategy(group, *, cpu_devices, gpu_memory_mib):
    """A `MultiWorkerMirroredStrategy` over all GPUs of every process, or over one CPU of each."""
    if cpu_devices is not None:
        if cpu_devices != 1:
            raise ValueError(
                "MultiWorkerMirroredStrategy takes one CPU device of each process. Received: "
                f"cpu_devices={cpu_devices}, {group.size} processes. Start more processes with --cpu_devices=1 instead."
            )
        tf.config.set_visible_devices([], "GPU")
    else:
        tf.config.set_visible_devices(_own_gpus(group.cluster), "GPU")
        limit_gpu_memory(gpu_memory_mib)
    num_gpus = len(tf.config.get_visible_devices("GPU"))
    group.check_same("The number of GPUs", num_gpus)
    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
        tf.train.ClusterSpec({"worker": list(group.addresses)}),
        task_type="worker",
        task_id=group.rank,
        num_accelerators={"GPU": num_gpus},
        rpc_layer="grpc",
    )
    _leave_heartbeats_to_group(group)
    try:
        strategy = tf.distribute.MultiWorkerMirroredStrategy(cluster_resolver=resolver)
    finally:
        # TensorFlow's servers take SIGTERM for themselves, and do nothing with it.
        exit_on_stop_signals()
    return strategy


def _leave_heartbeats_to_group(group):
    """Keeps TensorFlow from ending processes that were paused for ten seconds: whom a run has lost its group says."""
    job = tf.compat.v1.ConfigProto().experimental.coordination_config.coordinated_job_list.add(
        name="worker", num_tasks=group.size
    )
    # As MultiWorkerMirroredStrategy does where nobody has, but for the time.
    context.context().configure_coordination_service(
        service_type="standalone",
        service_leader="/job:worker/replica:0/task:0",
        coordinated_jobs=[job],
        heartbeat_timeout_in_ms=_HEARTBEAT_TIMEOUT_MS,
    )


def _own_gpus(cluster):
    """The GPUs of this process: all that TensorFlow sees, or a share where others of its host see them too."""
    gpus = tf.config.list_physical_devices("GPU")
    listed = visible_gpus(os.environ)
    if listed is None:
        return list(share_of_process(gpus, cluster))
    own = gpus_of_process(os.environ, cluster)
    return [gpu for gpu, name in zip(gpus, listed, strict=False) if name in own]


def limit_gpu_memory(mib=None):
    """Has TensorFlow take less than all memory of each GPU, so that another process finds some.

    The variable TF_FORCE_GPU_ALLOW_GROWTH of the environment, which TensorFlow reads itself, wins: with `false`, all
    of the memory, or of the limit, is taken at once; with `true`, it grows, up to the limit if there is one.

    Args:
      mib: None to take memory as it is needed (which is not given back before the process ends); or take so many MiB
        of each GPU at once, and no more.

    Raises:
      ValueError: if `mib` is below 1, there is no GPU, or TensorFlow has started its GPUs otherwise.
    """
    gpus = tf.config.list_physical_devices("GPU")
    if mib is None:
        for gpu in gpus:
            # In a process that has started its devices already, or limited them, they stay as they are.
            with contextlib.suppress(RuntimeError, ValueError):
                tf.config.experimental.set_memory_growth(gpu, True)
        return
    if mib < 1:
        raise ValueError(
            f"gpu_memory_mib must be at least 1. Received: gpu_memory_mib={mib}. Give --gpu_memory_mib=1 or more."
        )
    if not gpus:
        raise ValueError(
            f"gpu_memory_mib needs a GPU that TensorFlow sees. Received: gpu_memory_mib={mib} and none. Leave out "
            "--gpu_memory_mib, or see to the driver, to CUDA's libraries and to CUDA_VISIBLE_DEVICES."
        )
    for gpu in gpus:
        try:
            tf.config.set_logical_device_configuration(
                gpu, [tf.config.LogicalDeviceConfiguration(memory_limit=mib)]
            )
        except RuntimeError as error:
            raise ValueError(
                f"gpu_memory_mib={mib} must be set before TensorFlow starts its devices. Received: a process that has "
                "started them otherwise. Call make_strategy first."
            ) from error


def _check_tf_config():
    """Raises ValueError for a TF_CONFIG that TensorFlow, which reads it for any strategy, would stumble over."""
    try:
        tf.distribute.cluster_resolver.TFConfigClusterResolver().cluster_spec()
    except (ValueError, TypeError) as error:
        raise ValueError(
            "TF_CONFIG in the environment must describe a cluster in JSON, or be unset. Received: "
            f"{os.environ['TF_CONFIG']!r} ({error}). Unset it: a run has one host and does not need it."
        ) from error


def tpu_strategy(tpu):
    """Connects to a TPU, initialises it, and builds the strategy of all of its cores.

    What the TPU held before is lost. Not run on a TPU yet: see docs/tpu.md.

    Args:
      tpu: "local" for the TPU of this machine (a TPU VM); or the name of one of this machine's project, or the address
        "grpc://host:port" of a TPU's worker.

    Returns:
      `tf.distribute.TPUStrategy`. Its steps are exchanged in static shapes: see `choose_exchange`.

    Raises:
      ValueError: naming what did not answer: no TPU of this name or at this address, a TensorFlow without TPUs, a
        machine without one, another process that holds it.
    """
    if not tpu:
        raise ValueError(
            f"tpu must be `local`, a name or an address. Received: tpu={tpu!r}. Give --tpu=local."
        )
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu=tpu)
        address = resolver.master()
    # Whatever the client of Google Cloud raises: its errors have no class in common.
    except Exception as error:
        raise ValueError(
            f"The TPU {tpu!r} must be found by its name, which only machines of Google Cloud can look up. Received: "
            f"{_first_line(error)}. On the TPU's own machine give --tpu=local; else check the name, and that the "
            "TPU is of this machine's project and zone, or give its address, --tpu=grpc://host:port."
        ) from error
    try:
        if tpu != "local":
            _check_answers(tpu, address)
            tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
        return tf.distribute.TPUStrategy(resolver)
    except (tf.errors.OpError, RuntimeError) as error:
        raise ValueError(_why_no_tpu(tpu, str(error))) from error


def _check_answers(tpu, address):
    """Raises ValueError unless something listens at `address`, for which TensorFlow would wait without an end."""
    host, _, port = address.rpartition("//")[2].rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_SECONDS):
            pass
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The TPU {tpu!r} must answer at {address}. Received: {error}. See that the TPU is running (its state "
            "READY) and reachable from here, its port 8470 as a rule; on the TPU's own machine give --tpu=local."
        ) from error


def _why_no_tpu(tpu, message):
    """What a user can do about a TPU that TensorFlow could not initialise, with this message."""
    where = "this machine" if tpu == "local" else tpu
    version = f"TensorFlow {tf.__version__}"
    if "already in use" in message or "lockfile" in message:
        what = (
            "Another process holds the TPU. End it (`sudo lsof -w /dev/accel* /dev/vfio/*` names it); if none is left, "
            "remove /tmp/libtpu_lockfile"
        )
    elif "No OpKernel was registered" in message:
        what = (
            f"The installed {version} has no support for TPUs. Install tensorflow-tpu in place of tensorflow, on the "
            "TPU's own machine: launch/setup.sh --tpu"
        )
    else:
        what = (
            f"The installed {version} found no TPU that it could start. See that the machine has one (`ls /dev/accel* "
            "/dev/vfio`), that no other process holds it, and that libtpu is of the version in requirements-tpu.lock"
        )
    return f"The TPU of {where} must answer. Received: {_first_line(message)}. {what}; or leave out --tpu."


def _first_line(error):
    """The first line of an error's text that says something."""
    lines = [line.strip() for line in str(error).splitlines()]
    told = [
        line for line in lines if line and not line.startswith(("Graph execution", "Detected at", "<stack"))
    ]
    return told[0].rstrip(".:") if told else type(error).__name__


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
