"""Configurations: what is built, what is refused, and that the resolved text says all."""

import dataclasses
import random
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import keras
import numpy as np
import pytest

from lmscale import configuration, factories
from lmscale.bodies.body import Body
from lmscale.bodies.lstm import lstm_body
from lmscale.experiment import Experiment
from lmscale.factories import MayChange

# ------------------------------------------------------------------- A small thing to configure, of all kinds


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


IMPORTS = f"from __gin__ import dynamic_registration\nimport {__name__} as standin\n"
BASE = """
standin.Machine.steps = %STEPS
standin.Machine.network = @standin.network
standin.network.width = %WIDTH
STEPS = 10
WIDTH = 3
"""


@pytest.fixture
def load(tmp_path):
    """Loads the text of a gin file (the imports are put before it) with bindings."""

    def load(text=BASE, *bindings, imports="", **options):
        path = tmp_path / "run.gin"
        path.write_text(IMPORTS + imports + text, encoding="utf-8")
        return configuration.load([str(path)], bindings, root=Machine, **options)

    return load


def again(config, tmp_path):
    """Loads a configuration's own text, and nothing else."""
    path = tmp_path / "again" / "config.gin"
    path.parent.mkdir(exist_ok=True)
    path.write_text(config.text, encoding="utf-8")
    return configuration.load([str(path)], root=Machine)


# ---------------------------------------------------------------------------------------------- What is built


def test_builds_the_object(load):
    config = load()
    assert config.experiment.steps == 10
    assert config.experiment.network() == ("network", 3, 1, None, ())
    assert config.experiment.network(depth=2) == ("network", 3, 2, None, ())
    assert config.macros == {"STEPS": 10, "WIDTH": 3}


def test_bindings_win_over_files_and_later_ones_over_earlier(load):
    config = load(BASE, "STEPS = 11", "standin.network.depth = 4", "STEPS = 12")
    assert config.experiment.steps == 12
    assert config.experiment.network() == ("network", 3, 4, None, ())


def test_settings_are_all_that_a_run_may_differ_in(load):
    """Macros, what is set without one, and defaults: by the names that bindings have, each value told once."""
    text = """
MODE = 'skip'
OTHER_STEPS = %STEPS
RATE = @fast/standin.Rate()
standin.Machine.mode = %MODE
standin.Machine.ratio = %OTHER_STEPS
standin.Machine.rate = %RATE
standin.Machine.sizes = (1, %WIDTH)
standin.Machine.apply = @standin.text_length
standin.network.rate = @slow/standin.Slow()
fast/standin.Rate.value = 2.5
slow/standin.Slow.value = 1
"""
    settings = load(BASE + text, "standin.Machine.flag = True").settings
    assert settings == {
        "MODE": "skip",
        "OTHER_STEPS": 10,
        "RATE": "@fast/standin.Rate()",
        "STEPS": 10,
        "WIDTH": 3,
        "fast/standin.Rate.decay": 0.0,
        "fast/standin.Rate.value": 2.5,
        "slow/standin.Slow.decay": 0.0,
        "slow/standin.Slow.value": 1,
        "standin.Machine.apply": "@standin.text_length",
        "standin.Machine.flag": True,
        "standin.Machine.name": "",
        "standin.Machine.names": "()",
        "standin.Machine.network": "@standin.network",
        "standin.Machine.pair": "(0, '')",
        "standin.Machine.rates": "()",
        "standin.Machine.schedule": 0.1,
        "standin.Machine.sizes": "(1, 3)",
        "standin.network.depth": 1,
        "standin.network.rate": "@slow/standin.Slow()",
        "standin.network.tasks": "()",
    }
    assert {name: type(value) for name, value in settings.items() if value == 1 or value == 0} == {
        "fast/standin.Rate.decay": float,
        "slow/standin.Slow.decay": float,
        "slow/standin.Slow.value": int,
        "standin.Machine.flag": bool,
        "standin.network.depth": int,
    }


def test_settings_of_two_runs_have_the_same_names(load):
    """What one binds for all scopes, and the other leaves to its default, is compared under one name."""
    text = """
standin.Machine.rate = @fast/standin.Rate()
fast/standin.Rate.value = 2.5
"""
    settings = [load(BASE + text, *bindings).settings for bindings in ((), ("standin.Rate.decay = 0.5",))]
    assert settings[0].keys() == settings[1].keys()
    assert [s["fast/standin.Rate.decay"] for s in settings] == [0.0, 0.5]


def test_settings_hold_no_address(load):
    """Functions among the defaults have no text that would be the same in the next process."""
    settings = load(BASE.replace("standin.network", "standin.measured_network")).settings
    assert settings["WIDTH"] == 3
    assert not any(" at 0x" in str(value) for value in settings.values())


def test_seed_sets_the_macro(load):
    text = BASE.replace("STEPS = 10", "SEED = 10").replace("%STEPS", "%SEED")
    assert load(text, seed=7).experiment.steps == 7
    with pytest.raises(ValueError, match=r"seed must be given once. Received: seed=7 and \['SEED=1'\]"):
        load(text, "SEED=1", seed=7)
    with pytest.raises(ValueError, match=r"macro SEED \(nothing uses %SEED\)"):
        load(BASE, seed=7)


def test_includes_are_found_beside_the_file_that_includes_them(tmp_path, monkeypatch):
    (tmp_path / "shared" / "deep").mkdir(parents=True)
    (tmp_path / "run.gin").write_text("include 'shared/a.gin'\nSTEPS = 5\n")
    (tmp_path / "shared" / "a.gin").write_text(IMPORTS + "include 'deep/b.gin'\n" + BASE)
    (tmp_path / "shared" / "deep" / "b.gin").write_text(IMPORTS + "standin.network.depth = 9\n")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = configuration.load([str(tmp_path / "run.gin")], root=Machine)
    assert (config.experiment.steps, config.experiment.network()) == (5, ("network", 3, 9, None, ()))
    # From the working directory too.
    (tmp_path / "run.gin").write_text("include 'shared/deep/../a.gin'\n")
    (tmp_path / "elsewhere" / "run.gin").write_text("include 'shared/a.gin'\nSTEPS = 6\n")
    monkeypatch.chdir(tmp_path)
    assert configuration.load(["elsewhere/run.gin"], root=Machine).experiment.steps == 6


def test_keras_schedules_need_no_decorators(load, tmp_path):
    text = BASE + (
        "standin.Machine.schedule = @schedules.CosineDecay()\n"
        "schedules.CosineDecay.initial_learning_rate = 0.125\n"
        "schedules.CosineDecay.decay_steps = %STEPS\n"
    )
    config = load(text, imports="from keras.optimizers import schedules\n")
    expected = keras.optimizers.schedules.CosineDecay(0.125, 10).get_config()
    assert config.experiment.schedule.get_config() == expected
    assert again(config, tmp_path).experiment.schedule.get_config() == expected
    whole = load(text.replace("schedules.C", "keras.optimizers.schedules.C"), imports="import keras\n")
    assert whole.experiment.schedule.get_config() == expected


def test_results_are_built_anew_at_each_call_of_a_factory(load):
    config = load(BASE + "standin.network.rate = @standin.Rate()\nstandin.Rate.value = 1\n")
    first, second = config.experiment.network()[3], config.experiment.network()[3]
    assert first == second == Rate(value=1)
    assert first is not second


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    initializer: Callable
    other_initializer: Callable
    seed: int


def test_initialisers_of_keras_draw_their_seeds_from_the_seed(tmp_path):
    """Whatever was drawn before, and from SEED alone."""
    text = (
        "from keras import initializers\nSEED = 3\nstandin.Layer.seed = %SEED\n"
        "standin.Layer.initializer = @initializers.Orthogonal()\n"
        "standin.Layer.other_initializer = @initializers.GlorotUniform()\n"
    )
    (tmp_path / "layer.gin").write_text(IMPORTS + text)

    def values(seed):
        layer = configuration.load([str(tmp_path / "layer.gin")], seed=seed, root=Layer).experiment
        random.random()
        return [np.asarray(i((5, 7))) for i in (layer.initializer, layer.other_initializer)]

    first, again, other = values(3), values(3), values(2**31 - 1)
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)
    assert configuration.load([str(tmp_path / "layer.gin")], seed=-1, root=Layer).experiment.seed == -1


def test_factories_take_positional_arguments(load):
    assert load(BASE + "standin.Machine.apply = @standin.text_length\n").experiment.apply("four") == 4


def test_a_factory_keeps_its_arguments_when_another_configuration_is_loaded(load):
    first = load(BASE, "WIDTH = 4", "standin.network.tasks = ['a']").experiment.network
    load(BASE, "WIDTH = 5")
    assert first() == ("network", 4, 1, None, ("a",))


def test_scopes_give_one_class_several_sets_of_arguments(load, tmp_path):
    config = load(
        BASE
        + "standin.Machine.rate = @fast/standin.Rate()\nstandin.network.rate = @slow/standin.Rate()\n"
        + "standin.Rate.decay = 0.5\nfast/standin.Rate.value = 2\nslow/standin.Rate.value = 1\n"
        + "slow/standin.Rate.decay = 0.25\n"
    )
    for experiment in (config.experiment, again(config, tmp_path).experiment):
        assert experiment.rate == Rate(value=2, decay=0.5)
        assert experiment.network()[3] == Rate(value=1, decay=0.25)
    assert "slow/standin.Rate" in configuration.describe(config)


def test_gin_is_left_without_configuration(load):
    import gin

    load()
    assert gin.config_str().strip() == ""


# ------------------------------------------------------------------------------------------ The resolved text


def test_text_alone_gives_an_equal_object(load, tmp_path):
    config = load(
        BASE
        + "standin.Machine.ratio = 0.1\nstandin.Machine.sizes = (1, 22)\nstandin.Machine.pair = (1, 'x')\n"
        + "standin.Machine.names = ['some quite long text of words ' 'that goes on', \"quo'ted\", 'é\\n']\n"
        + "standin.Machine.table = {'a': %WIDTH, 'b': 1.0000000000000002}\nstandin.Machine.rate = %RATE\n"
        + "RATE = @standin.Rate()\nstandin.Rate.value = 3.3e-300\n"
        + "standin.Machine.rates = [@standin.Rate(), @a/standin.Slow()]\na/standin.Slow.value = 7\n",
        "STEPS = 12",
    )
    assert config.experiment.names[0] == "some quite long text of words that goes on"
    assert config.experiment.table == {"a": 3, "b": 1.0000000000000002}
    assert config.experiment.rates == [Rate(value=3.3e-300), Slow(value=7)]
    reloaded = again(config, tmp_path)
    assert reloaded.experiment == config.experiment
    assert reloaded.text == config.text
    assert reloaded.macros == config.macros


def test_a_setting_that_an_include_below_overwrites_is_warned_of(load, tmp_path, caplog):
    (tmp_path / "deep.gin").write_text(IMPORTS + "standin.network.depth = 5\nWIDTH = 4\n")
    (tmp_path / "part.gin").write_text(IMPORTS + "STEPS = 11\nWIDTH = 3\ninclude 'deep.gin'\nNAME = 'a'\n")
    (tmp_path / "last.gin").write_text("NAME = 'b'\n")
    above = "\nstandin.network:\n  depth = 2\nSTEPS = 10\nstandin.Machine.ratio = 0.5\n"
    below = "include 'last.gin'\nstandin.Machine.network = @standin.network\nstandin.Machine.name = %NAME\n"
    below += "standin.Machine.steps = %STEPS\nstandin.network.width = %WIDTH\n"
    config = load(above + "include 'part.gin'\n" + below)
    assert config.experiment.network() == ("network", 4, 5, None, ())
    run, part, deep = (tmp_path / f"{name}.gin" for name in ("run", "part", "deep"))
    # Not of the macro NAME: there, one included file comes after the other, as files of --gin_file do.
    assert [record.getMessage().partition(". Write")[0] for record in caplog.records] == [
        f"{part}, line 4: WIDTH = 3 is overwritten by the included {deep}, which sets 4",
        f"{run}, line 5: standin.network.depth = 2 is overwritten by the included {part}, which sets 5",
        f"{run}, line 6: STEPS = 10 is overwritten by the included {part}, which sets 11",
    ]
    caplog.clear()
    assert load("STEPS = 10\ninclude 'part.gin'\n" + below + "STEPS = 12\n").experiment.steps == 12
    (tmp_path / "part.gin").write_text("STEPS = 10\n")
    assert load(f"{BASE}include 'part.gin'\n").experiment.steps == 10
    assert [record.getMessage() for record in caplog.records if "STEPS" in record.getMessage()] == []


def test_text_holds_includes_and_bindings_but_no_paths(load, tmp_path):
    (tmp_path / "part.gin").write_text(IMPORTS + "standin.network.depth = 6\n")
    text = load("include 'part.gin'\n" + BASE, "STEPS = 8").text
    assert "standin.network.depth = 6" in text
    assert "STEPS = 8" in text
    assert "include" not in text
    assert str(tmp_path) not in text


def test_text_does_not_depend_on_what_was_loaded_before(load, tmp_path):
    before = load().text
    (tmp_path / "other.gin").write_text((IMPORTS + BASE).replace("standin", "other"))
    other = configuration.load([str(tmp_path / "other.gin")], root=Machine).text
    assert "standin.network.width" in before
    assert "other.network.width" in other
    assert "standin" not in other
    assert load().text == before


def test_differences_are_named(load):
    old, new = load(BASE, "STEPS = 9"), load(BASE, "standin.network.depth = 2")
    assert new.differences(old.text) == ["STEPS: 9 -> 10", "standin.network.depth: (not set) -> 2"]
    assert new.differences(new.text) == []


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


CLOCK = """
EVERY = %SECONDS
SECONDS = 60
HOURS = 12
standin.Clock.every = %EVERY
standin.Clock.hours = %HOURS
standin.Clock.hand = @long/standin.Hand
long/standin.Hand.length = 5
"""


@pytest.mark.parametrize(
    ("old", "new", "refused"),
    [
        ([], [], []),
        (["SECONDS = 30"], [], []),
        ([], ["standin.Clock.rate = 0.5"], []),
        (["long/standin.Hand.colour = 'red'"], [], []),
        ([], ["standin.Hand.colour = 'red'"], []),
        (["HOURS = 24"], [], ["HOURS: 24 -> 12"]),
        ([], ["long/standin.Hand.length = 6"], ["long/standin.Hand.length: 5 -> 6"]),
        # A macro that decides what may change and what may not, as a schedule's length: one line to change both.
        (["long/standin.Hand.length = %SECONDS"], ["long/standin.Hand.length = %SECONDS", "SECONDS = 7"], []),
        # Bound otherwise, with the same value or another.
        (["standin.Clock.every = 30"], [], []),
        (["standin.Clock.hours = 12"], [], ["HOURS: (not set) -> 12", "standin.Clock.hours: 12 -> %HOURS"]),
        # A function in place of a class, and its own parameters.
        (
            ["standin.Clock.hand = @standin.ticking", "standin.ticking.volume = 0.5"],
            ["standin.Clock.hand = @standin.ticking", "standin.ticking.pitch = 880.0"],
            ["standin.ticking.pitch: (not set) -> 880.0"],
        ),
    ],
)
def test_only_what_is_marked_may_change(tmp_path, old, new, refused):
    def load(bindings):
        text = CLOCK
        for binding in bindings:
            name, _, value = binding.partition(" = ")
            text = re.sub(rf"^{re.escape(name)} = .*\n", "", text, flags=re.MULTILINE) + f"{name} = {value}\n"
        for macro in ("HOURS", "EVERY", "SECONDS"):  # What nothing uses any more would be refused.
            if f"%{macro}" not in text:
                text = re.sub(rf"^{macro} = .*\n", "", text, flags=re.MULTILINE)
        if "@long/standin.Hand" not in text:
            text = re.sub(r"^long/standin.Hand.*\n", "", text, flags=re.MULTILINE)
        (tmp_path / "clock.gin").write_text(IMPORTS + text)
        return configuration.load([str(tmp_path / "clock.gin")], root=Clock)

    assert load(new).refused_changes(load(old).text) == refused


def test_an_annotation_that_marks_is_no_other_type(tmp_path):
    (tmp_path / "clock.gin").write_text(IMPORTS + CLOCK)
    with pytest.raises(
        ValueError, match=r"standin.Clock.every must be of type int. Received: 'many' \(str\)"
    ):
        configuration.load([str(tmp_path / "clock.gin")], ["SECONDS = 'many'"], root=Clock)
    with pytest.raises(ValueError, match=r"standin.Clock.rate must be of type float \| None. Received: 'x'"):
        configuration.load([str(tmp_path / "clock.gin")], ["standin.Clock.rate = 'x'"], root=Clock)


def test_what_a_run_may_change():
    assert factories.may_change(Experiment) == {
        *("train_steps", "log_every", "eval_every", "save_every", "keep_checkpoints", "on_bad_step"),
        *("steps_per_call", "data_dir"),
    }


def test_description_shows_values_and_defaults(load):
    lines = configuration.describe(load(BASE, "standin.network.depth = 2")).splitlines()
    rows = [line.split() for line in lines]
    assert lines[0] == "Macros"
    assert ["STEPS", "10"] in rows
    assert ["steps", "10"] in rows
    assert ["network", "@standin.network"] in rows
    assert ["ratio", "1.0", "default"] in rows
    assert ["depth", "2"] in rows
    text_length_rows = configuration.describe(load(BASE + "standin.Machine.apply = @standin.text_length\n"))
    assert re.search(r"standin.text_length\n  text +given by the run\n", text_length_rows)


# -------------------------------------------------------------------------------------------- What is refused


@pytest.mark.parametrize(
    ("binding", "expected", "received"),
    [
        ("STEPS = 'many'", "int", "'many' (str), from the macro STEPS"),
        ("STEPS = 1e3", "int", "1000.0 (float), from the macro STEPS"),
        ("STEPS = True", "int", "True (bool)"),
        ("STEPS = None", "int", "None (NoneType)"),
        ("standin.Machine.ratio = '1'", "float", "'1' (str)"),
        ("standin.Machine.ratio = False", "float", "False (bool)"),
        ("standin.Machine.flag = 1", "bool", "1 (int)"),
        ("standin.Machine.name = 3", "str", "3 (int)"),
        ("standin.Machine.mode = 'go'", "Literal['stop', 'skip']", "'go' (str)"),
        ("standin.Machine.rate = 1.0", "Rate | None", "1.0 (float)"),
        ("standin.Machine.rate = @standin.Rate", "Rate | None", "@standin.Rate (a reference)"),
        (
            "standin.Machine.rate = @standin.text_length()",
            "Rate | None",
            "@standin.text_length() (a reference)",
        ),
        ("standin.Machine.network = 'lstm'", "Callable[..., tuple]", "'lstm' (str)"),
        ("standin.Machine.network = @standin.network()", "Callable[..., tuple]", "@standin.network()"),
        ("standin.Machine.names = 'abc'", "Sequence[str]", "'abc' (str)"),
        ("standin.Machine.names = ['a', 1]", "Sequence[str]", "['a', 1] (list)"),
        ("standin.Machine.sizes = [1]", "tuple[int, ...]", "[1] (list)"),
        ("standin.Machine.sizes = (1, 2.0)", "tuple[int, ...]", "(1, 2.0) (tuple)"),
        ("standin.Machine.pair = (1, 'x', 2)", "tuple[int, str]", "(1, 'x', 2) (tuple)"),
        ("standin.Machine.table = {'a': 'b'}", "Mapping[str, float]", "{'a': 'b'} (dict)"),
        ("standin.Machine.rates = [1]", "Sequence[Rate]", "[1] (list)"),
        ("standin.network.depth = 'deep'", "int", "'deep' (str)"),
    ],
)
def test_wrong_type(load, binding, expected, received):
    parameter = "standin.Machine.steps" if binding.startswith("STEPS") else binding.split(" =")[0]
    bindings = [binding]
    if binding.endswith("@standin.text_length()"):
        bindings.append("standin.text_length.text = 'x'")
    with pytest.raises(
        ValueError, match=re.escape(f"{parameter} must be of type {expected}. Received: {received}")
    ):
        load(BASE, *bindings)


def test_wrong_type_advice(load):
    with pytest.raises(ValueError, match=r"Set STEPS to a value of that type\."):
        load(BASE, "STEPS = 'many'")
    with pytest.raises(
        ValueError, match=r"To pass what it returns, write standin.Machine.rate = @standin.Rate\(\)"
    ):
        load(BASE, "standin.Machine.rate = @standin.Rate")
    with pytest.raises(
        ValueError, match=r"pass the function itself, write standin.Machine.network = @standin.network\."
    ):
        load(BASE, "standin.Machine.network = @standin.network()")


@pytest.mark.parametrize(
    ("hint", "function"),
    [
        (Callable[[], Body], lstm_body),
        (Callable[[], keras.layers.Layer], keras.layers.GRU),
        (Callable[..., keras.layers.Layer], keras.layers.GRU),
    ],
)
def test_what_can_be_called_is_not_what_makes_it(hint, function):
    factory = factories.Factory(name="f", function=function, arguments=())
    assert factories.fits(factory, hint)
    assert not factories.fits(factories.Result(factory), hint)


@pytest.mark.parametrize(
    "binding",
    [
        "standin.Machine.ratio = 1",
        "standin.Machine.rate = None",
        "standin.Machine.names = ('a',)",
        "standin.Machine.names = []",
        "standin.Machine.sizes = ()",
        "standin.Machine.pair = (1, 'x')",
        "standin.Machine.table = {'a': 1}",
        "standin.Machine.apply = @standin.text_length",
        "standin.Machine.schedule = 3",
        "standin.network.width = 'any, for it is not annotated'",
    ],
)
def test_right_type(load, binding):
    assert load(BASE.replace("%WIDTH", "1").replace("WIDTH = 3", ""), binding)


def test_a_schedule_takes_no_text_though_keras_would(load):
    text = (
        BASE
        + "standin.Machine.schedule = @schedules.CosineDecay()\nschedules.CosineDecay.decay_steps = %STEPS\n"
    )
    with pytest.raises(
        ValueError, match=r"CosineDecay.initial_learning_rate must be of type number. Received: 'x'"
    ):
        load(
            text + "schedules.CosineDecay.initial_learning_rate = 'x'\n",
            imports="from keras.optimizers import schedules\n",
        )


def test_result_of_the_wrong_type_is_noticed_when_built(load):
    text = BASE + "standin.Machine.rate = @standin.other_network()\nstandin.other_network.width = 1\n"
    with pytest.raises(
        ValueError, match=r"standin.Machine.rate must be of type Rate \| None. Received: \('other', 1\)"
    ):
        load(text)


def test_unknown_parameter(load):
    with pytest.raises(
        ValueError,
        match=r"run.gin, line \d+: standin.Machine has no parameter 'stepz'. Did you mean steps\? It has: ",
    ):
        load(BASE + "standin.Machine.stepz = 3\n")
    with pytest.raises(
        ValueError, match=r"binding 'standin.network.dept=3': standin.network has no parameter 'dept'"
    ):
        load(BASE, "standin.network.dept=3")


def test_unknown_configurable(load):
    with pytest.raises(
        ValueError, match=r"standin.Machin does not exist: .* has no 'Machin'. Did you mean Machine"
    ):
        load(BASE + "standin.Machin.steps = 3\n")
    with pytest.raises(ValueError, match=r"standin.netwrk does not exist: .*Did you mean network"):
        load(BASE, "standin.Machine.network = @standin.netwrk")
    with pytest.raises(ValueError, match="'network' is not imported"):
        load(BASE, "network.depth = 3")
    with pytest.raises(ValueError, match="No module named 'no_such_module'"):
        load(BASE, imports="import no_such_module\n")
    with pytest.raises(ValueError, match="Only modules can be imported"):
        load(BASE, imports="from keras.optimizers.schedules import CosineDecay\n")


@pytest.mark.parametrize(
    ("statement", "places"),
    [
        ("from lmscale.losses import sampled", "lmscale.losses are in lmscale.softmax now"),
        ("import lmscale.models.lstm", "lmscale.models are in lmscale.bodies now"),
        (
            "from lmscale.vocabulary import row_optimizers",
            "lmscale.parameters (row_optimizers, now update_rules)",
        ),
        ("from lmscale.vocabulary import samplers", "lmscale.vocabulary are in lmscale.softmax (samplers), "),
    ],
)
def test_modules_that_have_moved(load, statement, places):
    with pytest.raises(ValueError, match=rf"run.gin, line 3: No module .*{re.escape(places)}.*CHANGELOG.md"):
        load(imports=f"{statement}\n")


def test_a_configuration_of_version_0_1_0_becomes_one_of_today_by_the_changelog(tmp_path):
    folder = Path(__file__).parent / "runs" / "format_1"
    text = (folder / "config.gin").read_text()
    (tmp_path / "config.gin").write_text(text)
    with pytest.raises(ValueError, match=r"CHANGELOG\.md tells more"):
        configuration.load([str(tmp_path / "config.gin")])
    for old, new in {
        "lmscale.losses import": "lmscale.softmax import",
        "lmscale.models import": "lmscale.bodies import",
        "lmscale.vocabulary import samplers": "lmscale.softmax import samplers",
        "lmscale.vocabulary import row_optimizers": "lmscale.parameters import update_rules",
        "row_optimizers.": "update_rules.",
        "body/": "layers/",
        "Experiment.body = ": "Experiment.task = @next_token.NextToken\nnext_token.NextToken.body = ",
        "experiment.Experiment.loss = ": "next_token.NextToken.head = ",
        "experiment.Experiment.window = ": "next_token.NextToken.window = ",
        "experiment.Experiment.eval_window = ": "next_token.NextToken.eval_window = ",
        "experiment.Experiment.embed_dim = ": (
            "next_token.NextToken.tables = {'words': @words/table_config.TableConfig()}\n"
            "next_token.NextToken.inputs = 'words'\n"
            "next_token.NextToken.outputs = 'words'\n"
            "words/table_config.TableConfig.embed_dim = "
        ),
        "experiment.Experiment.initial_bias = ": "words/table_config.TableConfig.bias = ",
        "experiment.Experiment.row_optimizer = ": (
            "experiment.Experiment.groups = [@rows/groups.Group(), @layers/groups.Group()]\n"
            "rows/groups.Group.pattern = 'tables/.*'\n"
            "layers/groups.Group.pattern = 'layers/.*'\n"
            "rows/groups.Group.update = "
        ),
        "experiment.Experiment.body_optimizer = ": "layers/groups.Group.update = ",
        "from lmscale import experiment": (
            "from lmscale import experiment\n"
            "from lmscale.parameters import groups\n"
            "from lmscale.tables import table_config\n"
            "from lmscale.tasks import next_token"
        ),
    }.items():
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "config.gin").write_text(text)
    resumed = configuration.load([str(folder / "resumed.gin")])
    assert configuration.load([str(tmp_path / "config.gin")]).text == resumed.text


def test_files_must_enable_dynamic_registration(tmp_path):
    (tmp_path / "run.gin").write_text("Machine.steps = 3\n")
    with pytest.raises(ValueError, match="must begin with `from __gin__ import dynamic_registration`"):
        configuration.load([str(tmp_path / "run.gin")], root=Machine)


def test_missing_root(load):
    with pytest.raises(ValueError, match=r"must configure \w+.Machine. Received: files that never name it"):
        load("WIDTH = 3\n")


def test_missing_required_parameter(load):
    with pytest.raises(ValueError, match=r"Received none for: standin.Machine.steps. Add"):
        load("standin.Machine.network = @standin.network\n")
    with pytest.raises(ValueError, match=r"Received none for: standin.Rate.value"):
        load(BASE, "standin.Machine.rate = @standin.Rate()")
    factory = load(
        BASE.replace("standin.network.width = %WIDTH\n", "").replace("WIDTH = 3\n", "")
    ).experiment.network
    with pytest.raises(ValueError, match=r"Received none for: standin.network.width"):
        factory()
    assert factory(width=2)[1] == 2


def test_parameter_given_by_configuration_and_caller(load):
    with pytest.raises(
        ValueError, match=r"standin.network.width is decided by the run.* Received: standin.network.width = 3"
    ):
        load().experiment.network(width=4)
    text = BASE + "standin.Machine.apply = @standin.text_length\nstandin.text_length.text = 'x'\n"
    with pytest.raises(ValueError, match=r"standin.text_length.text is decided by the run"):
        load(text).experiment.apply("xy")


@pytest.mark.parametrize(
    ("old", "new", "received"),
    [
        ("STEPS = 10\n", "", "no such macro"),
        ("STEPS = 10", "STEPS = %gin.REQUIRED", "none .it is marked as required."),
    ],
)
def test_missing_macro(load, old, new, received):
    text = BASE.replace(old, new)
    with pytest.raises(
        ValueError,
        match=rf"macro STEPS, which standin.Machine.steps uses, must have a value. Received: {received}.*"
        "Add the line STEPS = ... to a gin file, or pass --gin_param='STEPS = ...'",
    ):
        load(text)
    assert load(text, "STEPS = 4").experiment.steps == 4
    with pytest.raises(ValueError, match=r"Did you mean STEP\?"):
        load(text, "STEP = 4")


def test_required_parameter_without_value(load):
    with pytest.raises(ValueError, match=r"standin.Machine.name must be set. Received: no value"):
        load(BASE, "standin.Machine.name = %gin.REQUIRED")


def test_unused_macro(load):
    with pytest.raises(ValueError, match=r"macro STEP \(nothing uses %STEP\). Did you mean STEPS\?"):
        load(BASE, "STEP = 4")
    with pytest.raises(ValueError, match=r"macro A \(nothing uses %A\).* macro B \(nothing uses %B\)"):
        load(BASE, "A = 4", "B = %A")


def test_setting_of_what_the_run_does_not_use(load):
    with pytest.raises(
        ValueError,
        match=r"must have an effect. Received, without any: .*width \(nothing refers to @standin.network\)",
    ):
        load(BASE, "standin.Machine.network = @standin.other_network", "standin.other_network.width = 1")
    with pytest.raises(ValueError, match=r"slow/standin.network.depth \(no reference has this scope"):
        load(BASE, "slow/standin.network.depth = 1")
    with pytest.raises(
        ValueError, match=r"standin.network.depth \(no reference has this scope, or an inner scope"
    ):
        load(
            BASE,
            "standin.Machine.network = @slow/standin.network",
            "standin.network.depth = 1",
            "slow/standin.network.depth = 2",
        )


def test_circles(load, tmp_path):
    with pytest.raises(
        ValueError, match=r"must not refer to itself. Received: standin.Machine -> %A -> %B -> %A"
    ):
        load(BASE, "standin.Machine.steps = %A", "A = %B", "B = %A")
    with pytest.raises(ValueError, match=r"standin.network -> standin.network"):
        load(BASE, "standin.network.width = @standin.network")
    (tmp_path / "a.gin").write_text("include './b.gin'\n")
    (tmp_path / "b.gin").write_text("include './a.gin'\n")
    with pytest.raises(ValueError, match=r"must not include itself. Received: .*a.gin -> .*b.gin -> .*a.gin"):
        configuration.load([str(tmp_path / "a.gin")], root=Machine)


def test_files_that_are_not_there(load, tmp_path):
    (tmp_path / "quickstart.gin").write_text("")
    with pytest.raises(
        ValueError,
        match=r"quickstat.gin', which is not a file. Did you mean quickstart.gin or quickstart_untied.gin\?",
    ):
        configuration.load([str(tmp_path / "quickstat.gin")], root=Machine)
    with pytest.raises(ValueError, match="which is not a file"):
        configuration.load([str(tmp_path)], root=Machine)
    with pytest.raises(
        ValueError, match=r"run.gin, line 4: the included file 'no.gin' is neither beside this file"
    ):
        load("\ninclude 'no.gin'\n" + BASE)
    with pytest.raises(ValueError, match=r"At least one gin file is needed. Received: \[\]"):
        configuration.load([], root=Machine)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("DATA = runs/data\n", r"run.gin, line \d+: .*'runs'.*text in quotes"),
        ("STEPS 10\n", r"run.gin, line \d+: Couldn't parse statement, expected ':' or '='"),
        ("STEPS = (10\n", "run.gin.*Expected NAME = value"),
        ("STEPS = 10 11\n", r"run.gin, line \d+: Expected newline"),
    ],
)
def test_not_gin(load, text, message):
    with pytest.raises(ValueError, match=message):
        load(text)


def test_not_gin_in_a_binding(load):
    with pytest.raises(
        ValueError, match=r"binding 'DATA=runs/data': .*Expected NAME = value, text in quotes"
    ):
        load(BASE, "DATA=runs/data")


def test_a_byte_order_mark_is_skipped(tmp_path):
    (tmp_path / "part.gin").write_bytes(b"\xef\xbb\xbf" + b"STEPS = 11\n")
    (tmp_path / "run.gin").write_bytes(b"\xef\xbb\xbf" + f"{IMPORTS}{BASE}include 'part.gin'\n".encode())
    assert configuration.load([str(tmp_path / "run.gin")], root=Machine).experiment.steps == 11


@pytest.mark.parametrize(
    ("content", "received"),
    [
        (b"NAME = '\xff'\n", "byte 0xff at byte 9"),
        ("\ufeffNAME = 1\n".encode("utf-16-le"), "UTF-16"),
        ("\ufeffNAME = 1\n".encode("utf-16-be"), "UTF-16"),
        ("NAME = 1\n".encode("utf-16-le"), "NUL characters, as UTF-16 has them"),
    ],
)
def test_not_utf8(tmp_path, content, received):
    (tmp_path / "part.gin").write_bytes(content)
    (tmp_path / "run.gin").write_text("\ninclude 'part.gin'\n")
    message = f"a gin file must be UTF-8. Received: {received}. Convert it, for instance with iconv"
    with pytest.raises(ValueError, match=f"part.gin: {message}"):
        configuration.load([str(tmp_path / "part.gin")], root=Machine)
    with pytest.raises(ValueError, match=f"run.gin, line 2: {message}"):
        configuration.load([str(tmp_path / "run.gin")], root=Machine)


def test_bytes_that_are_not_utf8_on_the_command_line(load):
    with pytest.raises(ValueError, match=r"A binding must be UTF-8. Received: \"NAME = 'a\\udcff'\". Rename"):
        load(BASE, "NAME = 'a\udcff'")
    with pytest.raises(ValueError, match=r"A gin file must be a path .* Received: 'a\\udcff.gin'"):
        configuration.load(["a\udcff.gin"], root=Machine)


def test_not_finite(load):
    with pytest.raises(ValueError, match=r"RATIO must be finite. Received: inf"):
        load(BASE, "standin.Machine.ratio = %RATIO", "RATIO = 1e999")


def test_errors_of_constructors_come_through(load):
    with pytest.raises(ValueError, match="decay_steps"):
        load(
            BASE
            + "standin.Machine.schedule = @schedules.CosineDecayRestarts()\n"
            + "schedules.CosineDecayRestarts.initial_learning_rate = 1.0\n",
            imports="from keras.optimizers import schedules\n",
        )
    with pytest.raises(ZeroDivisionError):
        load(BASE + "standin.Machine.rate = @standin.divide()\nstandin.divide.by = 0\n")


def divide(*, by: int):
    return 1 / by


# --------------------------------------------------------------------------------- The shipped configurations


def test_only_one_module_knows_of_gin():
    package = Path(configuration.__file__).parent
    importing = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if re.search(r"^\s*(import|from) gin\b", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert importing == {"gin_text.py"}


CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.gin"))
MACROS = [
    *[
        "DATA_DIR",
        "TRAIN_STEPS",
        "GLOBAL_BATCH_SIZE",
        "WINDOW",
        "EMBED_DIM",
        "HIDDEN_DIM",
        "NUM_LAYERS",
        "DROPOUT",
    ],
    *["NUM_SAMPLED", "LEARNING_RATE", "SEED", "LOG_EVERY", "EVAL_EVERY", "SAVE_EVERY"],
]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
class TestShipped:
    def test_loads_from_anywhere_and_from_its_own_text(self, path, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        config = configuration.load([str(path)])
        (tmp_path / "config.gin").write_text(config.text)
        reloaded = configuration.load(["config.gin"])
        assert reloaded.text == config.text
        assert configuration.describe(reloaded) == configuration.describe(config)

    def test_exposes_the_common_macros(self, path):
        assert set(MACROS) <= configuration.load([str(path)]).macros.keys()

    @pytest.mark.parametrize("macro", MACROS)
    def test_a_macro_of_the_wrong_type_is_refused(self, path, macro):
        wrong = "7" if macro == "DATA_DIR" else "'many'"
        with pytest.raises(ValueError, match=f"must be of type .*from the macro {macro}"):
            configuration.load([str(path)], [f"{macro} = {wrong}"])


def test_loading_leaves_the_devices_alone():
    """--cpu_devices takes effect only while TensorFlow has not started its devices."""
    code = (
        "import sys\nfrom lmscale import configuration\nfrom tensorflow.python.eager import context\n"
        "configuration.load(sys.argv[1:])\nassert not context.context()._initialized\n"
    )
    quickstart = Path(__file__).parent.parent / "configs" / "quickstart.gin"
    result = subprocess.run(
        [sys.executable, "-c", code, quickstart], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
