"""Products in float16: what the loss scale saves, what it leaves out, and that it is state like any other."""

import dataclasses
import functools

import numpy as np
import pytest
import tensorflow as tf
import tiny_experiments
import tiny_runs
from faulty_losses import FaultySoftmax
from tiny_experiments import Text, language_model, one_rule, values

from lmscale import keras_settings
from lmscale.bodies.lstm import lstm_body
from lmscale.checkpoints.directory import Checkpoints
from lmscale.loss_scaling import LARGEST_SCALE, LossScale, LossScaling, unscaled
from lmscale.parameters.update_rules import SGD, Adam
from lmscale.run import NonFiniteError
from lmscale.softmax.sampled import SampledSoftmax
from lmscale.softmax.samplers import LogUniformSampler
from lmscale.trainer import Trainer

BODY = functools.partial(lstm_body, num_layers=2, hidden_dim=7)
SAMPLER = functools.partial(LogUniformSampler, num_sampled=11)
STATE = {"state/loss_scale", "state/good_steps"}


@pytest.fixture(autouse=True)
def keras_as_before():
    """Who builds an experiment sets Keras's policy for the process."""
    yield
    keras_settings.reset(seed=0)


class Small(SampledSoftmax):
    """A loss whose gradients are those of the sampled softmax, times `factor`."""

    def __init__(self, *, factor, **arguments):
        super().__init__(sampler=SAMPLER, **arguments)
        self._factor = factor

    def value_and_gradients(self, hidden, *, loss_weights, **arguments):
        return super().value_and_gradients(hidden, loss_weights=loss_weights * self._factor, **arguments)


def experiment(*, compute_dtype="float16", head=None, growth_steps=2000, initial_scale=2.0**15, **changes):
    scaling = LossScaling(initial_scale=initial_scale, growth_steps=growth_steps)
    settings = {"groups": one_rule(SGD(learning_rate=1.0))} | changes
    return tiny_experiments.experiment(
        task=language_model(body=BODY, head=head or functools.partial(SampledSoftmax, sampler=SAMPLER)),
        compute_dtype=compute_dtype,
        loss_scaling=scaling if compute_dtype == "float16" else None,
        **settings,
    )


def trainer(strategy, **settings):
    return Trainer(experiment(**settings), data=Text(), strategy=strategy)


def first_step(strategy, **settings):
    """(metrics of a step of plain gradient descent with rate 1, {path: what it subtracted})."""
    run = trainer(strategy, **settings)
    weights = [parameter for parameter in run.model.parameters() if parameter.trainable]
    before = values(weights)
    metrics = {name: x.numpy()[0] for name, x in run.train_steps().items()}
    after = values(weights)
    return metrics, {path: before[path] - after[path] for path in before}


def relative_error(actual, expected):
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


# ------------------------------------------------------------------------------------------------ The rule by itself


@pytest.mark.parametrize("num_replicas", [1, 3])
def test_the_scale_follows_the_rule(mirrored, num_replicas):
    """Against a few lines of Python, over a course that meets the floor, the ceiling and a loss that is not finite."""
    strategy = mirrored(num_replicas)
    with strategy.scope():
        scale = LossScale(LossScaling(initial_scale=4.0, growth_steps=3))

    @tf.function
    def step(loss_is_finite, gradient_is_finite):
        def one():
            before = scale.read()
            overflowed = scale.update(loss_is_finite=loss_is_finite, gradient_is_finite=gradient_is_finite)
            return before, overflowed

        return [strategy.experimental_local_results(x) for x in strategy.run(one)]

    rng = np.random.default_rng(0)
    course = [(True, False)] * 4 + [(bool(rng.random() < 0.9), bool(rng.random() < 0.8)) for _ in range(60)]
    course += [(True, True)] * 90
    expected, count, seen = 4.0, 0, set()
    for loss_is_finite, gradient_is_finite in course:
        before, overflowed = step(tf.constant(loss_is_finite), tf.constant(gradient_is_finite))
        assert {float(x) for x in before} == {expected}
        helps = loss_is_finite and not gradient_is_finite and expected > 1
        assert {bool(x) for x in overflowed} == {helps}
        if loss_is_finite and gradient_is_finite:
            count += 1
            if count == 3:
                expected, count = min(2 * expected, LARGEST_SCALE), 0
        else:
            count = 0
            expected = expected / 2 if helps else expected
        seen.add(expected)
    assert {1.0, LARGEST_SCALE} <= seen


def test_unscaling_is_exact():
    gradients = {"a": tf.constant([2.0**-24], tf.float16), "b": None, "c": tf.constant([3e-30, np.inf])}
    result = unscaled(gradients, tf.constant(2.0**15))
    assert result["b"] is None
    assert result["a"].dtype == tf.float32
    assert result["a"].numpy().tolist() == [2.0**-39]  # Of which float16 knows nothing.
    np.testing.assert_array_equal(result["c"], np.array([3e-30, np.inf], np.float32) / 2**15)


@pytest.mark.parametrize("scale", [0.5, 3.0, 2.0**25, float("nan")])
def test_scales_that_would_round_are_refused(scale):
    with pytest.raises(ValueError, match=r"power of two from 1 to 2\*\*24"):
        LossScaling(initial_scale=scale)


def test_settings_that_would_scale_nothing_are_refused(mirrored):
    with pytest.raises(ValueError, match="growth_steps must be at least 1"):
        LossScaling(growth_steps=0)
    with pytest.raises(ValueError, match="loss_scaling must be None unless"):
        dataclasses.replace(experiment(), compute_dtype="bfloat16")
    head = functools.partial(SampledSoftmax, sampler=SAMPLER, compute_dtype="float16")
    with pytest.raises(ValueError, match="of the whole experiment"):
        trainer(mirrored(1), compute_dtype="float32", head=head)


# -------------------------------------------------------------------------------------------- Values and gradients


@pytest.fixture(scope="module")
def float32_step(mirrored):
    """float32_step(**settings): `first_step` on one device, once."""

    @functools.cache
    def step(**settings):
        return first_step(mirrored(1), compute_dtype="float32", **settings)

    return step


@pytest.mark.parametrize("exchange", ["rows", "hidden"])
@pytest.mark.parametrize(("num_replicas", "parts"), [(1, 1), (3, 1), (2, 2)])
def test_a_step_is_that_of_float32_up_to_rounding(mirrored, float32_step, num_replicas, parts, exchange):
    """The scale, too, is 2**15 in every number of devices and parts."""
    changes = {"gradient_accumulation_steps": parts, "global_batch_size": 12}
    head = functools.partial(SampledSoftmax, sampler=SAMPLER, exchange=exchange)
    metrics, updates = first_step(mirrored(num_replicas), head=head, **changes)
    exact, expected = float32_step(global_batch_size=12)
    assert metrics["loss_scale"] == 2.0**15
    assert not metrics["overflowed"]
    # float16 has 11 bits; the loss is of rounded rows and states.
    assert 1e-9 < abs(metrics["loss"] / exact["loss"] - 1) < 1e-4
    assert metrics["gradient_norm"] == pytest.approx(exact["gradient_norm"], rel=2e-3)
    for path, update in expected.items():
        assert updates[path].dtype == np.float32, path
        assert relative_error(updates[path], update) < 5e-3, path
        # Not to have rounded at all would be a test of nothing. Biases have no products.
        assert path.endswith("/bias") or relative_error(updates[path], update) > 1e-5, path


def test_small_gradients_vanish_without_a_scale_and_not_with_one(mirrored):
    """Of a loss of 1e-6 times the usual: float16 has nothing between 0 and 6e-8."""
    head = functools.partial(Small, factor=1e-6)
    layers = "layers/lstm_0/recurrent_kernel"
    # What is subtracted would be lost in weights of 0.1.
    rule = {"groups": one_rule(SGD(learning_rate=1e6))}
    _, expected = first_step(mirrored(2), compute_dtype="float32", head=head, **rule)
    _, without = first_step(mirrored(2), head=head, initial_scale=1.0, **rule)
    _, scaled = first_step(mirrored(2), head=head, initial_scale=2.0**24, **rule)
    assert np.abs(expected[layers]).max() > 1e-4
    assert not without[layers].any()
    for path, update in expected.items():
        assert relative_error(scaled[path], update) < 1e-2, path


def test_too_large_a_scale_halves_until_it_fits(mirrored):
    """No step is applied, and nothing else moves, until then; and then the run learns."""
    head = functools.partial(Small, factor=1e4)
    run = trainer(mirrored(2), head=head, initial_scale=2.0**24, groups=one_rule(SGD(learning_rate=1e-5)))
    scales, is_good, losses = [], [], []
    for _ in range(24):
        before = values(run.parameters())
        metrics = {name: x.numpy()[0] for name, x in run.train_steps().items()}
        after = values(run.parameters())
        assert metrics["overflowed"] != metrics["is_finite"]
        changed = {path for path in before if np.any(before[path] != after[path])}
        if metrics["overflowed"]:
            assert changed <= STATE
            assert "state/loss_scale" in changed
        else:
            assert {"tables/words/embedding", "layers/lstm_0/kernel", "state/0"} <= changed
        scales.append(metrics["loss_scale"])
        is_good.append(metrics["is_finite"])
        losses.append(metrics["loss"])
    first_good = is_good.index(True)
    assert 2 <= first_good <= 20
    for scale, good, next_scale in zip(scales, is_good, scales[1:], strict=False):
        assert next_scale == (scale if good else scale / 2)
    # At the edge of what fits, a step now and then does not.
    assert np.mean(is_good[first_good:]) > 0.5
    assert losses[-1] < losses[first_good]


# ------------------------------------------------------------------------------------------------------- Whole runs


def run(workdir, strategy, *, data_dir, head=None, **changes):
    settings = {
        "data_dir": str(data_dir),
        "groups": one_rule(Adam(learning_rate=0.01)),
        "train_steps": 8,
        "growth_steps": 2,
        "initial_scale": 2.0**12,
        "eval_every": 8,
        "probe_tokens": 0,
        "keep_checkpoints": 10,
        "eval_batch_size": 20,
    }
    tiny_runs.train_here(experiment(head=head, **(settings | changes)), workdir=workdir, strategy=strategy)
    return tiny_runs.metrics(workdir)


FAULT = functools.partial(FaultySoftmax, sampler=SAMPLER, place="d_hidden", fault="inf")


@pytest.fixture(scope="module")
def whole(data_dir, mirrored, tmp_path_factory):
    """A run of 8 steps on 2 devices that overflows at the fourth step."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    run(workdir, mirrored(2), data_dir=data_dir, head=functools.partial(FAULT, bad_steps=(3,)))
    return workdir


def test_an_overflow_is_no_bad_step(whole):
    """With on_bad_step = 'stop', the default: it goes on, with half the scale, and doubles it after two good steps."""
    lines = tiny_runs.metrics(whole)
    top = 2.0**13
    scales = [line["loss_scale"] / top for line in lines]
    assert scales == [0.5, 0.5, 1, 1, 0.5, 0.5, 1, 1]
    assert [line["overflowed_steps"] for line in lines] == [0, 0, 0, 1, 0, 0, 0, 0]
    assert {line["skipped_steps"] for line in lines} == {0}
    assert [line["sampled_loss_nats"] is None for line in lines] == [n == 3 for n in range(8)]
    fourth, third = tiny_runs.tensors(whole, 4), tiny_runs.tensors(whole, 3)
    assert fourth.keys() >= STATE
    for path in fourth.keys() - STATE:
        np.testing.assert_array_equal(fourth[path], third[path], err_msg=path)


@pytest.mark.parametrize("step", [3, 5])
def test_a_resumed_run_ends_with_the_same_bits(whole, mirrored, tmp_path, data_dir, step):
    """From the step before the overflow, and from the middle of two good steps."""
    assert tiny_runs.tensors(whole, 5)["state/good_steps"] == 1
    workdir = tiny_runs.go_back(whole, tmp_path / "resumed", step=step)
    run(workdir, mirrored(2), data_dir=data_dir, head=functools.partial(FAULT, bad_steps=(3,)))
    tiny_runs.assert_same_bits(tiny_runs.tensors(workdir, 8), tiny_runs.tensors(whole, 8))


def test_several_steps_in_a_call_have_the_same_bits(whole, mirrored, tmp_path, data_dir):
    head = functools.partial(FAULT, bad_steps=(3,))
    lines = run(
        tmp_path, mirrored(2), data_dir=data_dir, head=head, steps_per_call=5, log_every=8, save_every=8
    )
    tiny_runs.assert_same_bits(tiny_runs.tensors(tmp_path, 8), tiny_runs.tensors(whole, 8))
    assert [(line["overflowed_steps"], line["loss_scale"]) for line in lines] == [(1, 2.0**13)]


@pytest.mark.parametrize(("devices", "parts"), [(1, 1), (3, 2)])
def test_devices_and_parts_change_nothing_but_rounding(whole, mirrored, tmp_path, data_dir, devices, parts):
    head = functools.partial(FAULT, bad_steps=(3,))
    lines = run(tmp_path, mirrored(devices), data_dir=data_dir, head=head, gradient_accumulation_steps=parts)
    expected = tiny_runs.metrics(whole)
    for tag in ("loss_scale", "overflowed_steps"):
        assert [line[tag] for line in lines] == [line[tag] for line in expected], tag
    for line, wanted in zip(lines, expected, strict=True):
        if wanted["sampled_loss_nats"] is not None:
            assert line["sampled_loss_nats"] == pytest.approx(wanted["sampled_loss_nats"], rel=1e-3)


def test_a_gradient_that_no_scale_helps_is_a_bad_step_at_the_floor(data_dir, mirrored, tmp_path):
    head = functools.partial(FAULT, bad_steps=range(8))
    with pytest.raises(NonFiniteError, match="not finite at step 3: loss"):
        run(tmp_path / "stop", mirrored(1), data_dir=data_dir, head=head, initial_scale=4.0)
    assert Checkpoints(tmp_path / "stop" / "checkpoints").steps() == [1, 2]
    assert [line["loss_scale"] for line in tiny_runs.metrics(tmp_path / "stop")] == [4, 2]
    lines = run(
        tmp_path / "skip",
        mirrored(1),
        data_dir=data_dir,
        head=head,
        initial_scale=4.0,
        on_bad_step="skip",
    )
    assert [line["skipped_steps"] for line in lines] == [0, 0, 1, 2, 3, 4, 5, 6]
    assert lines[-1]["loss_scale"] == 1


def test_a_loss_that_is_not_finite_is_a_bad_step_at_once(data_dir, mirrored, tmp_path):
    """It is computed without the scale."""
    head = functools.partial(FaultySoftmax, sampler=SAMPLER, place="loss", fault="nan", bad_steps=(1,))
    with pytest.raises(NonFiniteError, match="not finite at step 2: loss nan"):
        run(tmp_path, mirrored(1), data_dir=data_dir, head=head)


def test_other_products_have_no_scale(mirrored):
    for dtype in ("float32", "bfloat16"):
        narrow = trainer(mirrored(1), compute_dtype=dtype)
        assert not STATE & {p.path for p in narrow.parameters()}
        assert "loss_scale" not in narrow.train_steps()
