"""The signals by which a command is asked to stop: Ctrl-C, a cluster's warning before the end, a closed terminal."""

import contextlib
import signal
import sys
from collections.abc import Iterator

# Slurm sends whichever is asked for (--signal), Grid Engine USR1 or USR2 (-notify), a terminal HUP when it is closed.
_REQUESTS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


def exit_on_stop_signals() -> None:
    """Makes each of them end the process with 128 + its number, as an exception: what is half written gets removed.

    A signal that is ignored, as nohup ignores SIGHUP, stays ignored. Ctrl-C is left to Python.
    """
    for number in _heard():
        signal.signal(number, lambda number, frame: sys.exit(128 + number))


def ignore_stop_signals() -> None:
    """Has a process that is ending as it was asked to end with its own exit code, however often it is asked again.

    But for Ctrl-C, which still interrupts what may hang.
    """
    for number in _heard():
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def collect_stop_signals() -> Iterator[list[str]]:
    """Collects the names of the signals, Ctrl-C too, instead of ending; a second Ctrl-C interrupts at once.

    Yields:
      The list of the names received so far.
    """
    received: list[str] = []

    def handle(number, frame):
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(signal.Signals(number).name)

    previous = {number: signal.signal(number, handle) for number in (*_heard(), signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _heard() -> list[signal.Signals]:
    """Those which were not ignored when the process started."""
    return [
        number
        for number in _REQUESTS
        if number == signal.SIGTERM or signal.getsignal(number) != signal.SIG_IGN
    ]
