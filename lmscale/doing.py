"""What was being done when an exception was raised, for messages such as: no memory left while ..."""

import contextlib


@contextlib.contextmanager
def doing(what: str):
    """Notes `what` on an exception that leaves the block; of nested blocks, the innermost is kept.

    Args:
      what: goes on after "while": "building the model".
    """
    try:
        yield
    except BaseException as error:
        if what_was_done(error) is None:
            with contextlib.suppress(AttributeError):  # Of an exception that takes no attributes.
                error._lmscale_doing = what  # type: ignore[attr-defined]
        raise


def what_was_done(error: BaseException) -> str | None:
    """What `doing` has noted on the exception, or None."""
    return getattr(error, "_lmscale_doing", None)
