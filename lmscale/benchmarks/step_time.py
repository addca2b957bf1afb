"""Training steps against the vocabulary: lmscale beside its peers, and beside itself on a small vocabulary."""

import dataclasses
import math

from lmscale.benchmarks.machine import available_bytes
from lmscale.benchmarks.sides import SIDES, SideFailedError, SideProcess, paired_ratio, summary, take_turns

OURS = ("lmscale", "lmscale_bfloat16")
_MEMORY_SHARE = 0.93  # of what is available, for the processes of a group


def measure(shape, *, vocab_sizes, sides, repeats, log_dir, say):
    """Times every side at every vocabulary size that its memory allows.

    Args:
      shape: `ModelShape`; its vocab_size is ignored.
      vocab_sizes: rising.
      sides: {side name: largest vocabulary size to run it at}.
      repeats: rounds.
      log_dir: folder for what the processes print.
      say: called with a line of text for each stage.

    Returns:
      {"shape", "sizes": [{"vocab_size", "sides": {name: {"median", ..., "ratio": {our side: times slower}}}}],
      "not_run": [{"side", "vocab_size", "reason"}]}. "over_smallest" is the ratio to the same side at the smallest
      size, whose process takes its turns beside it.
    """
    sizes, not_run = [], []
    smallest = dataclasses.replace(shape, vocab_size=min(vocab_sizes))
    for vocab_size in vocab_sizes:
        at_size = dataclasses.replace(shape, vocab_size=vocab_size)
        wanted = []
        for name, largest in sides.items():
            needed = SIDES[name].memory_bytes(at_size)
            if vocab_size > largest:
                continue
            if not SIDES[name].is_installed():
                reason = f"{SIDES[name].needs} is not installed"
            elif needed > _MEMORY_SHARE * available_bytes():
                reason = f"needs about {needed / 2**30:.0f} GiB of memory"
            else:
                wanted.append(name)
                continue
            not_run.append({"side": name, "vocab_size": vocab_size, "reason": reason})
        results = {}
        for group in _groups(wanted, at_size):
            say(f"vocabulary {vocab_size:,}: {', '.join(group)}")
            for name, failure in _run_group(group, at_size, smallest, repeats, log_dir, results):
                not_run.append({"side": name, "vocab_size": vocab_size, "reason": failure})
        sizes.append({"vocab_size": vocab_size, "sides": results})
    return {"shape": vars(shape), "sizes": sizes, "not_run": not_run}


def _groups(names, shape):
    """Cuts the sides into groups that fit into memory together; each has our sides, where they fit as well."""
    room = _MEMORY_SHARE * available_bytes()
    size = {name: SIDES[name].memory_bytes(shape) for name in names}
    ours = [name for name in names if name in OURS]
    others = [name for name in names if name not in OURS]
    if sum(size[name] for name in ours) > room / 2:
        return [[name] for name in names]
    groups, rest = [], room - sum(size[name] for name in ours)
    left = math.inf
    for name in others:
        if size[name] > left or not groups:
            groups.append([*ours])
            left = rest
        groups[-1].append(name)
        left -= size[name]
    return groups or [ours]


def _run_group(group, shape, smallest, repeats, log_dir, results):
    """Runs a group of sides, writes into `results`, returns [(side, why it failed)]."""
    processes, failures = {}, []
    try:
        for name in group:
            try:
                processes[name] = SideProcess(name, shape, log_dir=log_dir)
            except SideFailedError as error:
                failures.append((name, str(error)))
        references = {
            name: SideProcess(name, smallest, log_dir=log_dir)
            for name in group
            if name in OURS and name in processes and name not in results and shape != smallest
        }
        for name, process in references.items():
            process.name = f"{name} smallest"
        seconds = take_turns([*processes.values(), *references.values()], repeats=repeats)
    finally:
        for process in processes.values():
            process.close()
    for process in references.values():
        process.close()
    for name in processes:
        if name in results:
            continue
        results[name] = summary(seconds[name])
        results[name]["tokens_per_sec"] = shape.tokens / results[name]["median"]
        results[name]["times_ours"] = {
            ours: paired_ratio(seconds[name], seconds[ours]) for ours in OURS if ours in processes
        }
        if name in OURS:
            small = seconds.get(f"{name} smallest", seconds[name])
            results[name]["over_smallest"] = paired_ratio(seconds[name], small)
    return failures
