"""What the machine is, and how fast it can multiply and move."""

import datetime
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
import threading
import time

import numpy as np


def describe():
    """Processor, memory, versions, date and command, for the head of a report."""
    return {
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", "-m", "lmscale.bench", *sys.argv[1:]]),
        "processor": _processor(),
        "instructions": _instructions(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(total_bytes() / 2**30, 1),
        "gpus": _gpus(),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("tensorflow", "keras", "torch")},
    }


def total_bytes():
    """Memory of the machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def available_bytes():
    """Memory that a new process could have, as Linux tells it; all of it elsewhere."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":") for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return total_bytes()


def resident_mib():
    """(now, at most so far) MiB of memory of this process."""
    with open("/proc/self/status", encoding="ascii") as file:
        lines = dict(line.split(":", 1) for line in file)
    return tuple(int(lines[name].split()[0]) / 1024 for name in ("VmRSS", "VmHWM"))


def reset_peak():
    """Makes the largest memory so far count from now on."""
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")


def copy_bandwidth(*, mib=256, repeats=5):
    """Bytes a second that all cores together read and write when they copy float32 arrays out of cache."""
    threads = len(os.sched_getaffinity(0))
    sources = [np.ones(mib * 2**18 // threads, np.float32) for _ in range(threads)]
    targets = [np.zeros_like(source) for source in sources]

    def copy_all():
        workers = [
            threading.Thread(target=np.copyto, args=pair) for pair in zip(targets, sources, strict=True)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

    return 2 * sum(source.nbytes for source in sources) / fastest(copy_all, repeats=repeats)


def fastest(function, *, repeats):
    """Least seconds of `repeats` calls, after one that does not count."""
    function()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _processor():
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"


def _gpus():
    """["name, driver version", ...], as NVIDIA's tool lists them."""
    try:
        listed = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return []
    return listed.stdout.splitlines()


def _instructions():
    """Those of the processor's instruction sets that matrix products profit from."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            flags = next(line for line in file if line.startswith("flags")).split()
    except (OSError, StopIteration):
        return []
    return [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
