"""The flags of commands that run in several processes, and how such a command joins the others."""

import contextlib
import os
from collections.abc import Iterator

from absl import flags, logging

from lmscale.distribution.cluster import Cluster, find_cluster
from lmscale.distribution.process_group import ProcessGroup
from lmscale.distribution.rendezvous import joined

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
_START_TIMEOUT_SECS = flags.DEFINE_float(
    "start_timeout_secs", 300.0, "How long a process waits for all others to start.", lower_bound=0.0
)
_SILENCE_SECS = flags.DEFINE_float(
    "silence_secs", 20.0, "After how long without a sign of life a process counts as lost.", lower_bound=1.0
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
