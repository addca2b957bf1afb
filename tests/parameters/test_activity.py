"""Activities against a loop over steps in plain Python."""

import re

import pytest
import tensorflow as tf

from lmscale.parameters.activity import Always, Every, From, Never

NUM_STEPS = 40


def every(period, offset, num_steps):
    """(activity, steps at which it is active): whole turns, and before step 0 the turn that is under way there."""
    turns = range(offset - period, NUM_STEPS, period)
    steps = {step for start in turns for step in range(start, start + num_steps)}
    return Every(period=period, offset=offset, num_steps=num_steps), steps


CASES = {
    "always": lambda: (Always(), set(range(NUM_STEPS))),
    "never": lambda: (Never(), set()),
    "from_0": lambda: (From(step=0), set(range(NUM_STEPS))),
    "from_1": lambda: (From(step=1), set(range(1, NUM_STEPS))),
    "from_17": lambda: (From(step=17), set(range(17, NUM_STEPS))),
    "from_beyond": lambda: (From(step=1000), set()),
    **{
        f"every_{period}_{offset}_{num_steps}": lambda p=period, o=offset, n=num_steps: every(p, o, n)
        for period in (1, 2, 3, 7)
        for offset in range(period)
        for num_steps in range(1, period + 1)
    },
}


@pytest.mark.parametrize("case", CASES)
def test_against_a_loop(case):
    activity, active = CASES[case]()
    expected = [step in active for step in range(NUM_STEPS)]

    @tf.function
    def of_step(step):
        return tf.convert_to_tensor(activity.at(step)), activity.num_active(step)

    seen = 0
    for step, is_active in enumerate(expected):
        at, num_active = of_step(tf.constant(step))
        assert bool(at) == is_active, step
        assert num_active.dtype == tf.int32
        if is_active:
            assert int(num_active) == seen, step
        seen += is_active


@pytest.mark.parametrize("num_steps", [1, 2])
def test_groups_take_turns(num_steps):
    period = 3 * num_steps
    groups = [
        Every(period=period, offset=offset, num_steps=num_steps) for offset in range(0, period, num_steps)
    ]
    for step in range(NUM_STEPS):
        whose = [bool(group.at(tf.constant(step))) for group in groups]
        assert whose == [i == step // num_steps % 3 for i in range(3)]


def test_far_into_a_run():
    step = 2_000_000_001
    activity = Every(period=7, offset=3, num_steps=2)
    assert bool(activity.at(tf.constant(step))) == ((step - 3) % 7 < 2)
    # Two in each whole period since the first turn, and those of this one. None is under way at step 0.
    whole, phase = divmod(step - 3, 7)
    assert int(activity.num_active(tf.constant(step))) == 2 * whole + min(phase, 2)


@pytest.mark.parametrize(
    ("activity", "text"),
    [
        (Always(), "always"),
        (Never(), "never"),
        (From(step=12_000), "from step 12,000"),
        (Every(period=4, offset=1), "1 of 4 steps, from 1"),
        (Every(period=4, num_steps=3), "3 of 4 steps, from 0"),
    ],
)
def test_text(activity, text):
    assert repr(activity) == text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"period": 0}, "period=0, offset=0, num_steps=1"),
        ({"period": 3, "offset": 3}, "period=3, offset=3"),
        ({"period": 3, "offset": -1}, "offset=-1"),
        ({"period": 3, "num_steps": 4}, "num_steps=4"),
        ({"period": 3, "num_steps": 0}, "num_steps=0"),
    ],
)
def test_turns_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Every(**arguments)


def test_a_step_before_the_first_is_refused():
    with pytest.raises(ValueError, match=re.escape("From.step=-1")):
        From(step=-1)
