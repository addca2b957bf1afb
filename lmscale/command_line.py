"""How every entry point starts and fails: flags, help, a user's mistake in one line and exit code 2."""

import os
import signal
import sys
from collections.abc import Callable

from absl import app, flags, logging

EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143
_HELP_ARGUMENTS = ("--help", "-help", "--helpshort", "-helpshort", "-?", "--?", "-h", "--h")
_SEE_HELP = "Pass --help to see the flags."

flags.disclaim_key_flags()  # Those defined below belong to the modules that call.


class _PathsParser(flags.ListParser):
    """Reads paths separated by commas; what is the path of something as it stands is one path."""

    def parse(self, argument):
        if isinstance(argument, str) and os.path.exists(argument):
            return [argument]
        return super().parse(argument)


def DEFINE_paths(name: str, default: list[str] | None, help: str) -> flags.FlagHolder[list[str]]:
    """Defines a flag of paths or globs, separated by commas.

    A path with a comma needs nothing if it is given alone, and double quotes around it in a list, as in CSV.
    """
    return flags.DEFINE(_PathsParser(), name, default, help, serializer=flags.CsvListSerializer(","))


def run_main(main: Callable[[list[str]], int | None]) -> None:
    """Parses the flags, calls `main(argv)` and exits with its result. Never returns.

    A `ValueError` or `OSError` from `main`, an unknown or malformed flag, or a left-over argument is a
    mistake of the user: it is printed to stderr as `error: <message>`, without a traceback, and the
    process exits with code 2, as it does when memory is exhausted. With `--verbosity=1` the traceback is
    printed too. Ctrl-C gives 130, SIGTERM 143. Any other exception is a bug of ours and keeps its traceback.

    Args:
      main: the entry point; `--help` prints the docstring and the flags of the module that defines it.
        Returns an exit code or None.
    """

    def guarded(argv: list[str]) -> int | None:
        if len(argv) > 1:
            return _fail(f"this command takes flags only. Received also: {' '.join(argv[1:])}. {_SEE_HELP}")
        try:
            return main(argv)
        except BrokenPipeError:  # Who read our output has seen enough.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except (ValueError, OSError) as error:
            logging.debug("The error was raised here:", exc_info=True)
            return _fail(_message(error))
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr, flush=True)
            return EXIT_INTERRUPTED
        except Exception as error:
            if type(error).__name__ != "ResourceExhaustedError":  # Of TensorFlow, which may not be imported.
                raise
            logging.debug("The error was raised here:", exc_info=True)
            return _fail(
                f"there must be room for what was asked for. Received: {error}. Ask for less; or, for tables "
                "that take more than half of a host's memory, set TF_ONEDNN_USE_SYSTEM_ALLOCATOR=1."
            )

    def parse(argv: list[str]) -> list[str]:
        end_of_flags = argv.index("--") if "--" in argv else len(argv)
        if any(argument in _HELP_ARGUMENTS for argument in argv[1:end_of_flags]):
            print(_help(main))
            sys.exit(0)
        try:
            return flags.FLAGS(argv)
        except flags.Error as error:
            sys.exit(_fail(f"{str(error).rstrip('.')}. {_SEE_HELP}"))

    # As an exception, so that what is half written gets removed. The training loop has a handler of its own.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(EXIT_TERMINATED))
    app.run(guarded, flags_parser=parse)


def _message(error: Exception) -> str:
    """The text of an error; an OSError without its errno: `name: No such file or directory`."""
    if isinstance(error, OSError) and error.strerror:
        names = [str(name) for name in (error.filename, error.filename2) if name is not None]
        return ": ".join([*names, error.strerror])
    return str(error) or type(error).__name__


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr, flush=True)
    return EXIT_USAGE


def _help(main: Callable) -> str:
    """Docstring and flags of the module which defines `main`; absl's own help looks only at __main__."""
    documentation = sys.modules[main.__module__].__doc__ or ""
    flags_help = flags.FLAGS.module_help(main.__module__)
    listed = flags_help.partition(":\n")[2]  # Behind the module's name.
    return f"{documentation.strip()}\n\nFlags:\n{listed}\n\nThose of all libraries: --helpfull"
