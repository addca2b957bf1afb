"""Paths as users give them, and files that say their names when they cannot be written."""

import contextlib
import fnmatch
import glob
import os
import re
import sys

# What comes with lmscale, installed or in a checkout: configurations, and texts to try it on.
CONFIGS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "configs")
BOOKS = os.path.join(os.path.dirname(CONFIGS), "books")

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


def or_shipped(patterns: list[str]) -> list[str]:
    """The patterns, but for those of nothing that is there: of such, the files that come with lmscale."""
    found: list[str] = []
    for pattern in patterns:
        is_there = not pattern or os.path.lexists(pattern) or glob.glob(pattern, recursive=True)
        shipped = os.path.join(glob.escape(BOOKS), pattern)
        found += (not is_there and sorted(glob.glob(shipped, recursive=True))) or [pattern]
    return found


def scheme(path: str | os.PathLike) -> str | None:
    """`gs` of gs://bucket/run; None for a path without such a beginning."""
    match = _SCHEME.match(os.fspath(path))
    return match[1].lower() if match else None


def expand(path: str | os.PathLike, *, remote: bool = False) -> str:
    """The path, with `~` or `~name` at its start made the home directory, which a shell leaves as it is in `--flag=~`.

    As in a shell, a `~name` of no user stays what it is. Of file:///x, it is /x.

    Args:
      path: as the user gave it.
      remote: whether it may have another scheme, such as gs://bucket/run, which stays as it is.

    Raises:
      ValueError: if there is no home directory; if the path is of another machine, or has a scheme that it must not.
    """
    text = os.fspath(path)
    if scheme(text) == "file":
        host, slash, rest = text.partition("://")[2].partition("/")
        if host not in ("", "localhost") or not slash:
            raise ValueError(
                f"A path of file:// must be one of this machine, file:///x for /x. Received: {text}. Pass the path "
                "without file://, or with three slashes."
            )
        return f"/{rest}"
    if scheme(text):
        if not remote:
            raise ValueError(
                f"This must be a path of this machine. Received: {text}. Copy it here, or mount what it is on; work "
                "directories and prepared data may be in a store."
            )
        return text
    expanded = os.path.expanduser(text)
    if expanded.split("/")[0] == "~":
        raise ValueError(
            f"`~` must stand for a home directory. Received: {text!r}, and none is known. Set HOME, or write "
            "the path without `~`; `./~` is a directory of that name."
        )
    return expanded


def check_spelling(path: str | os.PathLike, *, what: str) -> None:
    """Checks that TensorFlow, which encodes every path as UTF-8, means the same file by a path as Python does.

    Args:
      path: what TensorFlow will be given, or the directory above it.
      what: what the user calls it, for the message.

    Raises:
      ValueError: if it does not: by the locale Python encodes paths otherwise, or a byte of the path is not UTF-8.
    """
    text = os.fspath(path)
    try:
        if os.fsencode(text) == text.encode("utf-8"):
            return
    except UnicodeEncodeError:
        pass
    encoding = sys.getfilesystemencoding()
    way_out = "Rename it in UTF-8"
    if encoding != "utf-8":
        way_out = "Set LC_ALL=C.UTF-8 in the environment, or choose a name in ASCII"
    raise ValueError(
        f"{what} must be a path that Python, which encodes it as {encoding} here, and TensorFlow, which encodes it as "
        f"UTF-8, spell alike. Received: {text!a}. {way_out}."
    )


def check_checkpoint_path(path: str | os.PathLike, *, what: str) -> None:
    """Checks that TensorFlow finds the checkpoints that it writes below a path.

    It writes them to the path as it stands, but looks for them as if it was a pattern (`[ab]` is one character, a
    backslash none); `tf.train.load_checkpoint` does, too. Only the path as it is given counts, not the current
    directory.

    Args:
      path, what: as of `check_spelling`.

    Raises:
      ValueError: if TensorFlow would take the path for another one.
    """
    check_spelling(path, what=what)
    text = os.fspath(path)
    # TensorFlow's matching differs in details (`[^a]`), but not in whether a path matches itself.
    if "\\" in text or not fnmatch.fnmatchcase(text, text):
        raise ValueError(
            f"{what} must not have square brackets around characters, nor a backslash, in its path: TensorFlow takes "
            f"them for a pattern, and does not find its checkpoints. Received: {text}. Choose another name, or start "
            "inside of it, or beside, and give a relative path without them."
        )


@contextlib.contextmanager
def naming(path: str | os.PathLike):
    """Gives the name of a file to an OSError that has none, as those of write, flush and fsync: a full disk's."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = os.fspath(path)
        raise
