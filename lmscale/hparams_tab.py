"""What TensorBoard's HParams tab tells about a run: its settings, and whether it has finished.

The tab calls a start of a run a session, and lists for it the metrics of its directory and of those below. The work
directory itself will not do: with --logdir=WORKDIR its name is ".", which to the tab has nothing below it. So both
`train/` and `eval/` hold a session, of one trial: they share a row.

Of a session, TensorBoard keeps what it reads first. So each start writes it to a file of its own, and removes that of
the start before. A TensorBoard that is running goes on showing the settings that it has read, until it is restarted.
"""

import math
import socket
import time
from collections.abc import Mapping
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import api as hparams_api
from tensorboard.plugins.hparams import api_pb2
from tensorboard.plugins.hparams.summary import session_end_pb

from lmscale.event_files import SESSION, EventFile, event_files
from lmscale.workdir import Workdir

_LARGEST_EXACT_INTEGER = 2**53  # The tab's numbers are float64.


def list_run(workdir: Workdir, *, settings: Mapping[str, Any]) -> None:
    """Shows what runs now, in place of what an earlier start in the work directory showed.

    Args:
      workdir: of the run; it names the trial.
      settings: {name: value}. Numbers, bools and text are shown as such, anything else as text.

    Raises:
      OSError: if the disk is full.
    """
    # The name first, since the table cuts it off. With the host: the logs of two machines may come together below one
    # --logdir, from the same paths.
    path = workdir.path.resolve()
    trial = f"{path.name} ({socket.gethostname()}:{path})"
    shown = {name: _shown(value) for name, value in settings.items()}
    for directory in (workdir.train_dir, workdir.eval_dir):
        directory.mkdir(parents=True, exist_ok=True)
        earlier = event_files(directory, ending=SESSION)
        _write(directory, hparams_api.hparams_pb(shown, trial_id=trial))
        for path in earlier:
            path.unlink()


def mark_finished(workdir: Workdir) -> None:
    """Shows that what `list_run` listed has done all its steps. Of any other end the status stays unknown.

    Raises:
      OSError: if the disk is full.
    """
    # By way of bytes: it is TensorFlow's class, not TensorBoard's.
    summary = Summary.FromString(session_end_pb(api_pb2.STATUS_SUCCESS).SerializeToString())
    for directory in (workdir.train_dir, workdir.eval_dir):
        _write(directory, summary)


def _write(directory, summary: Summary) -> None:
    with EventFile(directory, ending=SESSION) as file:
        file.add(Event(summary=summary, wall_time=time.time()))


def _shown(value: Any) -> bool | int | float | str:
    # The tab leaves out numbers that JSON lacks, and rounds those that float64 lacks.
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, int) and abs(value) > _LARGEST_EXACT_INTEGER:
        return str(value)
    return value if isinstance(value, bool | int | float | str) else str(value)
