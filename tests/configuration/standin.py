"""A small thing to configure, of all kinds, and gin files that do."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import keras

from lmscale import configuration
from lmscale.factories import MayChange


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rate:
    value: float
    decay: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slow(Rate):
    pass


def network(*, width, depth: int = 1, rate: Rate | None = None, tasks: Sequence[str] = ()):
    return "network", width, depth, rate, tuple(tasks)


def other_network(*, width):
    return "other", width


def text_length(text: str) -> int:
    return len(text)


def measured_network(*, width, measure=text_length):
    return "measured", width, measure


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    steps: int
    network: Callable[..., tuple]
    rate: Rate | None = None
    schedule: float | keras.optimizers.schedules.LearningRateSchedule = 0.1
    mode: Literal["stop", "skip"] = "stop"
    ratio: float = 1.0
    name: str = ""
    flag: bool = False
    sizes: tuple[int, ...] = ()
    pair: tuple[int, str] = (0, "")
    names: Sequence[str] = ()
    table: Mapping[str, float] = dataclasses.field(default_factory=dict)
    apply: Callable[[str], int] | None = None
    rates: Sequence[Rate] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    initializer: Callable
    other_initializer: Callable
    seed: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clock:
    every: MayChange[int]
    hours: int
    hand: Callable[[], tuple]
    rate: MayChange[float | None] = None


class Hand:
    def __init__(self, length: int, colour: MayChange[str] = "black"):
        self.length, self.colour = length, colour


def ticking(*, volume: MayChange[float] = 1.0, pitch: float = 440.0):
    return volume, pitch


def divide(*, by: int):
    return 1 / by


IMPORTS = "from __gin__ import dynamic_registration\nimport standin\n"
BASE = """
standin.Machine.steps = %STEPS
standin.Machine.network = @standin.network
standin.network.width = %WIDTH
STEPS = 10
WIDTH = 3
"""


def again(config, tmp_path):
    """Loads a configuration's own text, and nothing else."""
    path = tmp_path / "again" / "config.gin"
    path.parent.mkdir(exist_ok=True)
    path.write_text(config.text, encoding="utf-8")
    return configuration.load([str(path)], root=Machine)
