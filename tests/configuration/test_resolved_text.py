"""The resolved text of a configuration says all, and what a run may change of it."""

import re

import pytest
from standin import BASE, IMPORTS, Clock, Machine, Rate, Slow, again

from lmscale import configuration, factories
from lmscale.experiment import Experiment


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
    (tmp_path / "other.gin").write_text(f"{IMPORTS.rstrip()} as other\n" + BASE.replace("standin", "other"))
    other = configuration.load([str(tmp_path / "other.gin")], root=Machine).text
    assert "standin.network.width" in before
    assert "other.network.width" in other
    assert "standin." not in other
    assert load().text == before


def test_differences_are_named(load):
    old, new = load(BASE, "STEPS = 9"), load(BASE, "standin.network.depth = 2")
    assert new.differences(old.text) == ["STEPS: 9 -> 10", "standin.network.depth: (not set) -> 2"]
    assert new.differences(new.text) == []


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
