"""Chunks of words against word2vec's rules, written out word by word."""

import numpy as np
import pytest

from lmscale.data import word_chunks
from lmscale.data.word_chunks import ConsecutiveChunks, WordChunks, keep_probabilities, word_stream

EOS, UNK, VOCAB_SIZE = 1, 3, 40


def text(num_tokens=2003, seed=0):
    """Ids with short lines, some without a word."""
    rng = np.random.default_rng(seed)
    ids = np.minimum(rng.geometric(0.1, num_tokens) - 1, VOCAB_SIZE - 1)
    ids[rng.uniform(size=num_tokens) < 0.1] = EOS
    return ids.astype(np.uint16)


def batches(tokens, **changes):
    settings = {
        "counts": np.bincount(tokens, minlength=VOCAB_SIZE),
        "no_words": {UNK, EOS},
        "eos_id": EOS,
        "global_batch_size": 6,
        "chunk": 7,
        "window": 3,
        "subsampling": 0.02,
        "dynamic_window": True,
        "cross_lines": False,
        "seed": 5,
    }
    return WordChunks(tokens, **(settings | changes))


def stream(tokens, *, keep=None, cross_lines=False, dynamic_window=True, window=3, epoch=0, seed=5):
    if keep is None:
        keep = np.ones([VOCAB_SIZE])
        keep[[UNK, EOS]] = 0
    return word_stream(
        tokens,
        keep=keep,
        eos_id=EOS,
        window=window,
        dynamic_window=dynamic_window,
        cross_lines=cross_lines,
        seed=seed,
        epoch=epoch,
    )


@pytest.mark.parametrize("cross_lines", [False, True])
def test_windows_are_cut_after_words_have_left_and_end_with_the_line(cross_lines):
    tokens = text()
    found = stream(tokens, cross_lines=cross_lines, dynamic_window=False)
    lines = [[]]
    for token in tokens:
        if token == EOS and not cross_lines:
            lines.append([])
        elif token not in (UNK, EOS):
            lines[-1].append(token)
    np.testing.assert_array_equal(found.ids, np.concatenate(lines))
    expected = [(min(i, 3), min(len(line) - 1 - i, 3)) for line in lines for i in range(len(line))]
    np.testing.assert_array_equal(found.reach, expected)


def test_radii_are_uniform_and_windows_no_wider():
    tokens = np.zeros([200_000], np.int32)
    found = stream(tokens, window=4, cross_lines=True)
    inner = found.reach[4:-4]
    np.testing.assert_array_equal(inner[:, 0], inner[:, 1])
    shares = np.bincount(inner[:, 0], minlength=5)[1:] / len(inner)
    np.testing.assert_allclose(shares, 0.25, atol=0.005)  # Five standard deviations.


def test_words_stay_as_often_as_word2vec_keeps_them():
    counts = np.array([700_000, 0, 200_000, 0, 99_000, 1000])
    keep = keep_probabilities(counts, subsampling=0.01)
    ratio = 0.01 / (counts[[0, 2, 4]] / 1e6)
    np.testing.assert_allclose(
        keep,
        [
            *(np.sqrt(ratio) + ratio)[:1],
            0,
            (np.sqrt(ratio) + ratio)[1],
            0,
            *([(np.sqrt(ratio) + ratio)[2], 1]),
        ],
    )
    tokens = np.repeat(np.arange(6), counts)
    found = stream(tokens, keep=keep, cross_lines=True)
    kept = np.bincount(found.ids, minlength=6)
    deviation = np.sqrt(counts * keep * (1 - keep))
    assert np.all(np.abs(kept - counts * keep) <= 5 * deviation)
    assert kept[5] == 1000
    assert np.all(keep_probabilities(counts, subsampling=None) == (counts > 0))


def test_the_stream_does_not_depend_on_how_it_is_read(monkeypatch):
    tokens, keep = text(), np.full([VOCAB_SIZE], 0.7)
    keep[EOS] = 0
    whole = stream(tokens, keep=keep)
    monkeypatch.setattr(word_chunks, "_BLOCK", 56)
    parts = stream(tokens, keep=keep)
    np.testing.assert_array_equal(parts.ids, whole.ids)
    np.testing.assert_array_equal(parts.reach, whole.reach)


def test_streams_of_other_epochs_and_seeds_differ():
    keep = np.full([VOCAB_SIZE], 0.7)
    streams = [stream(text(), keep=keep, epoch=e, seed=s) for e, s in ((0, 5), (1, 5), (0, 6))]
    assert len({s.ids.tobytes() for s in streams}) == 3
    assert len({s.reach.tobytes() for s in streams}) == 3


def test_a_batch_is_a_function_of_the_step_and_examples_can_be_read_alone():
    tokens = text()
    one, other = batches(tokens), batches(tokens)
    for step in (0, 3, one.steps_per_epoch, 2 * one.steps_per_epoch + 1, 1):
        whole = one.at(step)
        assert whole.epoch == step // one.steps_per_epoch
        assert whole.features["ids"].shape == (6, 7 + 2 * 3)
        assert whole.features["reach"].shape == (6, 7, 2)
        for examples in (slice(0, 2), slice(2, 6)):
            part = other.at(step, examples)
            for name, x in whole.features.items():
                np.testing.assert_array_equal(part.features[name], x[examples])


def test_an_epoch_reads_every_word_about_once_and_each_with_its_own_window():
    tokens = text(20_011)
    made = batches(tokens, subsampling=None)
    whole = made.stream(1)
    padded = np.concatenate([np.zeros([3], np.int32), whole.ids, np.zeros([3], np.int32)])
    examples = {
        padded[i : i + 13].tobytes() + whole.reach[i : i + 7].tobytes() for i in range(len(whole.ids) - 6)
    }
    seen = 0
    for step in range(made.steps_per_epoch, 2 * made.steps_per_epoch):
        features = made.at(step).features
        for ids, reach in zip(features["ids"], features["reach"], strict=True):
            assert ids.tobytes() + reach.astype(np.uint8).tobytes() in examples
            seen += 7
    # Whole batches, nearly as few as there may be.
    assert len(whole.ids) <= seen < len(whole.ids) + made.labels_per_step
    assert made.words_per_epoch == len(whole.ids)


def test_chunks_come_in_a_new_order_each_epoch():
    made = batches(np.arange(VOCAB_SIZE).repeat(50).astype(np.int32), subsampling=None, cross_lines=True)
    first = [made.at(e * made.steps_per_epoch).features["ids"][:, 3] for e in range(2)]
    assert np.any(first[0] != first[1])
    assert np.any(np.diff(first[0]) < 0)


@pytest.mark.parametrize("batch_size", [1, 4, 1000])
def test_evaluations_read_every_word_once(batch_size):
    found = stream(text(503), dynamic_window=False)
    made = ConsecutiveChunks(found, batch_size=batch_size, chunk=7, window=3, num_labels=1)
    features = [made.at(step).features for step in range(made.num_steps)]
    ids = np.concatenate([f["ids"][:, 3:-3].reshape(-1) for f in features])
    reach = np.concatenate([f["reach"].reshape(-1, 2) for f in features])
    np.testing.assert_array_equal(ids[: len(found.ids)], found.ids)
    np.testing.assert_array_equal(reach[: len(found.ids)], found.reach)
    assert not reach[len(found.ids) :].any()
    with pytest.raises(ValueError, match=f"step must be in 0 .. {made.num_steps - 1}"):
        made.at(made.num_steps)


def test_a_text_shorter_than_a_chunk():
    tokens = np.array([5, 6, EOS, 7], np.int32)
    made = batches(tokens, subsampling=None, global_batch_size=2)
    assert made.steps_per_epoch == 1
    features = made.at(0).features
    assert features["ids"][0, 3:6].tolist() == [5, 6, 7]
    assert features["reach"][0, 3:].sum() == 0
    assert features["reach"][0, :3].tolist() == [[0, 1], [1, 0], [0, 0]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 0}, "window must be at least 1. Received: window=0"),
        ({"window": 256}, "window must be in 1 .. 255. Received: window=256"),
        ({"chunk": 0}, "chunk must be at least 1. Received: chunk=0"),
        ({"subsampling": 0.0}, "subsampling must be in .*Received: subsampling=0.0"),
        (
            {"no_words": set(range(VOCAB_SIZE))},
            "must have words. Received: 2,003 tokens, none of them a word",
        ),
    ],
)
def test_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        batches(text(), **changes)


def test_negative_step_is_refused():
    with pytest.raises(ValueError, match=r"step must be at least 0. Received: step=-1"):
        batches(text()).at(-1)
