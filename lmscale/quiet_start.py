"""TensorFlow says at its start what it is built with and that it finds no GPU; lmscale's commands do not pass it on.

Its C++ writes to descriptor 2, some of it before TF_CPP_MIN_LOG_LEVEL counts, and calls it an error that there is no
GPU. So while it is imported, a process of its own reads what goes there and lets through all but that. It outlives
this one, should it crash: nothing else is lost.
"""

import contextlib
import glob
import importlib.abc
import importlib.util
import os
import subprocess
import sys

_NOTICES = (
    # With TF_CPP_MIN_LOG_LEVEL=2, from its first line on.
    r"WARNING: All log messages before absl::InitializeLog\(\) is called are written to STDERR$"
    r"|[IW]\d{4} [\d:.]+ +\d+ \w+\.cc:\d+\] "
)
_NO_GPU = r"|E\d{4} [\d:.]+ +\d+ cuda_platform\.cc:\d+\] failed call to cuInit: "
_FILTER = """
import os, re, sys
hidden = re.compile(sys.argv[1].encode())
for line in sys.stdin.buffer:
    if not hidden.match(line):
        try:
            os.write(1, line)
        except OSError:  # The terminal has gone. Who writes to us must not be stopped by that.
            pass
"""
# Of the driver on a host, in a container, on Jetson and under WSL.
_GPU_FILES = ("/dev/nvidia*", "/proc/driver/nvidia", "/dev/nvhost-*", "/dev/nvgpu", "/dev/dxg")


def hide_notices() -> None:
    """Hides TensorFlow's notices, once it is imported, unless TF_CPP_MIN_LOG_LEVEL in the environment asks for them.

    On a machine without a GPU, TensorFlow looks for one right away: what it says of that is one of the notices.
    """
    if os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2") in ("0", "1") or "tensorflow" in sys.modules:
        return
    sys.meta_path.insert(0, _TensorFlowFinder())


class _TensorFlowFinder(importlib.abc.MetaPathFinder):
    """Finds TensorFlow where the others do, to be executed without its notices."""

    def find_spec(self, name, path=None, target=None):
        if name != "tensorflow":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module
        expects_gpu = _expects_gpu()

        def execute_quietly(module):
            with _stderr_without(_NOTICES + ("" if expects_gpu else _NO_GPU)):
                execute(module)
                if not expects_gpu:
                    module.config.list_physical_devices()

        spec.loader.exec_module = execute_quietly
        return spec


def _expects_gpu():
    is_there = any(glob.glob(pattern) for pattern in _GPU_FILES)
    return is_there and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1")


@contextlib.contextmanager
def _stderr_without(pattern):
    """Descriptor 2 without the lines that begin with a match of `pattern`."""
    stderr, (reader, writer) = os.dup(2), os.pipe()
    try:
        # In a session of its own: Ctrl-C is not for it.
        arguments = [sys.executable, "-I", "-S", "-c", _FILTER, pattern]
        process = subprocess.Popen(arguments, stdin=reader, stdout=stderr, start_new_session=True)
    except OSError:  # No memory for a process: then with them.
        for descriptor in (stderr, reader, writer):
            os.close(descriptor)
        yield
        return
    os.close(reader)
    sys.stderr.flush()
    os.dup2(writer, 2)
    os.close(writer)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(stderr, 2)
        os.close(stderr)
        process.wait()
