"""The flags that say on which devices a command runs, and in which processes: to a group and a strategy."""

import contextlib
import math
import os
from collections.abc import Iterator

from absl import flags, logging

from lmscale.distribution.cluster import Cluster, find_cluster
from lmscale.distribution.process_group import ProcessGroup
from lmscale.distribution.rendezvous import joined

_CPU_DEVICES = flags.DEFINE_integer(
    "cpu_devices", None, "Split the host CPU into this many devices. Without it: all GPUs, or else one CPU."
)
_GPU_MEMORY_MIB = flags.DEFINE_integer(
    "gpu_memory_mib",
    None,
    "Reserve so much of each GPU's memory. Without it: as much as is needed, as it is needed.",
)
_TPU = flags.DEFINE_string(
    "tpu", None, "Run on a TPU: `local` for that of this machine, a name or an address."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator",
    None,
    "HOST:PORT of process 0, of a run in several processes. Without it: as the launcher's environment says.",
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Number of processes of the run.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Number of this process, from 0.")
_PORT = flags.DEFINE_integer(
    "port", None, "Where processes listen, plus their number on the host, if the environment gives no ports."
)
_LONGEST_SECS = 1e6  # More than eleven days.
_START_TIMEOUT_SECS = flags.DEFINE_float(
    "start_timeout_secs",
    300.0,
    "How long a process waits for all others to start.",
    lower_bound=0.0,
    upper_bound=_LONGEST_SECS,
)
_SILENCE_SECS = flags.DEFINE_float(
    "silence_secs",
    20.0,
    "After how long without a sign of life a process counts as lost. The same in all processes.",
    lower_bound=1.0,
    upper_bound=_LONGEST_SECS,
)
for _name in ("start_timeout_secs", "silence_secs"):
    # Bounds let it through.
    flags.register_validator(
        _name, lambda secs: not math.isnan(secs), message="must be a number of seconds. Received: nan."
    )


def cluster() -> Cluster:
    """The processes of the run, from the flags or the environment; raises ValueError where these contradict."""
    return find_cluster(
        os.environ,
        coordinator=_COORDINATOR.value,
        num_processes=_NUM_PROCESSES.value,
        process_id=_PROCESS_ID.value,
        port=_PORT.value,
    )


@contextlib.contextmanager
def processes() -> Iterator[ProcessGroup]:
    """A context in which this process is one of the run's. Only the chief logs what goes as it should."""
    found = cluster()
    if found.warning:
        logging.warning("%s", found.warning)
    with joined(
        found, start_timeout_secs=_START_TIMEOUT_SECS.value, silence_secs=_SILENCE_SECS.value
    ) as group:
        if not group.is_chief and not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)
        yield group


def strategy(group: ProcessGroup | None = None):
    """The `tf.distribute.Strategy` over the devices of this host, or over those of a group's processes."""
    # TensorFlow takes seconds to import: mistakes in flags come before.
    from lmscale.distribution.strategies import make_strategy

    return make_strategy(
        cpu_devices=_CPU_DEVICES.value, gpu_memory_mib=_GPU_MEMORY_MIB.value, tpu=_TPU.value, group=group
    )
