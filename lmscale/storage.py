"""Where files are: on this machine, or in a store that TensorFlow reaches by a scheme, as gs://bucket/run.

`as_path` gives a `pathlib.Path` for the first, with all that POSIX promises, and a `RemotePath` for the second, which
has the part of its interface that lmscale uses, by way of `tf.io.gfile`. An object store has no locks, no fsync, no
renames of directories and no appending. What it has: a file that is written anew is the old one or the new one, as a
whole. Who writes to a `RemotePath` has to make do with that; `is_remote` tells.
"""

import contextlib
import errno
import fnmatch
import functools
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lmscale.paths import expand, scheme

_logger = logging.getLogger(__name__)

STALE_SECS = 120.0  # After how long without renewal the owner of a directory counts as gone.
SETTLE_SECS = 2.0  # How long to wait for another one that starts at the same time.


def as_path(path: Any) -> Path:
    """A path object for what a user gave, `~` expanded; what it returns for a store only looks like a `Path`.

    Raises:
      ValueError: if TensorFlow does not know the scheme.
    """
    if isinstance(path, RemotePath):
        return path  # type: ignore[return-value]
    text = expand(path, remote=True)
    name = scheme(text)
    if name is None:
        return Path(text)
    known = _known_schemes()
    if name not in known:
        raise ValueError(
            f"A path must be of this machine, or of a store that TensorFlow knows: {', '.join(known)}. Received: "
            f"{text}. Mount the store, and pass the path of the mount."
        )
    return RemotePath(text)  # type: ignore[return-value]


def is_remote(path: Any) -> bool:
    """Whether a path object is of a store."""
    return isinstance(path, RemotePath)


@functools.cache
def _known_schemes() -> list[str]:
    # TensorFlow takes seconds to import, which a path of this machine does not need.
    import tensorflow as tf

    return sorted(filter(None, tf.io.gfile.get_registered_schemes()))


class RemotePath:
    """A path with a scheme. Its methods are those of `pathlib.Path`; an error of TensorFlow becomes an OSError."""

    def __init__(self, text: str):
        start, _, rest = text.partition("://")
        parts = [part for part in rest.split("/") if part]
        self._text = f"{start}://{'/'.join(parts)}"

    def __str__(self) -> str:
        return self._text

    __fspath__ = __str__

    def __repr__(self) -> str:
        return f"RemotePath({self._text!r})"

    def __eq__(self, other) -> bool:
        return isinstance(other, RemotePath) and str(other) == self._text

    def __lt__(self, other) -> bool:
        return self._text < str(other)

    def __hash__(self) -> int:
        return hash(self._text)

    def __truediv__(self, name) -> "RemotePath":
        return RemotePath(f"{self._text}/{os.fspath(name)}")

    @property
    def name(self) -> str:
        return self._text.partition("://")[2].rpartition("/")[2]

    @property
    def parent(self) -> "RemotePath":
        head = self._text.rpartition("/")[0]
        return self if head.endswith("/") or ":/" not in head else RemotePath(head)

    def with_name(self, name: str) -> "RemotePath":
        return self.parent / name

    def absolute(self) -> "RemotePath":
        return self

    resolve = absolute

    # What is there.

    def exists(self) -> bool:
        with self.errors() as gfile:
            return gfile.exists(self._text)

    def is_dir(self) -> bool:
        with self.errors() as gfile:
            return gfile.isdir(self._text)

    def is_file(self) -> bool:
        return self.exists() and not self.is_dir()

    def stat(self) -> os.stat_result:
        """Of which only `st_size` is meant."""
        with self.errors() as gfile:
            return os.stat_result((0, 0, 0, 0, 0, 0, gfile.stat(self._text).length, 0, 0, 0))

    def iterdir(self) -> Iterator["RemotePath"]:
        with self.errors() as gfile:
            # A store ends the names of folders with a slash, or lists one twice.
            names = {name.rstrip("/") for name in gfile.listdir(self._text)}
        return (self / name for name in sorted(names) if name)

    def glob(self, pattern: str) -> Iterator["RemotePath"]:
        """Of names in this directory alone."""
        if not self.is_dir():
            return iter(())
        return (path for path in self.iterdir() if fnmatch.fnmatchcase(path.name, pattern))

    # Files.

    def open(self, mode: str = "r", **text_options):
        """A file for reading or writing as a whole; text is UTF-8, and nothing is appended."""
        del text_options
        if mode not in ("r", "rb", "w", "wb", "xb"):
            raise ValueError(
                f"A file of a store can be read, or written as a whole. Received: mode={mode!r}."
            )
        if mode == "xb" and self.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), self._text)
        with self.errors() as gfile:
            return _RemoteFile(self, gfile.GFile(self._text, mode.replace("x", "w")))

    def read_bytes(self) -> bytes:
        with self.errors() as gfile, gfile.GFile(self._text, "rb") as file:
            return file.read()

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def write_bytes(self, data: bytes) -> None:
        """Writes a file that is there as a whole or not at all, in place of an earlier one."""
        # An object store would do without the other name; others show a file while it is written, and HDFS is one.
        temporary = self.with_name(f".{self.name}.{uuid.uuid4().hex[:12]}.tmp")
        with self.errors() as gfile:
            with gfile.GFile(str(temporary), "wb") as file:
                file.write(data)
            gfile.rename(str(temporary), self._text, overwrite=True)

    def write_text(self, text: str, encoding: str = "utf-8") -> None:
        self.write_bytes(text.encode(encoding))

    def unlink(self, missing_ok: bool = False) -> None:
        try:
            with self.errors() as gfile:
                gfile.remove(self._text)
        except FileNotFoundError:
            if not missing_ok:
                raise

    # Directories.

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        del parents  # A store has no directories that could lack one above.
        if not exist_ok and self.is_dir():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), self._text)
        with self.errors() as gfile:
            gfile.makedirs(self._text)

    def remove_tree(self) -> None:
        """Removes the directory with all that is in it."""
        with self.errors() as gfile:
            gfile.rmtree(self._text)

    @contextlib.contextmanager
    def errors(self):
        """A context, of `tf.io.gfile`, in which an error of TensorFlow becomes an OSError with this path's name."""
        import tensorflow as tf

        try:
            yield tf.io.gfile
        except tf.errors.NotFoundError as error:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self._text) from error
        except tf.errors.OpError as error:
            raise OSError(errno.EIO, error.message or type(error).__name__, self._text) from error


class _RemoteFile:
    """An open file of a store."""

    def __init__(self, path: RemotePath, file):
        self._path = path
        self._file = file

    def read(self, size: int = -1):
        with self._path.errors():
            return self._file.read(size)

    def write(self, data) -> None:
        with self._path.errors():
            self._file.write(data)

    def flush(self) -> None:
        with self._path.errors():
            self._file.flush()

    def close(self) -> None:
        with self._path.errors():
            self._file.close()

    def __enter__(self) -> "_RemoteFile":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


class Ownership:
    """In place of a lock, where there are none: a document that says who writes in a directory, renewed by a thread.

    A second process is refused as soon as it sees a renewal. It takes over when there has been none for `STALE_SECS`,
    as of a process that was killed. What can go wrong: clocks that differ by more than that; a process that cannot
    reach the store for so long, and goes on when another has taken over. It finds out at `check`, which stops it; what
    both have written until then is mixed. Two that start at the same moment both write, wait, and look who was last.
    """

    def __init__(
        self,
        path,
        *,
        used: str,
        by: str,
        otherwise: str,
        clock: Callable[[], float] = time.time,
    ):
        """Takes the directory.

        Args:
          path: `RemotePath` of the document.
          used, by, otherwise: as of `workdir.locked`.
          clock: seconds since 1970.

        Raises:
          ValueError: if another process has it.
        """
        self._path = path
        self._used = used
        self._clock = clock
        self.mark = uuid.uuid4().hex
        self._owner = {
            "mark": self.mark,
            "owner": f"pid {os.getpid()} on {socket.gethostname()}",
            "since": clock(),
        }
        self._wait_until_free(by=by, otherwise=otherwise)
        self._write()
        time.sleep(SETTLE_SECS)
        self.check()
        self._is_over = threading.Event()
        self._thread = threading.Thread(
            target=self._renew, args=(STALE_SECS / 6,), name="ownership", daemon=True
        )
        self._thread.start()

    def _wait_until_free(self, *, by, otherwise):
        found = self._read()
        if found is not None and self._clock() - found["renewed"] < STALE_SECS:
            _logger.warning(
                "%s was in use by %s a moment ago: waiting up to %.0f s for a sign of life",
                self._used,
                found["owner"],
                STALE_SECS,
            )
        while found is not None and self._clock() - found["renewed"] < STALE_SECS:
            time.sleep(STALE_SECS / 120)
            now = self._read()
            if now is not None and now["renewed"] != found["renewed"]:
                raise ValueError(
                    f"{self._used} is in use by {by}: {now['owner']}. Wait for it to end, or {otherwise}."
                )
            found = now

    def check(self) -> None:
        """Raises ValueError if another process has taken over."""
        document = self._read()
        if document is None or document["mark"] != self.mark:
            now = document["owner"] if document else "nobody"
            raise ValueError(
                f"{self._used} must have one process that writes there. Received: it was taken over by {now}. This "
                "one stops: leave the other to it."
            )

    def close(self) -> None:
        """Gives the directory back."""
        self._is_over.set()
        self._thread.join()
        with contextlib.suppress(OSError):  # It goes stale, then.
            document = self._read()
            if document is not None and document["mark"] == self.mark:
                self._path.unlink(missing_ok=True)

    def _renew(self, every_secs):
        while not self._is_over.wait(every_secs):
            # A store that cannot be reached for a moment: the next time.
            with contextlib.suppress(OSError):
                document = self._read()
                if document is None or document["mark"] != self.mark:
                    return
                self._write()

    def _write(self):
        self._path.write_text(json.dumps({**self._owner, "renewed": self._clock()}))

    def _read(self):
        """The document; None without one, or if it is damaged."""
        try:
            document = json.loads(self._path.read_text())
            return document if {"mark", "owner", "renewed"} <= document.keys() else None
        except (FileNotFoundError, ValueError, AttributeError):
            return None
