"""Histories: what is held out, by hand; windows that predict each item once; lines that are refused."""

import collections
import itertools

import numpy as np
import pytest

from lmscale.data.columns import Lists, PreparedColumns
from lmscale.data.histories import LeaveLastOut, prepare_histories
from lmscale.data.history_batches import EveryWindow, HistoryWindows, TargetBatches

EVENTS = [
    *(("ann", item) for item in "abcabd"),
    *(("bob", item) for item in "bd"),  # Too few for targets.
    *(("cy", item) for item in "acz"),
    ("ann", "e"),
    *(("dee", item) for item in "bbbbq"),
]


def prepared(tmp_path, name="out", *, text=None, **rule):
    path = tmp_path / "events.txt"
    path.write_text("".join(f"{user} {item}\n" for user, item in EVENTS) if text is None else text)
    return prepare_histories([path], output=tmp_path / name, rule=LeaveLastOut(**rule))


def words(data, split):
    items = data.vocabularies["items"].tokens
    history = data.column(split, "history")
    found = [
        "".join(items[i] for i in history.values[start:stop])
        for start, stop in zip(history.offsets[:-1], history.offsets[1:], strict=True)
    ]
    if split == "train":
        return found
    return list(zip(found, (items[i] for i in data.column(split, "target")), strict=True))


def test_the_last_items_are_targets(tmp_path):
    data, made = prepared(tmp_path)
    assert made
    assert words(data, "train") == ["abcab", "bd", "a", "bbb"]
    assert words(data, "valid") == [("abcab", "d"), ("a", "c"), ("bbb", "b")]
    assert words(data, "test") == [("abcabd", "e"), ("ac", "z"), ("bbbb", "q")]
    items = data.vocabularies["items"]
    counts = collections.Counter("abcabbdabbb")
    # By falling count in the training, then by name; those of targets alone have rows, too.
    assert list(zip(items.tokens, items.counts, strict=True)) == [
        *sorted(counts.items(), key=lambda item: (-item[1], item[0])),
        *((item, 0) for item in "eqz"),
    ]
    assert data.manifest["splits"]["valid"]["targets_never_trained_on"] == 0
    assert data.manifest["splits"]["test"]["targets_never_trained_on"] == 3


def test_few_users_for_validation(tmp_path):
    data, _ = prepared(tmp_path, valid_users=1)
    (history,) = words(data, "valid")
    assert history in [("abcab", "d"), ("a", "c"), ("bbb", "b")]
    kept = {("abcab", "d"): "abcabd", ("a", "c"): "ac", ("bbb", "b"): "bbbb"}
    expected = ["abcabd", "bd", "ac", "bbbb"]
    expected[expected.index(kept[history])] = history[0]
    assert words(data, "train") == expected
    assert words(data, "test") == [("abcabd", "e"), ("ac", "z"), ("bbbb", "q")]


def test_the_same_again(tmp_path):
    first, _ = prepared(tmp_path)
    again, made = prepared(tmp_path)
    assert not made
    assert again.fingerprint == first.fingerprint
    other, _ = prepared(tmp_path, "other")
    assert other.fingerprint == first.fingerprint
    with pytest.raises(ValueError, match="holds other data: leave_last_out is"):
        prepared(tmp_path, valid_users=2)
    path = first.directory / "column.train.history.values.bin"
    path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(ValueError, match=r"column\.train\.history\.values\.bin: must have .* damaged"):
        PreparedColumns.open(first.directory)


@pytest.mark.parametrize(
    ("text", "rule", "message"),
    [
        ("ann a\nann b c\n", {}, r"line 2: 'ann b c', of 3 fields"),
        ("ann a\n\n", {}, r"line 2: '', of 0 fields"),
        ("ann a\nann b\n", {}, "A user at least must have 3 items. Received: 1 users"),
        (None, {"valid_users": 4}, "valid_users must be at most .* Received: valid_users=4, 3 such"),
        (None, {"valid_users": 0}, "valid_users must be at least 1"),
    ],
)
def test_refused(tmp_path, text, rule, message):
    with pytest.raises(ValueError, match=message):
        prepared(tmp_path, text=text, **rule)
    assert not (tmp_path / "out").exists()


def some_lists(seed=0, most=23, size=57):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, most, size)
    return Lists(rng.integers(0, 99, lengths.sum()), np.concatenate([[0], np.cumsum(lengths)]))


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.uint32, np.int64])
def test_padded_lists(dtype):
    """Of whatever type files of ids have."""
    lists = some_lists()
    lists = Lists(lists.values.astype(dtype), lists.offsets)
    rows = np.array([3, 0, 56, 3])
    for length in (1, 5, 40):
        for i, found in zip(rows, lists.padded(rows, length, padding=-7), strict=True):
            own = lists.values[lists.offsets[i] : lists.offsets[i + 1]][-length:]
            np.testing.assert_array_equal(found, [*own, *[-7] * (length - len(own))])


@pytest.mark.parametrize(("window", "batch_size"), [(1, 7), (5, 3), (16, 10)])
def test_windows_predict_each_item_once(window, batch_size):
    """In an epoch, but for those of a last part of a batch; each from all items before it in its window."""
    lists = some_lists()
    batches = HistoryWindows(lists, global_batch_size=batch_size, window=window, seed=3)
    expected = collections.Counter()
    for i in range(len(lists)):
        own = lists.values[lists.offsets[i] : lists.offsets[i + 1]].tolist()
        expected.update(itertools.pairwise(own))
    found = collections.Counter()
    for step in range(batches.steps_per_epoch):
        batch = batches.at(step)
        assert batch.features["ids"].shape == (batch_size, window + 1)
        for ids, weights in zip(*(batch.features[name] for name in ("ids", "weights")), strict=True):
            count = int(weights.sum())
            assert (weights == [1] * count + [0] * (window - count)).all()
            assert count > 0
            found.update(zip(ids[:count].tolist(), ids[1 : count + 1].tolist(), strict=True))
        np.testing.assert_array_equal(
            batches.at(step, slice(1, 3)).features["ids"], batch.features["ids"][1:3]
        )
    assert not found - expected
    assert sum(expected.values()) - sum(found.values()) < batch_size * window
    other_order = batches.at(batches.steps_per_epoch)
    assert (other_order.epoch, batches.at(0).epoch) == (1, 0)
    assert (other_order.features["ids"] != batches.at(0).features["ids"]).any()


@pytest.mark.parametrize("limit", [None, 1, 100, 10**6])
def test_every_window_counts_each_item_once(limit):
    lists = some_lists()
    batches = EveryWindow(lists, batch_size=7, window=5, limit=limit)
    pairs = [
        pair
        for start, stop in itertools.pairwise(lists.offsets)
        for pair in itertools.pairwise(lists.values[start:stop].tolist())
    ]
    assert batches.num_labels == min(len(pairs), limit or len(pairs))
    found = []
    for step in range(batches.num_steps):
        features = batches.at(step).features
        assert features["ids"].shape == (7, 6)
        for ids, weights in zip(features["ids"], features["weights"], strict=True):
            found += [(int(ids[i]), int(ids[i + 1])) for i in np.flatnonzero(weights)]
    assert len(found) == batches.num_labels
    if limit is None:
        assert collections.Counter(found) == collections.Counter(pairs)
    else:
        assert not collections.Counter(found) - collections.Counter(pairs)


def test_too_few_windows():
    with pytest.raises(ValueError, match="as many windows as a batch"):
        HistoryWindows(some_lists(), global_batch_size=10_000, window=5, seed=0)


def test_no_window():
    with pytest.raises(ValueError, match=r"two items or more.* Received: 3 histories of at most one"):
        HistoryWindows(Lists(np.arange(2), np.array([0, 1, 1, 2])), global_batch_size=1, window=5, seed=0)


def test_targets():
    lists = some_lists(seed=1)
    targets = np.arange(len(lists))
    batches = TargetBatches(lists, targets, batch_size=10, window=6, longest_seen=22)
    assert (batches.num_labels, batches.num_steps) == (57, 6)
    seen = []
    for step in range(batches.num_steps):
        features = batches.at(step).features
        for i in range(10):
            if not features["weights"][i]:
                continue
            user = features["target"][i]
            own = lists.values[lists.offsets[user] : lists.offsets[user + 1]]
            count = features["last"][i] + 1
            assert count == max(1, min(6, len(own)))
            np.testing.assert_array_equal(features["ids"][i][: min(6, len(own))], own[-6:])
            assert features["seen"][i][features["seen"][i] >= 0].tolist() == own.tolist()
            seen.append(user)
    assert seen == list(range(57))
    without = TargetBatches(lists, targets, batch_size=10, window=6, longest_seen=0)
    assert "seen" not in without.at(0).features
