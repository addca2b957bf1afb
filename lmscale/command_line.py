"""How every entry point starts and fails: flags, help, a user's mistake in one line and exit code 2."""

import csv
import errno
import io
import os
import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging

from lmscale import keras_settings, paths, quiet_start, stop_signals
from lmscale.doing import doing
from lmscale.user_errors import user_message

# The flags that are defined by way of this module belong to the module that asks for them.
flags.disclaim_key_flags()

EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
_HELP_ARGUMENTS = ("--help", "-help", "--helpshort", "-helpshort", "-?", "--?", "-h", "--h")
_SEE_HELP = "Pass --help to see the flags."


def run_main(main: Callable[[list[str]], int | None], *, takes_arguments: bool = False) -> None:
    """Parses the flags, calls `main(argv)` and exits with its result. Never returns.

    A `ValueError` or `OSError` from `main`, an unknown or malformed flag, or a left-over argument is a
    mistake of the user: it is printed to stderr as `error: <message>`, without a traceback, and the
    process exits with code 2, as it does when memory is exhausted. With `--verbosity=1` the traceback is
    printed too. Ctrl-C gives 130, SIGTERM 143, the other signals of `lmscale.stop_signals` 128 + their number.
    Any other exception is a bug of ours and keeps its traceback.

    What is printed does not end a command: see `_open_standard_streams`. TensorFlow's notices are not printed: see
    `lmscale.quiet_start`.

    Args:
      main: the entry point; `--help` prints the docstring and the flags of the module that defines it.
        Returns an exit code or None.
      takes_arguments: whether what is left over beside the flags is for `main`, rather than a mistake.
    """

    def guarded(argv: list[str]) -> int | None:
        if len(argv) > 1 and not takes_arguments:
            return _fail(f"this command takes flags only. Received also: {' '.join(argv[1:])}. {_SEE_HELP}")
        try:
            with doing(f"running {os.path.basename(argv[0])}"):  # What nothing inside tells more exactly.
                keras_settings.check_surroundings()
                code = main(argv)
                sys.stdout.flush()  # While an error still gets a message.
                return code
        except BrokenPipeError:
            return _end_quietly()
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr, flush=True)
            return EXIT_INTERRUPTED
        except Exception as error:
            message = user_message(error)
            if message is None:
                raise
            logging.debug("The error was raised here:", exc_info=True)
            return _fail(message, code=getattr(error, "exit_code", EXIT_USAGE))

    def parse(argv: list[str]) -> list[str]:
        end_of_flags = argv.index("--") if "--" in argv else len(argv)
        if any(argument in _HELP_ARGUMENTS for argument in argv[1:end_of_flags]):
            sys.exit(_print_help(main))
        try:
            return flags.FLAGS(argv)
        except flags.Error as error:
            sys.exit(_fail(f"{str(error).rstrip('.')}. {_SEE_HELP}"))

    _open_standard_streams()
    # Read when matplotlib is imported, as Keras does where it can. A notebook's own may be unknown here: an error.
    os.environ["MPLBACKEND"] = "Agg"
    quiet_start.hide_notices()
    # The training loop has handlers of its own.
    stop_signals.exit_on_stop_signals()
    app.run(guarded, flags_parser=parse)


def DEFINE_path(name: str, default: str | None, help: str, *, remote: bool = False) -> flags.FlagHolder:
    """As `flags.DEFINE_string`, for a path: `~` is expanded, it must not be empty, and there cannot be two.

    With `remote`, it may be in a store, such as gs://bucket/run.
    """
    return flags.DEFINE_flag(
        _PathFlag(_PathParser(remote=remote), flags.ArgumentSerializer(), name, default, help)
    )


def DEFINE_multi_path(name: str, default: Sequence[str] | None, help: str) -> flags.FlagHolder:
    """As `flags.DEFINE_multi_string`, for paths."""
    return flags.DEFINE_multi(_PathParser(), flags.ArgumentSerializer(), name, default, help)


def DEFINE_paths(name: str, default: list[str] | None, help: str) -> flags.FlagHolder[list[str]]:
    """As `flags.DEFINE_list`, for paths or globs, separated by commas.

    A path with a comma needs nothing if it is given alone, and double quotes around it in a list, as in CSV. There
    cannot be two lists.
    """
    return flags.DEFINE_flag(_PathFlag(_PathsParser(), flags.CsvListSerializer(","), name, default, help))


class _PathFlag(flags.Flag):
    """Takes one value: of two, one would be ignored."""

    def parse(self, argument):
        first = self.value if self.present else None
        super().parse(argument)
        if first is not None and self.value != first:
            is_list = isinstance(first, list)
            received = " and ".join(",".join(value) if is_list else value for value in (first, self.value))
            way_out = "Separate them by commas" if is_list else "Remove one of them"
            raise flags.IllegalFlagValueError(
                f"--{self.name} must be given once. Received: {received}. {way_out}."
            )


class _PathParser(flags.ArgumentParser):
    syntactic_help = "a path"

    def __init__(self, *, remote=False):
        super().__init__()
        self._remote = remote

    def parse(self, argument):
        if not argument:
            raise ValueError("a path must not be empty. Received: ''. `.` is the current directory")
        return paths.expand(argument, remote=self._remote)


class _PathsParser(flags.ListParser):
    """Reads paths separated by commas; what is the path of something as it stands is one path."""

    def parse(self, argument):
        if isinstance(argument, str) and os.path.exists(paths.expand(argument)):
            return [paths.expand(argument)]
        if not isinstance(argument, str) or not argument:
            return [paths.expand(path) for path in super().parse(argument)]
        try:
            (names,) = csv.reader([argument], strict=True, skipinitialspace=True)
        except (csv.Error, ValueError) as error:
            raise ValueError(
                f"names must be separated by commas, and a name with a comma be in double quotes: {error}"
            ) from error
        return [paths.expand(name.strip()) for name in names]


def _open_standard_streams() -> None:
    """Has descriptors 0, 1 and 2 and their streams be there, and take any character.

    One that was closed (`2>&-`) becomes /dev/null. Else the next file that is opened would get its number, and
    TensorFlow, which logs to descriptor 2, would write into it. What a terminal's encoding lacks is printed as
    `\\xfc`. A terminal that has gone loses what is printed, and so does stderr that cannot be written for another
    reason: a run that is not watched any more goes on.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            os.set_inheritable(number, True)
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 (for as long as the process)
    old_stderr = sys.stderr
    sys.stdout = _lenient_stream(sys.stdout, 1, ignored=[errno.EIO])
    sys.stderr = _lenient_stream(sys.stderr, 2, ignored=None)
    handler = logging.get_absl_handler().python_handler
    if handler.stream is old_stderr:
        handler.stream = sys.stderr


def _lenient_stream(stream, number: int, *, ignored: Sequence[int] | None):
    """A text stream on a descriptor, in place of Python's own, or of none; any other is left alone."""
    if stream is not None and not (type(stream) is io.TextIOWrapper and stream.fileno() == number):
        return stream
    if stream is not None:
        stream.flush()
    file = _LenientFile(number, ignored=ignored)
    is_unbuffered = stream is not None and isinstance(stream.buffer, io.RawIOBase)
    return io.TextIOWrapper(
        file if is_unbuffered else io.BufferedWriter(file),  # type: ignore[arg-type]
        encoding="utf-8" if stream is None else stream.encoding,
        errors="backslashreplace",
        line_buffering=stream is None or stream.line_buffering,
        write_through=stream is not None and stream.write_through,
    )


class _LenientFile(io.FileIO):
    """A descriptor for which some errors, or all (None), count as written."""

    def __init__(self, number: int, *, ignored: Sequence[int] | None):
        super().__init__(number, "w", closefd=False)
        self._ignored = ignored

    def write(self, data):
        try:
            return super().write(data)
        except OSError as error:
            if self._ignored is None or error.errno in self._ignored:
                return len(data)
            self._ignored = None  # Python flushes once more when it ends, and would change the exit code.
            error.filename = {1: "stdout", 2: "stderr"}[self.fileno()]
            raise


def _fail(message: str, *, code: int = EXIT_USAGE) -> int:
    print(f"error: {message}", file=sys.stderr, flush=True)
    return code


def _end_quietly() -> int:
    """Who read our output has seen enough: what is left of it goes nowhere, also what Python flushes at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _print_help(main: Callable) -> int:
    try:
        print(_help(main), flush=True)
    except BrokenPipeError:
        return _end_quietly()
    except OSError as error:
        return _fail(user_message(error) or str(error))
    return 0


def _help(main: Callable) -> str:
    """Docstring and flags of the module which defines `main`; absl's own help looks only at __main__."""
    documentation = sys.modules[main.__module__].__doc__ or ""
    flags_help = flags.FLAGS.module_help(main.__module__)
    listed = flags_help.partition(":\n")[2]  # Behind the module's name.
    return f"{documentation.strip()}\n\nFlags:\n{listed}\n\nThose of all libraries: --helpfull"
