"""Which exceptions are a user's mistake rather than a bug of ours, and what the user is told of them."""

import errno

from lmscale.doing import what_was_done


def user_message(error: BaseException) -> str | None:
    """What a user is told of a `ValueError`, an `OSError` or a lack of memory; None for any other exception: a bug."""
    if _is_lack_of_memory(error):
        return (
            f"there must be memory for what was asked for. Received: none left while {what_was_done(error)} "
            f"({_text(error)}). Ask for less; or, for tables that take more than half of a host's memory, set "
            "TF_ONEDNN_USE_SYSTEM_ALLOCATOR=1."
        )
    if isinstance(error, (ValueError, OSError)):
        return _text(error)
    return None


def _is_lack_of_memory(error: BaseException) -> bool:
    # The last is TensorFlow's, which may not be imported.
    return (
        isinstance(error, MemoryError)
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or type(error).__name__ == "ResourceExhaustedError"
    )


def _text(error: BaseException) -> str:
    """The text of an error; an OSError without its errno: `name: No such file or directory`."""
    if isinstance(error, OSError) and error.strerror:
        names = [str(name) for name in (error.filename, error.filename2) if name is not None]
        return ": ".join([*names, error.strerror])
    return str(error) or type(error).__name__
