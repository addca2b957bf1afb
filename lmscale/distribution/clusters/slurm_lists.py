"""Slurm's compressed lists: hosts as `node[001-003,7],gpu-a[1,3-5]`, tasks of each node as `2(x3),1`."""

import itertools
import math
import re

from lmscale.distribution.clusters.surroundings import PASS_FLAGS

# More than any machine has: a list that is longer is a mistake, and would fill the memory.
MOST_ENTRIES = 1_000_000


def expand_hosts(text, *, name):
    """The hosts of a list, in its order, which is that of ranks. Nothing is sorted, and none is dropped.

    Several brackets in a name make all combinations, and the last one runs fastest. Blanks separate as commas do.

    Args:
      text: str.
      name: of the variable, for the message.

    Returns:
      A list of names, at least one.

    Raises:
      ValueError: if it is no such list.
    """
    parts = re.findall(r"(?:\[[^\[\]]*\]|[^\[\],\s])+", text)
    if not parts or re.sub(r"\s+|,", "", "".join(parts)) != re.sub(r"\s+|,", "", text):
        raise _bad_list(text, name)
    hosts: list[str] = []
    for part in parts:
        pieces = re.split(r"(\[[^\]]*\])", part)
        choices = [_expand_bracket(piece, text, name) if piece[:1] == "[" else [piece] for piece in pieces]
        literals = "".join(piece for piece in pieces if piece[:1] != "[")
        count = math.prod(map(len, choices))
        if len(hosts) + count > MOST_ENTRIES or not re.fullmatch(r"[\w.:-]*", literals):
            raise _bad_list(text, name)
        hosts += ["".join(names) for names in itertools.product(*choices)]
    return hosts


def _expand_bracket(bracket, text, name):
    """Numbers of `[001-003,7]` as they are written: a range's have at least as many digits as its first one."""
    numbers: list[str] = []
    for item in bracket[1:-1].split(","):
        match = re.fullmatch(r"([0-9]{1,18})(?:-([0-9]{1,18}))?", item)
        if match is None:
            raise _bad_list(text, name)
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first or last - first >= MOST_ENTRIES:
            raise _bad_list(text, name)
        numbers += [str(number).zfill(len(match[1])) for number in range(first, last + 1)]
    return numbers


def _bad_list(text, name):
    return ValueError(
        f"{name} must be a list of hosts as Slurm writes it, such as node[001-003,7],gpu-a1. Received: "
        f"{name}={text!r}. See to the launcher; or {PASS_FLAGS}."
    )


def expand_tasks(text, *, name):
    """The numbers of tasks of each node: `2(x3),1` is 2, 2, 2, 1.

    Args:
      text: str.
      name: of the variable, for the message.

    Returns:
      A list of numbers, each at least 1.

    Raises:
      ValueError: if it is no such list.
    """
    tasks: list[int] = []
    for item in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,9})(?:\(x([0-9]{1,7})\))?\s*", item)
        number, times = (int(match[1]), int(match[2] or 1)) if match else (0, 0)
        if number < 1 or times < 1 or sum(tasks) + number * times > MOST_ENTRIES:
            raise ValueError(
                f"{name} must be numbers of tasks as Slurm writes them, such as 2(x3),1. Received: {name}={text!r}. "
                "See to the launcher."
            )
        tasks += [number] * times
    return tasks
