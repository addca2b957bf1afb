"""What a configuration builds."""

import random

import keras
import numpy as np
import pytest
from standin import BASE, IMPORTS, Layer, Machine, Rate, again

from lmscale import configuration


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
