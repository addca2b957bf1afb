"""What groups say about parameters: the first that says something decides, each thing by itself."""

import re

import keras
import pytest

from lmscale.parameters.activity import Always, Every, From, Never
from lmscale.parameters.groups import Clip, Group, Treatment, treat
from lmscale.parameters.update_rules import SGD, Adam

PATHS = [
    "tables/words/embedding",
    "tables/words/bias",
    "layers/lstm_0/kernel",
    "layers/lstm_0/recurrent_kernel",
    "layers/lstm_1/kernel",
    "layers/projection/kernel",
]
SGD_RULE, ADAM_RULE = SGD(learning_rate=0.1), Adam(learning_rate=0.01)
ZEROS, ONES = keras.initializers.Zeros(), keras.initializers.Ones()


def test_of_each_thing_the_first_group_that_says_it_decides():
    thaw, turns = From(step=7), Every(period=3)
    groups = [
        Group(pattern="layers/.*/recurrent_kernel", initializer=ONES),
        Group(pattern="layers/lstm_0/.*", active=thaw, initializer=ZEROS, clip_norm=2.0),
        Group(pattern="tables/.*/bias", update=ADAM_RULE, clip_norm=0.5),
        Group(pattern=".*", update=SGD_RULE),
        Group(pattern="layers/.*", active=turns, clip_norm=3.0),
    ]
    default = {"update": SGD_RULE, "active": None, "clip": None, "initializer": None, "group": ".*"}
    expected = {
        "tables/words/embedding": {},
        "tables/words/bias": {
            "update": ADAM_RULE,
            "clip": Clip("tables/.*/bias", 0.5),
            "group": "tables/.*/bias",
        },
        "layers/lstm_0/kernel": {
            "active": thaw,
            "initializer": ZEROS,
            "clip": Clip("layers/lstm_0/.*", 2.0),
        },
        "layers/lstm_0/recurrent_kernel": {
            "active": thaw,
            "initializer": ONES,
            "clip": Clip("layers/lstm_0/.*", 2.0),
        },
        "layers/lstm_1/kernel": {"active": turns, "clip": Clip("layers/.*", 3.0)},
        "layers/projection/kernel": {"active": turns, "clip": Clip("layers/.*", 3.0)},
    }
    treatments = treat(groups, PATHS)
    assert list(treatments) == PATHS
    for path, treatment in treatments.items():
        wanted = default | expected[path]
        assert isinstance(treatment, Treatment)
        for name in ("update", "clip", "initializer", "group"):
            assert getattr(treatment, name) == wanted[name], (path, name)
        if wanted["active"] is None:
            assert isinstance(treatment.active, Always), path
        else:
            assert treatment.active is wanted["active"], path


def test_the_whole_path_must_match():
    groups = [Group(pattern="layers/lstm", update=ADAM_RULE), Group(pattern=".*", update=SGD_RULE)]
    with pytest.raises(ValueError, match=r"whole path. Received: 'layers/lstm', which matches none"):
        treat(groups, PATHS)


def test_a_parameter_without_an_update_rule_is_refused():
    groups = [
        Group(pattern="tables/.*", update=SGD_RULE),
        Group(pattern="layers/lstm.*", update=SGD_RULE),
        Group(pattern="layers/.*", active=Every(period=2)),
    ]
    message = (
        "Received: none for layers/projection/kernel; the groups with an update rule are "
        "'tables/.*', 'layers/lstm.*'"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        treat(groups, PATHS)
    with pytest.raises(ValueError, match=r"Received: none for tables/words/embedding.*update rule are none"):
        treat([], PATHS)


@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("layers/lstm_0/recurent_kernel", "layers/lstm_0/recurrent_kernel"),
        ("table/words/embedding", "tables/words/embedding"),
        ("layers/projection/kernels", "layers/projection/kernel"),
    ],
)
def test_a_pattern_that_matches_nothing_lists_the_nearest_paths(pattern, near):
    groups = [Group(pattern=pattern, active=Never()), Group(pattern=".*", update=SGD_RULE)]
    message = f"Received: {pattern!r}, which matches none. Near: {near!r}"
    with pytest.raises(ValueError, match=re.escape(message)):
        treat(groups, PATHS)


def test_a_group_in_the_shadow_of_others_is_refused():
    groups = [
        Group(pattern="layers/.*", update=SGD_RULE, active=Every(period=2)),
        Group(pattern="layers/lstm_0/.*", active=Never()),
        Group(pattern="tables/.*", update=SGD_RULE),
    ]
    with pytest.raises(ValueError, match=r"must decide something.*'layers/lstm_0/\.\*', after groups"):
        treat(groups, PATHS)
    # In the other order it decides, and so it does if it says one thing more.
    assert isinstance(treat([groups[1], groups[0], groups[2]], PATHS)["layers/lstm_0/kernel"].active, Never)
    more = Group(pattern="layers/lstm_0/.*", active=Never(), clip_norm=1.0)
    treatment = treat([groups[0], more, groups[2]], PATHS)["layers/lstm_0/kernel"]
    assert (treatment.active, treatment.clip) == (groups[0].active, Clip("layers/lstm_0/.*", 1.0))


def test_what_is_never_active_needs_no_rule_and_keeps_none():
    frozen = Group(pattern="layers/lstm.*", active=Never(), initializer=ONES)
    others = Group(pattern="tables/.*|layers/projection/.*", update=SGD_RULE)
    without = treat([frozen, others], PATHS)
    with_rule = treat([frozen, Group(pattern=".*", update=SGD_RULE)], PATHS)
    for treatments in (without, with_rule):
        for path in ("layers/lstm_0/kernel", "layers/lstm_1/kernel"):
            treatment = treatments[path]
            assert treatment.update is None
            assert isinstance(treatment.active, Never)
            assert treatment.initializer is ONES
            assert treatment.group == "layers/lstm.*"
        assert treatments["layers/projection/kernel"].update is SGD_RULE


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pattern": "layers/(", "update": SGD_RULE}, "Received: 'layers/('"),
        ({"pattern": ".*"}, "Received: the group '.*' without any of update, active, clip_norm, initializer"),
        ({"pattern": "a", "clip_norm": 0.0}, "Received: clip_norm=0.0, of the group 'a'"),
        ({"pattern": "a", "clip_norm": float("nan")}, "Received: clip_norm=nan"),
    ],
)
def test_groups_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Group(**arguments)


def test_a_rule_of_parameters_that_a_wider_group_freezes_is_refused():
    """Of each thing the first group decides: without `active` of its own, the narrow group would not be updated."""
    narrow = {"pattern": "layers/lstm_0/kernel", "update": SGD(learning_rate=0.1)}
    wide = Group(pattern=".*", active=Never())
    with pytest.raises(ValueError, match=r"'layers/lstm_0/kernel', all of .* frozen by '\.\*'.*Always"):
        treat([Group(**narrow), wide], PATHS)
    treatments = treat([Group(**narrow, active=Always()), wide], PATHS)
    assert {path for path, t in treatments.items() if t.update} == {"layers/lstm_0/kernel"}
