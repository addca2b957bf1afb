"""Training by groups, through the step: what rests, thaws, takes turns, is clipped, and resumes."""

import functools
import itertools

import keras
import numpy as np
import pytest
import tiny_experiments
from tiny_experiments import (
    Text,
    assert_same,
    language_model,
    restore,
    sampled,
    untied,
    values,
)

from lmscale.bodies.lstm import lstm_body
from lmscale.checkpoints.directory import Checkpoints
from lmscale.parameters.activity import Always, Every, From, Never
from lmscale.parameters.groups import Group
from lmscale.parameters.update_rules import SGD, Adam
from lmscale.softmax.full import FullSoftmax
from lmscale.trainer import Trainer

REPLICAS = [1, 2, 3]
# Large, so that little of a gradient is lost where it is read off the weights that it has moved.
LEARNING_RATE = 32.0
PLAIN = SGD(learning_rate=LEARNING_RATE)
ADAM = {"learning_rate": 0.02, "beta_1": 0.8, "beta_2": 0.95, "epsilon": 1e-3}


def trainer(strategy, groups, *, tables=None, head=FullSoftmax, **changes):
    task = language_model(
        body=functools.partial(lstm_body, num_layers=2, hidden_dim=4, dropout=0.2),
        head=head,
        **(tables or {}),
    )
    experiment = tiny_experiments.experiment(task=task, groups=groups, **changes)
    return Trainer(experiment, data=Text(), strategy=strategy)


def train(run, num_steps):
    """(values before the first step and after each, metrics of each step)."""
    states, metrics = [values(run.parameters())], []
    for _ in range(num_steps):
        metrics.append({name: m[0].numpy() for name, m in run.train_steps().items()})
        states.append(values(run.parameters()))
    assert all(m["is_finite"] for m in metrics)
    return states, metrics


def of(state, prefix):
    """The part of {path: value} that concerns one parameter, or all below a path, with their slots."""
    return {path: v for path, v in state.items() if path.removeprefix("slots/").startswith(prefix)}


def some_move(before, after):
    return any(np.any(before[path] != after[path]) for path in before)


class NumpyAdam:
    """Adam by Kingma and Ba, Algorithm 1, in float64."""

    def __init__(self, weights, *, learning_rate, beta_1, beta_2, epsilon):
        self.weights = np.asarray(weights, np.float64)
        self.first = self.second = np.zeros(self.weights.shape)
        self.t, self.learning_rate = 0, learning_rate
        self.beta_1, self.beta_2, self.epsilon = beta_1, beta_2, epsilon

    def update(self, gradient):
        self.t += 1
        self.first = self.beta_1 * self.first + (1 - self.beta_1) * gradient
        self.second = self.beta_2 * self.second + (1 - self.beta_2) * gradient**2
        first, second = self.first / (1 - self.beta_1**self.t), self.second / (1 - self.beta_2**self.t)
        self.weights = self.weights - self.learning_rate * first / (np.sqrt(second) + self.epsilon)


@pytest.mark.parametrize("num_replicas", [1, 3])
@pytest.mark.parametrize(
    "pattern", ["layers/lstm_0/.*|tables/words/bias", "tables/words/embedding", "tables/.*"]
)
@pytest.mark.parametrize("head", [FullSoftmax, sampled()], ids=["full", "sampled"])
def test_what_is_never_active_keeps_its_bits_and_has_no_slots(mirrored, num_replicas, pattern, head):
    groups = [Group(pattern=pattern, active=Never()), Group(pattern=".*", update=Adam(**ADAM))]
    run = trainer(mirrored(num_replicas), groups, head=head)
    (before, *_, after), _ = train(run, 3)
    frozen = {path for path, t in run.model.treatments.items() if isinstance(t.active, Never)}
    trained = run.model.treatments.keys() - frozen
    assert frozen
    for path in frozen:
        np.testing.assert_array_equal(after[path], before[path], err_msg=path)
        assert not [name for name in after if name.startswith(f"slots/{path}/")]
    for path in trained:
        assert np.any(after[path] != before[path]), path


@pytest.mark.parametrize("num_replicas", [1, 3])
@pytest.mark.parametrize("prefix", ["layers/lstm_1/recurrent_kernel", "tables/words/embedding"])
def test_a_group_that_thaws_starts_as_at_step_0(mirrored, num_replicas, prefix):
    """Its bits are kept, slots too; then it moves as Adam from t = 1, by the gradients that plain descent shows.

    All else has the same history in both runs: it is frozen.
    """
    start, num_steps = 3, 6
    frozen = Group(pattern=".*", active=Never())
    thaw = Group(pattern=prefix, update=Adam(**ADAM), active=From(step=start))
    states, metrics = train(trainer(mirrored(num_replicas), [thaw, frozen]), num_steps)
    for state in states[1 : start + 1]:
        assert_same(of(state, prefix), of(states[0], prefix))
    assert [m["gradient_norm"] > 0 for m in metrics] == [step >= start for step in range(num_steps)]
    # A run that moves from here by its gradient alone tells it, at each of the active steps.
    peer = trainer(mirrored(num_replicas), [Group(pattern=prefix, update=PLAIN, active=Always()), frozen])
    adam = NumpyAdam(states[0][prefix], **ADAM)
    for step in range(start, num_steps):
        gradient = gradients_at(peer, states[step], step)[prefix]
        adam.update(gradient)
        np.testing.assert_allclose(states[step + 1][prefix], adam.weights, rtol=1e-5, atol=2e-6)
        if step == start:
            # Both moments, corrected for bias, are the gradient's own: t = 1.
            first = states[start][prefix] - ADAM["learning_rate"] * gradient / (
                np.abs(gradient) + ADAM["epsilon"]
            )
            np.testing.assert_allclose(states[step + 1][prefix], first, rtol=1e-5, atol=2e-6)
    assert np.abs(states[-1][prefix] - states[0][prefix]).max() > 0.01


def gradients_at(peer, state, step):
    """{path: gradient of a step, float64}, by one step of plain descent from the given values."""
    parameters = peer.parameters()
    restore([p for p in parameters if p.path in state and not p.path.startswith("slots/")], state)
    peer.step = step
    peer.train_steps()
    after = values(parameters)
    return {
        path: (state[path].astype(np.float64) - after[path]) / LEARNING_RATE for path in peer.model.treatments
    }


@pytest.mark.parametrize("num_replicas", [1, 3])
@pytest.mark.parametrize("prefix", ["layers/lstm_0/kernel", "tables/words/bias"])
def test_a_group_at_every_third_step_follows_adam_on_its_own_steps_alone(mirrored, num_replicas, prefix):
    period, offset, num_steps = 3, 1, 8
    groups = [
        Group(pattern=prefix, update=Adam(**ADAM), active=Every(period=period, offset=offset)),
        Group(pattern=".*", update=SGD(learning_rate=0.1)),
    ]
    states, _ = train(trainer(mirrored(num_replicas), groups), num_steps)
    peer = trainer(mirrored(num_replicas), [Group(pattern=".*", update=PLAIN)])
    adam = NumpyAdam(states[0][prefix], **ADAM)
    for step in range(num_steps):
        before, after = states[step], states[step + 1]
        assert some_move(of(before, "layers/lstm_1/"), of(after, "layers/lstm_1/"))
        if step % period != offset:
            assert_same(of(after, prefix), of(before, prefix))
            continue
        adam.update(gradients_at(peer, before, step)[prefix])
        np.testing.assert_allclose(after[prefix], adam.weights, rtol=1e-5, atol=3e-6)
        for name, moment in (("first_moment", adam.first), ("second_moment", adam.second)):
            slot = after[f"slots/{prefix}/{name}"].reshape(moment.shape)
            np.testing.assert_allclose(slot, moment, rtol=1e-3, atol=1e-7)
    assert adam.t == 3


@pytest.mark.parametrize("num_replicas", [1, 3])
def test_two_groups_take_turns(mirrored, num_replicas):
    def turn(i):
        return {"update": Adam(**ADAM), "active": Every(period=2, offset=i)}

    groups = [Group(pattern="tables/.*", **turn(0)), Group(pattern="layers/.*", **turn(1))]
    states, metrics = train(trainer(mirrored(num_replicas), groups), 5)
    for step, (before, after) in enumerate(itertools.pairwise(states)):
        moving, resting = ("tables/", "layers/") if step % 2 == 0 else ("layers/", "tables/")
        assert_same(of(after, resting), of(before, resting))
        for path in of(before, moving):
            if not path.startswith("slots/") and not path.endswith("/seed_generator_state"):
                assert np.any(before[path] != after[path]), (step, path)
    # The norm is that of the group whose turn it is.
    peer = trainer(mirrored(num_replicas), [Group(pattern=".*", update=PLAIN)])
    for step, metric in enumerate(metrics):
        moving = "tables/" if step % 2 == 0 else "layers/"
        gradients = of(gradients_at(peer, states[step], step), moving).values()
        expected = np.sqrt(sum(np.sum(g**2) for g in gradients))
        assert metric["gradient_norm"] == pytest.approx(expected, rel=1e-4)


def test_learning_rates_follow_the_step_of_the_run(mirrored):
    """A group that rests falls along its schedule all the same; its own clock would have it stay behind."""
    schedule = keras.optimizers.schedules.PolynomialDecay(1.0, 10, end_learning_rate=0.0)
    frozen = Group(pattern=".*", active=Never())
    prefix = "layers/lstm_0/bias"
    scheduled = Group(pattern=prefix, update=SGD(learning_rate=schedule), active=Every(period=3))
    run = trainer(mirrored(2), [scheduled, frozen])
    states, _ = train(run, 7)
    peer = trainer(mirrored(2), [Group(pattern=prefix, update=PLAIN, active=Always()), frozen])
    for step in (0, 3, 6):
        gradient = gradients_at(peer, states[step], step)[prefix]
        moved = states[step][prefix].astype(np.float64) - states[step + 1][prefix]
        np.testing.assert_allclose(moved, (1 - step / 10) * gradient, rtol=1e-3, atol=1e-6)
        assert run.learning_rates(step) == {prefix: pytest.approx(1 - step / 10)}


@pytest.mark.parametrize("num_replicas", [1, 3])
@pytest.mark.parametrize("clip_norm", [None, 0.003])
def test_a_group_is_clipped_by_its_own_bound_and_the_others_by_that_of_the_experiment(
    mirrored, num_replicas, clip_norm
):
    bound = 0.002
    groups = [
        Group(pattern="layers/lstm_.*", clip_norm=bound),
        Group(pattern="tables/words/bias", clip_norm=1e6),
        Group(pattern=".*", update=PLAIN),
    ]
    run = trainer(mirrored(num_replicas), groups, clip_norm=clip_norm)
    clipped, (metrics,) = train(run, 1)
    free, (free_metrics,) = train(trainer(mirrored(num_replicas), groups[-1:]), 1)
    assert_same(clipped[0], free[0])

    paths = list(run.model.treatments)

    def gradients(states):
        return {
            path: (states[0][path].astype(np.float64) - states[1][path]) / LEARNING_RATE for path in paths
        }

    def norm(of_paths, some):
        return np.sqrt(sum(np.sum(of_paths[path] ** 2) for path in some))

    lstms = [path for path in paths if path.startswith("layers/lstm_")]
    rest = [path for path in paths if path not in lstms and path != "tables/words/bias"]
    whole, short = gradients(free), gradients(clipped)
    assert norm(whole, lstms) > 2 * bound
    scale = dict.fromkeys(lstms, bound / norm(whole, lstms)) | {"tables/words/bias": 1}
    if clip_norm:
        assert norm(whole, rest) > 2 * clip_norm
        assert norm(short, rest) == pytest.approx(clip_norm, rel=1e-3)
    scale |= dict.fromkeys(rest, clip_norm / norm(whole, rest) if clip_norm else 1)
    assert norm(short, lstms) == pytest.approx(bound, rel=1e-2)
    for path in paths:
        np.testing.assert_allclose(short[path], scale[path] * whole[path], rtol=1e-3, atol=3e-7, err_msg=path)
    # What is logged is the norm before clipping, of everything.
    assert metrics["gradient_norm"] == pytest.approx(free_metrics["gradient_norm"], rel=1e-6)
    assert metrics["gradient_norm"] == pytest.approx(norm(whole, paths), rel=1e-4)


def everything():
    """Groups of every kind, over an untied model."""
    falling = keras.optimizers.schedules.CosineDecay(0.05, decay_steps=12)
    return [
        Group(pattern="tables/outputs/bias", active=From(step=2), clip_norm=0.05),
        Group(pattern="tables/inputs/.*", active=Every(period=3, offset=1, num_steps=2)),
        Group(
            pattern="layers/lstm_0/.*", active=Every(period=2), initializer=keras.initializers.Orthogonal()
        ),
        Group(pattern="layers/projection/.*", active=Never()),
        Group(pattern="tables/.*", update=Adam(learning_rate=0.02, beta_1=0.0, epsilon=1e-3)),
        Group(pattern="layers/.*", update=Adam(learning_rate=falling, weight_decay=0.1, epsilon=1e-3)),
    ]


def run_of_everything(strategy, *, head):
    groups = everything()
    # Orthogonal is for matrices: the bias keeps what the layer says.
    groups.insert(0, Group(pattern="layers/lstm_0/bias", initializer=keras.initializers.Ones()))
    return trainer(
        strategy, groups, tables=untied(input_dim=5, output_dim=7), head=head, clip_norm=0.2, steps_per_call=3
    )


@pytest.mark.parametrize("head", [FullSoftmax, sampled()], ids=["full", "sampled"])
def test_any_number_of_devices_gives_the_same_losses(mirrored, head):
    results = []
    for num_replicas in REPLICAS:
        run = run_of_everything(mirrored(num_replicas), head=head)
        states, metrics = train(run, 8)
        results.append(([m["loss"] for m in metrics], [m["gradient_norm"] for m in metrics], states[-1]))
    losses, norms, last = results[0]
    assert len(set(losses)) == len(losses)
    for other_losses, other_norms, other_last in results[1:]:
        # Sums over devices in another order.
        np.testing.assert_allclose(other_losses, losses, rtol=1e-5)
        np.testing.assert_allclose(other_norms, norms, rtol=1e-4)
        for path, value in last.items():
            np.testing.assert_allclose(other_last[path], value, rtol=1e-3, atol=1e-4, err_msg=path)


@pytest.mark.parametrize("num_replicas", [1, 2])
def test_resuming_amid_a_schedule_is_bit_exact(mirrored, num_replicas, tmp_path):
    through = run_of_everything(mirrored(num_replicas), head=sampled())
    first = run_of_everything(mirrored(num_replicas), head=sampled())
    for run in (through, first):
        run.train_steps(3)
        run.train_steps(2)
    Checkpoints(tmp_path).save(5, first.parameters(), metadata={})
    again = run_of_everything(mirrored(num_replicas), head=sampled())
    metadata = Checkpoints(tmp_path).restore(again.parameters())
    again.step = metadata["step"]
    assert again.step == 5
    assert_same(values(again.parameters()), values(through.parameters()))
    for num_steps in (3, 1, 3):
        expected, actual = through.train_steps(num_steps), again.train_steps(num_steps)
        for name, value in expected.items():
            np.testing.assert_array_equal(actual[name], value, err_msg=name)
    assert_same(values(again.parameters()), values(through.parameters()))
