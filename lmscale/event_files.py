"""TensorBoard's event files, named so that they are read in the order in which they were written."""

import math
import os
import socket
import time
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SourceMetadata
from tensorboard.summary.writer.record_writer import RecordWriter

from lmscale.paths import naming
from lmscale.storage import is_remote

# Files with this ending tell about the run, not about its steps; see `lmscale.hparams_tab`.
SESSION = ".session"
STORE_SECS = 30.0


class EventFile:
    """A new event file, which sorts behind all others of its directory.

    TensorBoard reads the files of a directory in the order of their names, which hold the second in which each was
    made, and takes a step that it reads after a later one for the start of a repetition. So where the clock went
    back, or two files are made within a second, the name holds the second after the latest one there.

    An event is with the operating system when `add` returns. To a store, which takes a file as a whole, it goes with
    the first one after `STORE_SECS`, or with `close`. Use it as a context manager.
    """

    def __init__(self, directory: Path, *, ending: str = ""):
        """Makes the file.

        Args:
          directory: where; it must exist.
          ending: of the name.

        Raises:
          OSError: as `add`.
        """
        second = max([int(time.time()), *(_second(path) + 1 for path in event_files(directory))])
        name = f"events.out.tfevents.{second:010d}.{socket.gethostname()}.{os.getpid()}{ending}"
        self.path = directory / name
        with naming(self.path):
            self._file = self.path.open("xb")
        self._flushed_at = -math.inf
        self._records = RecordWriter(self._file)
        writer = SourceMetadata(writer=__name__)
        self.add(Event(wall_time=time.time(), file_version="brain.Event:2", source_metadata=writer))

    def add(self, event: Event) -> None:
        """Appends an event. Raises OSError, with the file's name, if the system refuses: a full disk."""
        with naming(self.path):
            self._records.write(event.SerializeToString())
            now = time.monotonic()
            if not is_remote(self.path) or now - self._flushed_at >= STORE_SECS:
                self._file.flush()
                self._flushed_at = now

    def close(self) -> None:
        with naming(self.path):
            self._file.close()

    def __enter__(self) -> "EventFile":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def event_files(directory: Path, *, ending: str = "") -> list[Path]:
    """The event files of a directory whose names have the ending."""
    return list(directory.glob(f"events.out.tfevents.*{ending}"))


def _second(path: Path) -> int:
    """The second in the name; -1 for a name of other programs that holds none."""
    text = path.name.split(".")[3]
    return int(text) if text.isdecimal() else -1
