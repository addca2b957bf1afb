"""Training steps against the vocabulary: lmscale beside its peers, and beside itself on a small vocabulary."""

import contextlib
import dataclasses

from lmscale.benchmarks.machine import available_bytes
from lmscale.benchmarks.sides import (
    SIDES,
    SideFailedError,
    SideProcess,
    environment_of,
    paired_ratio,
    summary,
    take_turns,
)

OURS = ("lmscale", "lmscale_bfloat16")
_SMALLEST = "at the smallest size"
_MEMORY_SHARE = 0.97  # of what is available, for the processes of a group


def measure(shape, *, vocab_sizes, sides, repeats, log_dir, say):
    """Times every side at every vocabulary size that its memory allows.

    Args:
      shape: `ModelShape`; its vocab_size is ignored.
      vocab_sizes: rising.
      sides: names in `SIDES`.
      repeats: rounds.
      log_dir: folder for what the processes print.
      say: called with a line of text for each stage.

    Returns:
      {"shape", "sizes": [{"vocab_size", "sides": {name: {"median", ..., "environment",
      "times_ours": {our side: how many times as long}}}}], "not_run": [{"side", "vocab_size", "reason"}]}. Our sides
      have "over_smallest" too, the ratio to the same side at the smallest size, whose process takes its turns beside
      it.
    """
    sizes, not_run = [], []
    smallest = dataclasses.replace(shape, vocab_size=min(vocab_sizes))
    for vocab_size in vocab_sizes:
        at_size = dataclasses.replace(shape, vocab_size=vocab_size)
        wanted = []
        for name in sides:
            needed, largest = SIDES[name].memory_bytes(at_size), SIDES[name].largest_vocab_size
            if not SIDES[name].is_installed():
                reason = f"{SIDES[name].needs} is not installed"
            elif largest is not None and vocab_size > largest:
                reason = f"is run up to {largest:,} rows"
            elif needed > _MEMORY_SHARE * available_bytes():
                reason = f"needs about {needed / 2**30:.0f} GiB of memory"
            else:
                wanted.append(name)
                continue
            not_run.append({"side": name, "vocab_size": vocab_size, "reason": reason})
        results = {}
        for group in _groups(wanted, at_size, smallest):
            say(f"vocabulary {vocab_size:,}: {', '.join(group)}")
            for name, failure in _run_group(group, at_size, smallest, repeats, log_dir, results):
                not_run.append({"side": name, "vocab_size": vocab_size, "reason": failure})
        sizes.append({"vocab_size": vocab_size, "sides": results})
    return {"shape": vars(shape), "sizes": sizes, "not_run": not_run}


def _groups(names, shape, smallest):
    """Cuts the sides into groups that fit into memory together; each has our sides, where they fit as well."""
    room = _MEMORY_SHARE * available_bytes()
    size = {name: SIDES[name].memory_bytes(shape) for name in names}
    ours = [name for name in names if name in OURS]
    others = [name for name in names if name not in OURS]
    # Beside each of our sides steps the same one at the smallest size.
    of_ours = sum(size[name] + SIDES[name].memory_bytes(smallest) for name in ours)
    if of_ours > room / 2:
        return [[name] for name in names]
    groups, left = [], 0.0
    for name in others:
        if size[name] > room - of_ours:
            groups.append([name])
            continue
        if size[name] > left or groups[-1][: len(ours)] != ours:
            groups.append([*ours])
            left = room - of_ours
        groups[-1].append(name)
        left -= size[name]
    return groups if any(group[: len(ours)] == ours for group in groups) or not ours else [ours, *groups]


def _run_group(group, shape, smallest, repeats, log_dir, results):
    """Runs a group of sides, writes into `results`, returns [(side, why it failed)]."""
    processes, failures = [], []
    with contextlib.ExitStack() as stack:

        def start(name, at_size, called):
            try:
                process = SideProcess(name, at_size, log_dir=log_dir)
            except SideFailedError as error:
                failures.append((called, str(error)))
                return
            stack.callback(process.close)
            process.name = called
            processes.append(process)

        for name in group:
            start(name, shape, name)
        for name in group:
            if name in OURS and name not in results and shape != smallest:
                start(name, smallest, f"{name} {_SMALLEST}")
        seconds, died = take_turns(processes, repeats=repeats)
    failures += died.items()
    for name in group:
        if name in results or name not in seconds:
            continue
        results[name] = summary(seconds[name])
        results[name]["environment"] = environment_of(name, shape)
        results[name]["tokens_per_sec"] = shape.tokens / results[name]["median"]
        results[name]["times_ours"] = {
            ours: paired_ratio(seconds[name], seconds[ours]) for ours in OURS if ours in seconds
        }
        if name in OURS:
            small = seconds.get(f"{name} {_SMALLEST}", seconds[name])
            results[name]["over_smallest"] = paired_ratio(seconds[name], small)
    return failures
