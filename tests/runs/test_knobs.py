"""Every knob is live: what a configuration can set changes the resolved run, and what the run does."""

import contextlib
import dataclasses
import functools
import inspect

import keras
import numpy as np
import pytest
import tensorflow as tf
import tiny_runs
from keras.optimizers.schedules import CosineDecay, LearningRateSchedule
from tensorflow.python.framework import config as framework_config

from lmscale import configuration, factories, trainer
from lmscale.bodies.body import keras_body
from lmscale.bodies.lstm import lstm_body
from lmscale.experiment import Experiment
from lmscale.parameters.update_rules import SGD, Adagrad, Adam, RowWiseAdagrad, UpdateRule
from lmscale.softmax.full import FullSoftmax
from lmscale.softmax.sampled import SampledSoftmax
from lmscale.softmax.samplers import LogUniformSampler, UniformSampler, UnigramSampler
from lmscale.workdir import Workdir

CONFIGS = sorted((tiny_runs.REPOSITORY / "configs").glob("*.gin"))
MACROS = {
    *("DATA_DIR", "TRAIN_STEPS", "GLOBAL_BATCH_SIZE", "WINDOW", "EMBED_DIM", "HIDDEN_DIM", "NUM_LAYERS"),
    *("DROPOUT", "NUM_SAMPLED", "LEARNING_RATE", "SEED", "LOG_EVERY", "EVAL_EVERY", "SAVE_EVERY"),
}
# What the trainer passes when it calls a factory.
GIVEN_BY_THE_RUN = {"vocab_size", "counts"}

# --------------------------------------------------- From the gin file to the experiment: the shipped configurations


def content(value):
    """All that an experiment consists of, as plain values that compare by what they say."""
    if dataclasses.is_dataclass(value):
        return type(value), {f.name: content(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, LearningRateSchedule):
        return type(value), value.get_config()
    if isinstance(value, UpdateRule):
        return type(value), {name: content(v) for name, v in vars(value).items()}
    if isinstance(value, tuple):
        return tuple(map(content, value))
    assert value is None or callable(value) or isinstance(value, bool | int | float | str), value
    return value


def another(value, hint):
    """A value in gin's spelling, of the same type where that can be."""
    if isinstance(value, bool):
        return str(not value)
    if isinstance(value, int | float):
        return repr(value + 1 if isinstance(value, int) else value / 2 or 0.25)
    if isinstance(value, str):
        choices = [choice for choice in getattr(hint, "__args__", ()) if choice != value]
        return repr(choices[0] if choices else f"other_{value}")
    # None stands for a default of the receiver; a reference can always be replaced by a number, if only to be refused.
    return "1" if "int" in str(hint) else "0.25"


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


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_has_the_same_macros(path):
    assert configuration.load([str(path)]).macros.keys() >= MACROS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_setting_changes_the_experiment_or_is_refused(path):
    config = configuration.load([str(path)])
    changed, refused = [], {}
    for name, value in settings(config):
        try:
            other = configuration.load([str(path)], [f"{name} = {value}"])
        except ValueError as error:
            refused[name] = str(error)
        else:
            assert content(other.experiment) != content(config.experiment), (
                f"{name} = {value} changes nothing"
            )
            assert other.differences(config.text), name
            changed.append(name)
    assert set(changed) >= MACROS
    assert "experiment.Experiment.keep_checkpoints" in changed
    assert "lstm.lstm_body.dropout_over_time" in changed
    # A macro's own parameter set directly leaves the macro without effect; a reference is no number.
    for name, reason in refused.items():
        # And a bias that is not there has no initial values.
        reasons = ("nothing uses %", f"{name} must be", "without any: ", "must be 'zeros' without a bias")
        assert any(expected in reason for expected in reasons), (name, reason)


def test_the_flag_seed_changes_the_experiment():
    path = str(CONFIGS[0])
    assert configuration.load([path], seed=77).experiment.seed == 77
    assert configuration.load([path], seed=77).text == configuration.load([path], ["SEED = 77"]).text


# ----------------------------------------------------- From the experiment to what happens: runs of a few eager steps

# Four parts of an experiment and its own fields: (what is called, with which arguments).
PARTS = {
    "body": (lstm_body, {"num_layers": 2, "hidden_dim": 6, "dropout": 0.3}),
    "sampler": (LogUniformSampler, {"num_sampled": 16, "replacement": False}),
    "loss": (SampledSoftmax, {}),
    "row_optimizer": (Adam, {"learning_rate": 0.02}),
    "body_optimizer": (Adam, {"learning_rate": 0.01}),
    "experiment": (
        Experiment,
        {
            "train_steps": 4,
            "global_batch_size": 4,
            "window": 3,
            "embed_dim": 4,
            "seed": 1,
            "log_every": 2,
            "eval_every": 2,
            "save_every": 1,
            "clip_norm": 0.1,
            "eval_batch_size": 9,
            "eval_window": 13,
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
    "full": {"loss": (FullSoftmax, {})},
    "adagrad": {
        "row_optimizer": (Adagrad, {"learning_rate": 0.1}),
        "body_optimizer": (Adagrad, {"learning_rate": 0.1}),
    },
    "row_wise": {
        "row_optimizer": (RowWiseAdagrad, {"learning_rate": 0.1}),
        "body_optimizer": (SGD, {"learning_rate": 0.1}),
    },
}
# Another value for each parameter, which four steps must show.
OTHER_VALUES = {
    "train_steps": 3,
    "global_batch_size": 5,
    "window": 4,
    "embed_dim": 5,
    "body": functools.partial(keras_body, layer=functools.partial(keras.layers.Dense, 6)),
    "loss": FullSoftmax,
    "row_optimizer": SGD(learning_rate=0.02),
    "body_optimizer": SGD(learning_rate=0.01),
    "seed": 2,
    "log_every": 1,
    "eval_every": 4,
    "save_every": 4,
    "clip_norm": None,
    "softmax_bias": False,
    "initial_bias": "log_frequency",
    "compute_dtype": "bfloat16",
    "deterministic_ops": True,
    "eval_batch_size": 10,
    "eval_window": 14,
    "probe_tokens": 32,
    "keep_checkpoints": 3,
    "num_layers": 1,
    "hidden_dim": 7,
    "last_hidden_dim": 4,
    "dropout": 0.4,
    "embedding_dropout": 0.0,
    "output_dropout": 0.0,
    "dropout_over_time": True,
    "sampler": functools.partial(UniformSampler, num_sampled=16),
    "remove_accidental_hits": False,
    "num_sampled": 17,
    "power": 0.5,
    "block_rows": 7,
    "learning_rate": 0.03,
    "beta_1": 0.8,
    "beta_2": 0.9,
    "epsilon": 1e-3,
    "initial_accumulator": 0.2,
}
# Shown to be live elsewhere: by test_data_dir, test_bad_steps.py and tests/test_trainer.py.
ELSEWHERE = {"data_dir", "on_bad_step", "steps_per_call"}


def knobs():
    """(variant, part, parameter) of all that can be set; what a variant shares with the base only once."""
    for variant, replaced in VARIANTS.items():
        for part, (function, _) in (replaced or PARTS).items():
            for parameter in inspect.signature(function).parameters:
                if parameter not in GIVEN_BY_THE_RUN | ELSEWHERE:
                    yield variant, part, parameter


def make_experiment(data_dir, *, variant, part=None, parameter=None):
    """The experiment of a variant, with another value for one parameter."""
    parts = {**PARTS, **VARIANTS[variant]}
    made = {}
    for name, (function, arguments) in parts.items():
        arguments = dict(arguments)
        if name == "loss" and function is SampledSoftmax:
            arguments["sampler"] = made["sampler"]
        if name == "experiment":
            optimizers = {key: made[key]() for key in ("row_optimizer", "body_optimizer")}
            arguments |= {"data_dir": str(data_dir), "body": made["body"], "loss": made["loss"], **optimizers}
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
    with eager(), Workdir(workdir) as opened:
        trainer.train(experiment, workdir=opened, strategy=strategy, config_text="", hparams={})
    deterministic = framework_config.is_op_determinism_enabled()
    framework_config.disable_op_determinism()
    not_compared = ("wall_time", "step_secs", "tokens_per_sec", "valid/eval_secs")
    lines = [
        [
            {
                tag: v
                for tag, v in line.items()
                if tag not in not_compared and not tag.startswith("memory_mib/")
            }
            for line in tiny_runs.metrics(workdir, name)
        ]
        for name in ("train", "eval")
    ]
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


def test_schedules_are_followed(data_dir, mirrored, tmp_path):
    """Body and rows each by their own, counted from the first update."""
    schedules = {
        "row_optimizer": CosineDecay(0.02, decay_steps=8),
        "body_optimizer": CosineDecay(0.01, decay_steps=4, warmup_target=0.05, warmup_steps=2),
    }
    optimizers = {name: Adam(learning_rate=schedule) for name, schedule in schedules.items()}
    experiment = dataclasses.replace(make_experiment(data_dir, variant="base"), log_every=1, **optimizers)
    (lines, _), _, _ = observe(experiment, workdir=tmp_path, strategy=mirrored(1))
    for tag, name in (("row_learning_rate", "row_optimizer"), ("learning_rate", "body_optimizer")):
        expected = [float(schedules[name](step)) for step in range(4)]
        assert len(set(expected)) == 4
        np.testing.assert_allclose([line[tag] for line in lines], expected, rtol=1e-6)
