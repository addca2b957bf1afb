"""Every knob is live: what a configuration can set changes the resolved run, and what the run does."""

import ast
import contextlib
import dataclasses
import functools
import inspect
import typing

import keras
import numpy as np
import pytest
import tensorflow as tf
import tiny_runs
from keras.optimizers.schedules import CosineDecay, LearningRateSchedule
from shipped_configurations import CONFIGS, macros_of
from tensorflow.python.framework import config as framework_config

from lmscale import configuration, factories, gin_text
from lmscale.bodies.body import keras_body
from lmscale.bodies.gru import GruBody
from lmscale.bodies.lstm import lstm_body
from lmscale.bodies.transformer import transformer_body
from lmscale.experiment import Experiment
from lmscale.parameters.activity import Activity, Every
from lmscale.parameters.averages import Averaged
from lmscale.parameters.groups import Group
from lmscale.parameters.pretrained import PretrainedVectors
from lmscale.parameters.update_rules import SGD, Adagrad, Adam, RowWiseAdagrad, UpdateRule
from lmscale.softmax.full import FullSoftmax
from lmscale.softmax.sampled import SampledSoftmax
from lmscale.softmax.samplers import LogUniformSampler, UniformSampler, UnigramSampler
from lmscale.tables.table_config import TableConfig
from lmscale.tasks.both_directions import BothDirections
from lmscale.tasks.next_token import NextToken

# Settings that a configuration leaves as they are by default, of its body or of a task without one.
DEFAULTS = {
    "beauty_sasrec": "transformer.transformer_body.feed_forward_dim",
    "quickstart_gru": "gru.GruBody.dropout_over_time",
    "quickstart_transformer": "transformer.transformer_body.feed_forward_dim",
    "wikitext2_transformer": "transformer.transformer_body.feed_forward_dim",
    "quickstart_word2vec": "word2vec.SkipGram.cross_lines",
    "wikitext2_word2vec": "word2vec.SkipGram.cross_lines",
    "quickstart_cbow": "word2vec.CBOW.cross_lines",
    "quickstart_classes": "classification.Classification.bag_length",
    "quickstart_last_words": "last_words.LastWords.activation",
}
# What the run passes when it calls a factory.
GIVEN_BY_THE_RUN = {"context", "table", "vocab_size", "counts"}

# --------------------------------------------------- From the gin file to the experiment: the shipped configurations


def content(value):
    """All that an experiment consists of, as plain values that compare by what they say."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return type(value), {f.name: content(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, LearningRateSchedule | keras.initializers.Initializer):
        return type(value), value.get_config()
    if isinstance(value, UpdateRule | Activity):
        return type(value), {name: content(v) for name, v in vars(value).items()}
    if isinstance(value, tuple | list):
        return tuple(map(content, value))
    if isinstance(value, dict):
        return {name: content(v) for name, v in value.items()}
    assert value is None or callable(value) or isinstance(value, bool | int | float | str), value
    return value


def another(value, hint):
    """A value in gin's spelling, of the same type where that can be."""
    if isinstance(value, bool):
        return str(not value)
    if isinstance(value, int | float):
        return repr(value + 1 if isinstance(value, int) else value / 2 or 0.25)
    if isinstance(value, str) and hint is None and is_literal_list(value):
        return repr(ast.literal_eval(value)[::-1])  # A macro's; the order matters.
    if isinstance(value, str):
        others = [choice for choice in choices(hint) if choice != value]
        return repr(others[0] if others else f"other_{value}")
    # None stands for a default of the receiver; a reference can always be replaced by a number, if only to be refused.
    return "1" if hint is None or "int" in str(hint) else "0.25"


def choices(hint):
    """What a type of `Literal`s lets one choose from, all levels deep."""
    if typing.get_origin(hint) is typing.Literal:
        return typing.get_args(hint)
    return [choice for argument in typing.get_args(hint) for choice in choices(argument)]


def is_literal_list(text):
    try:
        return isinstance(ast.literal_eval(text), list)
    except (ValueError, SyntaxError):
        return False


def settings(config):
    """(name, another value) of each macro, and of each parameter of everything that takes part."""
    yield from ((name, another(value, None)) for name, value in config.macros.items())
    for factory in config.used:
        hints = factories.annotations(factory.function)
        bound = dict(factory.arguments)
        for parameter in factories.parameters(factory.function):
            if parameter.name not in GIVEN_BY_THE_RUN:
                value = bound.get(parameter.name, parameter.default)
                yield f"{factory.name}.{parameter.name}", another(value, hints.get(parameter.name))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loaded:
    """A configuration, and the same text with another value for every setting at once, each as gin has read it."""

    config: configuration.ResolvedConfig
    bindings: gin_text.Bindings
    other_values: dict[str, str]
    other_text: str
    other_bindings: gin_text.Bindings

    def with_other(self, name):
        """The configuration with the other value of one setting: `configuration.load`, but for the reading."""
        macros, parameters = dict(self.bindings.macros), dict(self.bindings.parameters)
        if name in self.config.macros:
            macros[name] = self.other_bindings.macros[name]
        else:
            configurable, _, parameter = name.rpartition(".")
            key = next(
                (scope, selector)
                for scope, selector in self.other_bindings.parameters
                if "/".join(filter(None, (scope, self.other_bindings.configurables[selector].name)))
                == configurable
            )
            value = self.other_bindings.parameters[key][parameter]
            parameters[key] = {**parameters.get(key, {}), parameter: value}
        bindings = gin_text.Bindings(
            macros=macros, parameters=parameters, configurables=self.other_bindings.configurables
        )
        return configuration.build(bindings, text=self.other_text)


@functools.cache
def loaded(path):
    """The configuration at a path; gin, which takes most of a load's time, reads it twice, not once a setting."""
    config = configuration.load([str(path)])
    other_values = dict(settings(config))
    other_text = gin_text.read([str(path)], [f"{name} = {value}" for name, value in other_values.items()])
    return Loaded(
        config=config,
        bindings=gin_text.parse(config.text),
        other_values=other_values,
        other_text=other_text,
        other_bindings=gin_text.parse(other_text),
    )


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_has_the_same_macros(path):
    assert loaded(path).config.macros.keys() >= macros_of(path)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_setting_changes_the_experiment_or_is_refused(path):
    config, values = loaded(path).config, loaded(path).other_values
    expected = content(config.experiment)
    changed, refused = [], {}
    for name, value in values.items():
        try:
            other = loaded(path).with_other(name)
        except ValueError as error:
            refused[name] = str(error)
        else:
            assert content(other.experiment) != expected, f"{name} = {value} changes nothing"
            assert any(line.startswith(f"{name}: ") for line in other.differences(config.text)), name
            changed.append(name)
    assert set(changed) >= macros_of(path)
    assert "experiment.Experiment.keep_checkpoints" in changed
    assert DEFAULTS.get(path.stem, "lstm.lstm_body.dropout_over_time") in changed
    # A macro's own parameter set directly leaves the macro without effect; a reference is no number.
    for name, reason in refused.items():
        # And what becomes of new rows depends on how rows are matched.
        reasons = (
            "nothing uses %",
            f"{name} must be",
            "without any: ",
            "rows that are matched by their words",
        )
        assert any(expected in reason for expected in reasons), (name, reason)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("name", ["SEED", "experiment.Experiment.keep_checkpoints"])
def test_a_setting_read_among_others_is_what_it_is_alone(path, name):
    alone = configuration.load([str(path)], [f"{name} = {loaded(path).other_values[name]}"])
    assert content(alone.experiment) == content(loaded(path).with_other(name).experiment)


def test_the_flag_seed_changes_the_experiment():
    path = str(CONFIGS[0])
    assert configuration.load([path], seed=77).experiment.seed == 77
    assert configuration.load([path], seed=77).text == configuration.load([path], ["SEED = 77"]).text


# ----------------------------------------------------- From the experiment to what happens: runs of a few eager steps

# The parts of an experiment and its own fields: (what is called, with which arguments).
PARTS = {
    "body": (lstm_body, {"num_layers": 2, "hidden_dim": 6, "dropout": 0.3}),
    "sampler": (LogUniformSampler, {"num_sampled": 16, "replacement": False}),
    "head": (SampledSoftmax, {}),
    "table": (TableConfig, {"embed_dim": 4}),
    "task": (NextToken, {"inputs": "words", "outputs": "words", "window": 3, "eval_window": 13}),
    "row_rule": (Adam, {"learning_rate": 0.02}),
    "layer_rule": (Adam, {"learning_rate": 0.01}),
    # Of the rows. That of the layers, which comes after it, is the same class.
    "group": (Group, {"pattern": "tables/.*"}),
    "experiment": (
        Experiment,
        {
            "train_steps": 4,
            "global_batch_size": 4,
            "seed": 1,
            "log_every": 2,
            "eval_every": 2,
            "save_every": 1,
            "clip_norm": 0.1,
            "eval_batch_size": 9,
            "probe_tokens": 31,
            "keep_checkpoints": 2,
        },
    ),
}
# The same with other parts in place of those.
VARIANTS = {
    "base": {},
    "uniform": {"sampler": (UniformSampler, {"num_sampled": 16})},
    "unigram": {"sampler": (UnigramSampler, {"num_sampled": 16})},
    "full": {"head": (FullSoftmax, {})},
    "adagrad": {
        "row_rule": (Adagrad, {"learning_rate": 0.1}),
        "layer_rule": (Adagrad, {"learning_rate": 0.1}),
    },
    "row_wise": {
        "row_rule": (RowWiseAdagrad, {"learning_rate": 0.1}),
        "layer_rule": (SGD, {"learning_rate": 0.1}),
    },
    "averaged": {"row_rule": (Averaged, {"update": Adam(learning_rate=0.02), "decay": 0.5})},
    # The simple RNN has the parameters of the GRU, and takes them the same way.
    "gru": {"body": (GruBody, {"num_layers": 2, "hidden_dim": 6, "dropout": 0.3})},
    "transformer": {
        "body": (
            transformer_body,
            {"num_layers": 2, "hidden_dim": 4, "num_heads": 1, "feed_forward_dim": 6, "dropout": 0.3},
        )
    },
    "both_directions": {
        "task": (
            BothDirections,
            {"inputs": "words", "outputs": "words", "window": 3, "eval_window": 13},
        )
    },
}
# Another value for each parameter, which four steps must show.
OTHER_VALUES = {
    "task": functools.partial(
        NextToken,
        tables={"words": TableConfig(embed_dim=4)},
        inputs="words",
        outputs="words",
        body=functools.partial(keras_body, layer=functools.partial(keras.layers.Dense, 6)),
        head=FullSoftmax,
        window=3,
    ),
    "groups": [Group(pattern=".*", update=SGD(learning_rate=0.02))],
    "train_steps": 3,
    "global_batch_size": 5,
    "gradient_accumulation_steps": 2,
    "window": 4,
    "embed_dim": 5,
    "bias": "log_frequency",
    "body": functools.partial(keras_body, layer=functools.partial(keras.layers.Dense, 6)),
    "head": FullSoftmax,
    "input_dim": 5,
    "pattern": "tables/.*|layers/projection/.*",
    "update": SGD(learning_rate=0.02),
    "active": Every(period=2),
    "initializer": keras.initializers.RandomNormal(stddev=0.3, seed=1),
    "seed": 2,
    "log_every": 1,
    "eval_every": 4,
    "save_every": 4,
    "clip_norm": 0.05,
    "compute_dtype": "bfloat16",
    "deterministic_ops": True,
    "eval_batch_size": 10,
    "eval_window": 14,
    "eval_tokens": 300,
    "evaluate_averages": True,
    "probe_tokens": 32,
    "keep_checkpoints": 3,
    "num_layers": 1,
    "hidden_dim": 7,
    "last_hidden_dim": 4,
    "recurrent_projection_dim": 3,
    "num_heads": 2,
    "feed_forward_dim": 5,
    "dropout": 0.4,
    "embedding_dropout": 0.0,
    "output_dropout": 0.0,
    "dropout_over_time": True,
    "sampler": functools.partial(UniformSampler, num_sampled=16),
    "remove_accidental_hits": False,
    "num_sampled": 17,
    "power": 0.5,
    "block_rows": 7,
    "block_tokens": 7,
    "learning_rate": 0.03,
    "beta_1": 0.8,
    "beta_2": 0.9,
    "epsilon": 1e-3,
    "initial_accumulator": 0.2,
    "weight_decay": 0.1,
    "decay": 0.6,
}
# Shown to be live elsewhere: by the tests of these names below, test_bad_steps.py, test_loss_scaling.py,
# test_shipped_configurations.py, tests/test_trainer.py and, of several devices, tests/test_communication.py.
ELSEWHERE = {
    "data_dir",
    "vocabulary",
    "pretrained",
    "tables",
    "inputs",
    "outputs",
    "on_bad_step",
    "warm_start",
    "steps_per_call",
    "loss_scaling",
    "exchange",
}


def knobs():
    """[(variant, part, parameter)] of all that can be set; what a variant shares with the base only once."""
    found = []
    for variant, replaced in VARIANTS.items():
        for part, (function, _) in (replaced or PARTS).items():
            elsewhere = GIVEN_BY_THE_RUN | ELSEWHERE
            if function is transformer_body:
                elsewhere |= {
                    "hidden_dim"
                }  # It must be the width of what it reads: tests/bodies/test_transformer.py.
            for parameter in inspect.signature(function).parameters:
                if parameter not in elsewhere:
                    # There must be averages.
                    base = "averaged" if parameter == "evaluate_averages" else variant
                    found.append((base, part, parameter))
    return found


def make_experiment(data_dir, *, variant, part=None, parameter=None, **changes):
    """The experiment of a variant, with another value for one parameter; `changes` are arguments of parts."""
    parts = {**PARTS, **VARIANTS[variant]}
    made = {}
    for name, (function, arguments) in parts.items():
        arguments = arguments | changes.get(name, {})
        if name == "head" and function is SampledSoftmax:
            arguments["sampler"] = made["sampler"]
        if name == "task":
            arguments = {
                "tables": {"words": made["table"]()},
                "body": made["body"],
                "head": made["head"],
            } | arguments
        if name == "group":
            arguments["update"] = made["row_rule"]()
        if name == "experiment":
            groups = [made["group"](), Group(pattern="layers/.*", update=made["layer_rule"]())]
            arguments |= {"data_dir": str(data_dir), "task": made["task"], "groups": groups}
        if name == part:
            default = inspect.signature(function).parameters[parameter].default
            # Either way may be the default.
            is_flag = parameter == "replacement"
            arguments[parameter] = (
                not arguments.get(parameter, default) if is_flag else OTHER_VALUES[parameter]
            )
        made[name] = functools.partial(function, **arguments)
    return made["experiment"]()


@contextlib.contextmanager
def eager():
    """Functions run without being traced, which for a few steps takes longer than the steps."""
    tf.config.run_functions_eagerly(True)
    try:
        yield
    finally:
        tf.config.run_functions_eagerly(False)


def observe(experiment, *, workdir, strategy):
    """All that a run leaves behind, but for times and memory."""
    with eager():
        tiny_runs.train_here(experiment, workdir=workdir, strategy=strategy)
    deterministic = framework_config.is_op_determinism_enabled()
    framework_config.disable_op_determinism()
    lines = [tiny_runs.without_times(tiny_runs.metrics(workdir, name)) for name in ("train", "eval")]
    checkpoints = {
        step: {name: (v.shape, v.tobytes()) for name, v in tiny_runs.tensors(workdir, step).items()}
        for step in tiny_runs.checkpoint_steps(workdir)
    }
    return lines, checkpoints, deterministic


@pytest.fixture(scope="module")
def base_observation(data_dir, mirrored, tmp_path_factory):
    """base_observation(variant): what the run of a variant leaves behind, unchanged."""

    @functools.cache
    def run(variant):
        experiment = make_experiment(data_dir, variant=variant)
        return observe(experiment, workdir=tmp_path_factory.mktemp(variant), strategy=mirrored(1))

    return run


def test_a_run_repeats_itself(data_dir, mirrored, tmp_path, base_observation):
    """Or else the differences below would mean nothing."""
    experiment = make_experiment(data_dir, variant="base")
    assert observe(experiment, workdir=tmp_path, strategy=mirrored(1)) == base_observation("base")


@pytest.mark.parametrize(("variant", "part", "parameter"), knobs())
def test_every_parameter_changes_the_run(
    data_dir, mirrored, tmp_path, base_observation, variant, part, parameter
):
    experiment = make_experiment(data_dir, variant=variant, part=part, parameter=parameter)
    assert observe(experiment, workdir=tmp_path, strategy=mirrored(1)) != base_observation(variant)


def test_data_dir(mirrored, tmp_path, base_observation):
    experiment = make_experiment(tiny_runs.write_data(tmp_path / "data", seed=1), variant="base")
    assert observe(experiment, workdir=tmp_path / "run", strategy=mirrored(1)) != base_observation("base")


def test_pretrained(data_dir, mirrored, tmp_path, base_observation):
    vectors = tmp_path / "vectors.txt"
    vectors.write_text("1 4\nword7 0.1 0.2 -0.3 0.4\n")
    pretrained = {"pretrained": PretrainedVectors(path=str(vectors))}
    experiment = make_experiment(data_dir, variant="base", table=pretrained)
    assert observe(experiment, workdir=tmp_path / "run", strategy=mirrored(1)) != base_observation("base")
    assert "1 of" in (tmp_path / "run" / "pretrained_words.txt").read_text()


def test_tables_inputs_and_outputs(data_dir, mirrored, tmp_path):
    """Two tables of one width, and either of them for either end."""
    tables = {name: TableConfig(embed_dim=4, bias="none") for name in ("one", "other")}
    seen = []
    for ends in (("one", "other"), ("other", "one")):
        task = {"tables": tables} | dict(zip(("inputs", "outputs"), ends, strict=True))
        experiment = make_experiment(data_dir, variant="base", task=task)
        lines, checkpoints, _ = observe(experiment, workdir=tmp_path / ends[0], strategy=mirrored(1))
        assert {"tables/one/embedding", "tables/other/embedding"} <= checkpoints[4].keys()
        seen.append(lines)
    assert seen[0] != seen[1]


def test_schedules_are_followed(data_dir, mirrored, tmp_path):
    """Layers and rows each by their own, counted from the first update."""
    schedules = {
        "tables": CosineDecay(0.02, decay_steps=8),
        "layers": CosineDecay(0.01, decay_steps=4, warmup_target=0.05, warmup_steps=2),
    }
    groups = [
        Group(pattern=f"{kind}/.*", update=Adam(learning_rate=rate)) for kind, rate in schedules.items()
    ]
    experiment = dataclasses.replace(make_experiment(data_dir, variant="base"), log_every=1, groups=groups)
    (lines, _), _, _ = observe(experiment, workdir=tmp_path, strategy=mirrored(1))
    for kind, schedule in schedules.items():
        expected = [float(schedule(step)) for step in range(4)]
        assert len(set(expected)) == 4
        np.testing.assert_allclose([line[f"learning_rate/{kind}"] for line in lines], expected, rtol=1e-6)
