"""Configurations that are refused, and what is said of them."""

import re
from collections.abc import Callable
from pathlib import Path

import keras
import pytest
from standin import BASE, IMPORTS, Machine, again

from lmscale import configuration, factories
from lmscale.bodies.body import Body
from lmscale.bodies.lstm import lstm_body


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
    folder = Path(__file__).parent.parent / "runs" / "format_1"
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


def test_settings_of_what_a_binding_replaces_are_taken_back_by_name(load, tmp_path):
    swapped = "standin.Machine.network = @standin.other_network", "standin.other_network.width = 1"
    with pytest.raises(ValueError, match=r"To take back what a file sets: NAME = %gin.REQUIRED"):
        load(BASE, *swapped)
    config = load(BASE, *swapped, "standin.network.width = %gin.REQUIRED", "WIDTH = %gin.REQUIRED")
    assert config.settings.keys() & {"standin.network.width", "WIDTH"} == set()
    assert config.settings["standin.other_network.width"] == 1
    assert again(config, tmp_path).text == config.text
    # What is used must still have a value.
    with pytest.raises(ValueError, match=r"macro STEPS, which standin.Machine.steps uses, must have a value"):
        load(BASE, "STEPS = %gin.REQUIRED")


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
        match=r"quickstat.gin', which is not a file. Did you mean quickstart.gin or quickstart_gru.gin or "
        r"quickstart_cbow.gin\?",
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
