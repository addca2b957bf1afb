"""Batches against their formulas, on token streams whose ids are their own positions."""

import collections
import itertools

import numpy as np
import pytest

from lmscale.data.batches import ContiguousBatches, EvaluationBatches, Prefetcher, ShuffledWindows


def epoch_of(batches, epoch):
    return [batches.at(epoch * batches.steps_per_epoch + w) for w in range(batches.steps_per_epoch)]


@pytest.mark.parametrize(
    ("num_tokens", "global_batch_size", "window"),
    [(11, 1, 10), (103, 1, 7), (103, 4, 5), (1009, 8, 3), (24, 8, 2), (70_001, 3, 64)],
)
class TestContiguousBatches:
    def test_formula(self, num_tokens, global_batch_size, window):
        batches = ContiguousBatches(
            np.arange(num_tokens), global_batch_size=global_batch_size, window=window, seed=5
        )
        lane_length = num_tokens // global_batch_size
        assert batches.steps_per_epoch == (lane_length - 1) // window
        for epoch in range(3):
            offset = batches.at(epoch * batches.steps_per_epoch).features["ids"][0, 0]
            for w, batch in enumerate(epoch_of(batches, epoch)):
                assert batch.features["ids"].shape == (global_batch_size, window + 1)
                assert batch.features["ids"].dtype == np.int32
                assert (batch.epoch, batch.starts_epoch) == (epoch, w == 0)
                expected = [
                    [(lane * lane_length + offset + w * window + i) % num_tokens for i in range(window + 1)]
                    for lane in range(global_batch_size)
                ]
                np.testing.assert_array_equal(batch.features["ids"], expected)

    def test_rows_go_on_where_they_ended(self, num_tokens, global_batch_size, window):
        batches = ContiguousBatches(
            np.arange(num_tokens), global_batch_size=global_batch_size, window=window, seed=0
        )
        for before, after in itertools.pairwise(epoch_of(batches, 1)):
            np.testing.assert_array_equal(before.features["ids"][:, -1], after.features["ids"][:, 0])

    def test_no_token_is_a_label_twice_in_an_epoch(self, num_tokens, global_batch_size, window):
        batches = ContiguousBatches(
            np.arange(num_tokens), global_batch_size=global_batch_size, window=window, seed=1
        )
        labels = np.concatenate([batch.features["ids"][:, 1:].ravel() for batch in epoch_of(batches, 2)])
        assert len(set(labels.tolist())) == len(labels)
        assert num_tokens - len(labels) < global_batch_size * (window + 1)


def test_contiguous_epochs_reach_every_token():
    batches = ContiguousBatches(np.arange(50), global_batch_size=3, window=7, seed=0)  # 42 labels per epoch
    seen = {
        label
        for epoch in range(20)
        for b in epoch_of(batches, epoch)
        for label in b.features["ids"][:, 1:].flat
    }
    assert seen == set(range(50))


def test_contiguous_offsets_are_uniform():
    batches = ContiguousBatches(np.arange(1000), global_batch_size=1, window=999, seed=3)
    offsets = np.array([batches.at(epoch).features["ids"][0, 0] for epoch in range(4000)])
    tenths = np.bincount(offsets // 100, minlength=10)
    standard_deviation = np.sqrt(400 * 0.9)  # Of a binomial count.
    assert np.abs(tenths - 400).max() < 5 * standard_deviation


@pytest.mark.parametrize("kind", [ContiguousBatches, ShuffledWindows])
def test_batch_is_a_pure_function_of_seed_and_step(kind):
    tokens = np.arange(5000) % 97
    steps = [0, 1, 40, 41, 42, 43, 10_000, 123_456_789]
    batches = kind(tokens, global_batch_size=5, window=23, seed=7)
    forwards = [batches.at(step).features["ids"] for step in steps]
    for step, expected in reversed(list(zip(steps, forwards, strict=True))):
        fresh = kind(tokens, global_batch_size=5, window=23, seed=7)
        np.testing.assert_array_equal(fresh.at(step).features["ids"], expected)
    other_seed = kind(tokens, global_batch_size=5, window=23, seed=8)
    assert not np.array_equal(other_seed.at(0).features["ids"], forwards[0])


def test_batches_stay_the_same_over_versions():
    """A run resumed under a new version must read on: these values are never to change."""
    contiguous = ContiguousBatches(np.arange(100), global_batch_size=2, window=3, seed=1)
    shuffled = ShuffledWindows(np.arange(100), global_batch_size=4, window=3, seed=1)
    assert contiguous.at(0).features["ids"].tolist() == [[43, 44, 45, 46], [93, 94, 95, 96]]
    assert contiguous.at(100).features["ids"].tolist() == [[11, 12, 13, 14], [61, 62, 63, 64]]
    assert shuffled.at(0).features["ids"][:, 0].tolist() == [21, 36, 12, 6]
    assert shuffled.at(100).features["ids"][:, 0].tolist() == [24, 27, 93, 63]


@pytest.mark.parametrize("num_windows", [1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 255, 256, 257, 1000])
def test_shuffled_windows_are_a_permutation_each_epoch(num_windows):
    batches = ShuffledWindows(np.arange(num_windows + 1), global_batch_size=1, window=1, seed=11)
    orders = [[int(b.features["ids"][0, 0]) for b in epoch_of(batches, epoch)] for epoch in range(3)]
    for order in orders:
        assert sorted(order) == list(range(num_windows))
    if num_windows > 15:
        assert orders[0] != orders[1] != orders[2] != orders[0]


def test_shuffled_orders_are_equally_likely():
    batches = ShuffledWindows(np.arange(4), global_batch_size=1, window=1, seed=0)
    orders = collections.Counter(
        tuple(int(b.features["ids"][0, 0]) for b in epoch_of(batches, epoch)) for epoch in range(1800)
    )
    assert len(orders) == 6
    assert all(abs(count - 300) < 5 * np.sqrt(300 * 5 / 6) for count in orders.values())


def test_shuffled_windows_are_consecutive_pieces_of_the_stream():
    num_tokens, global_batch_size, window = 1003, 6, 9  # 111 windows, 3 tokens beside them, 18 steps
    batches = ShuffledWindows(
        np.arange(num_tokens), global_batch_size=global_batch_size, window=window, seed=2
    )
    assert batches.steps_per_epoch == 18
    left_out = set()
    for epoch in range(4):
        rows = np.concatenate([batch.features["ids"] for batch in epoch_of(batches, epoch)])
        np.testing.assert_array_equal(rows, rows[:, :1] + np.arange(window + 1))
        starts = rows[:, 0]
        assert len(set(starts.tolist())) == len(starts) == 108
        assert len(set((starts % window).tolist())) == 1
        assert starts.min() >= 0
        assert rows.max() < num_tokens
        left_out.add(frozenset(range(111)) - frozenset((starts // window).tolist()))
        assert all(batch.starts_epoch and batch.epoch == epoch for batch in epoch_of(batches, epoch))
    assert len(left_out) == 4  # Other windows are left out in each epoch.


@pytest.mark.parametrize("num_tokens", [1, 2, 7, 97, 100])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 8, 101])
@pytest.mark.parametrize("window", [1, 3, 7, 50])
def test_evaluation_covers_every_token_once(num_tokens, batch_size, window):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 9, num_tokens).astype("<u2")
    batches = EvaluationBatches(tokens, batch_size=batch_size, window=window, eos_id=4)
    assert batches.num_labels == num_tokens
    all_batches = [batches.at(step).features for step in range(batches.num_steps)]
    for features in all_batches:
        assert features.keys() == {"ids", "weights"}
        assert (features["ids"].shape, features["ids"].dtype) == ((batch_size, window + 1), np.int32)
        assert (features["weights"].shape, features["weights"].dtype) == ((batch_size, window), np.float32)
    # Each batch goes on where the last one ended.
    for before, after in itertools.pairwise(all_batches):
        np.testing.assert_array_equal(before["ids"][:, -1], after["ids"][:, 0])

    # Read lane by lane, the weighted labels are the stream itself, each after the token before it.
    def lanes(arrays):
        return np.concatenate(list(arrays), axis=1).ravel()

    weights = lanes(f["weights"] for f in all_batches)
    inputs = lanes(f["ids"][:, :-1] for f in all_batches)
    labels = lanes(f["ids"][:, 1:] for f in all_batches)
    counted = weights == 1
    assert set(weights.tolist()) <= {0.0, 1.0}
    np.testing.assert_array_equal(labels[counted], tokens)
    np.testing.assert_array_equal(inputs[counted], [4, *tokens[:-1]])
    assert set(labels[~counted].tolist()) <= {4}


def test_evaluation_in_one_lane_needs_no_padding_but_at_the_end():
    batches = EvaluationBatches(np.array([3, 1, 2, 3, 1]), batch_size=1, window=3, eos_id=0)
    assert batches.num_steps == 2
    first, second = (batches.at(step) for step in range(2))
    assert first.features["ids"].tolist() == [[0, 3, 1, 2]]
    assert first.features["weights"].tolist() == [[1, 1, 1]]
    assert second.features["ids"].tolist() == [[2, 3, 1, 0]]
    assert second.features["weights"].tolist() == [[1, 1, 0]]
    assert (first.starts_epoch, second.starts_epoch) == (False, False)


@pytest.mark.parametrize("kind", [ContiguousBatches, ShuffledWindows])
def test_training_errors_name_what_was_received(kind):
    tokens = np.arange(20)
    with pytest.raises(ValueError, match=r"20 tokens, global_batch_size=4, window=6"):
        kind(tokens, global_batch_size=4, window=6, seed=0)
    kind(tokens, global_batch_size=4, window=4, seed=0)
    with pytest.raises(ValueError, match=r"window=0"):
        kind(tokens, global_batch_size=4, window=0, seed=0)
    with pytest.raises(ValueError, match=r"seed=-1"):
        kind(tokens, global_batch_size=4, window=4, seed=-1)
    with pytest.raises(ValueError, match=r"shape \(4, 5\)"):
        kind(tokens.reshape(4, 5), global_batch_size=2, window=1, seed=0)
    with pytest.raises(ValueError, match=r"step=-1"):
        kind(tokens, global_batch_size=4, window=4, seed=0).at(-1)


def test_evaluation_errors_name_what_was_received():
    with pytest.raises(ValueError, match="0 tokens"):
        EvaluationBatches(np.array([], np.int32), batch_size=1, window=1, eos_id=0)
    with pytest.raises(ValueError, match=r"0 \.\. 1\. Received: step=2"):
        EvaluationBatches(np.arange(4), batch_size=1, window=2, eos_id=0).at(2)


def test_prefetcher_reads_what_the_batches_are_whatever_is_asked_for_next():
    batches = ContiguousBatches(np.arange(103), global_batch_size=4, window=5, seed=5)
    prefetcher = Prefetcher(batches, steps_per_call=3)
    # In order, short calls, a jump back and one ahead, over ends of epochs.
    for first_step, num_steps in [(0, 3), (3, 3), (6, 1), (7, 2), (2, 3), (1000, 3)]:
        features, starts_epoch = prefetcher.batches(first_step, num_steps)
        assert features.keys() == {"ids"}
        assert features["ids"].shape == (3, 4, 6)
        assert features["ids"].dtype == np.int32
        for i in range(3):
            expected = batches.at(first_step + min(i, num_steps - 1))
            np.testing.assert_array_equal(features["ids"][i], expected.features["ids"])
            assert starts_epoch[i] == expected.starts_epoch


# ------------------------------------------------------------------------------------------------------- A lookahead


@pytest.mark.parametrize(
    ("num_tokens", "global_batch_size", "window"), [(103, 4, 5), (8, 2, 3), (1009, 3, 7)]
)
def test_shuffled_windows_with_a_lookahead(num_tokens, global_batch_size, window):
    settings = {"global_batch_size": global_batch_size, "window": window, "seed": 3}
    batches = ShuffledWindows(np.arange(num_tokens), lookahead=True, **settings)
    assert batches.steps_per_epoch == (num_tokens - 2) // window // global_batch_size
    for epoch in range(3):
        ids = np.concatenate([batch.features["ids"] for batch in epoch_of(batches, epoch)])
        # Consecutive tokens, never around the end of the text.
        np.testing.assert_array_equal(ids, ids[:, :1] + np.arange(window + 2))
        assert ids.max() < num_tokens
        labels = ids[:, 1:-1].ravel()
        assert len(set(labels.tolist())) == len(labels)


def test_a_text_too_short_for_a_lookahead_is_refused():
    settings = {"global_batch_size": 2, "window": 3, "seed": 0}
    ShuffledWindows(np.arange(7), **settings)
    with pytest.raises(ValueError, match=r"needs 8 tokens\. Received: 7 tokens"):
        ShuffledWindows(np.arange(7), lookahead=True, **settings)


@pytest.mark.parametrize(
    ("num_tokens", "batch_size", "window"), [(31, 1, 7), (31, 4, 3), (5, 8, 2), (24, 3, 8)]
)
def test_evaluation_batches_with_a_lookahead(num_tokens, batch_size, window):
    tokens, eos_id = np.arange(100, 100 + num_tokens), 7
    settings = {"batch_size": batch_size, "window": window, "eos_id": eos_id}
    plain = EvaluationBatches(tokens, **settings)
    batches = EvaluationBatches(tokens, lookahead=True, **settings)
    assert (batches.num_steps, batches.num_labels) == (plain.num_steps, num_tokens)
    seen = []
    for step in range(batches.num_steps):
        features, expected = batches.at(step).features, plain.at(step).features
        np.testing.assert_array_equal(features["weights"], expected["weights"])
        for ids, weights, plain_ids in zip(
            features["ids"], features["weights"], expected["ids"], strict=True
        ):
            labels = np.flatnonzero(weights) + 1
            np.testing.assert_array_equal(ids[labels], plain_ids[labels])
            for place in labels:
                is_last = ids[place] == tokens[-1]
                assert ids[place + 1] == (eos_id if is_last else ids[place] + 1)
            seen += ids[labels].tolist()
    assert sorted(seen) == tokens.tolist()
