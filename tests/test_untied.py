"""An untied model's step against a dense computation in float64: the loss and every gradient."""

import dataclasses
import functools

import numpy as np
import pytest
import tensorflow as tf
import tiny_experiments
from references import log_softmax, lstm
from tiny_experiments import Text, language_model, untied, values

from lmscale.bodies.lstm import lstm_body
from lmscale.parameters.groups import Group
from lmscale.parameters.update_rules import SGD, RowWiseAdagrad
from lmscale.softmax.full import FullSoftmax
from lmscale.softmax.sampled import SampledSoftmax
from lmscale.softmax.samplers import InBatchSampler, LogUniformSampler
from lmscale.tables.rows import Rows
from lmscale.tables.table import ShardedTable
from lmscale.trainer import Trainer

VOCAB_SIZE, INPUT_DIM, OUTPUT_DIM, HIDDEN_DIM, BATCH, WINDOW = 31, 3, 5, 4, 6, 4
HEADS = {
    "full": FullSoftmax,
    # Every class once: the full softmax again, by way of labels, candidates and a push of rows.
    "sampled": functools.partial(
        SampledSoftmax,
        sampler=functools.partial(LogUniformSampler, num_sampled=VOCAB_SIZE, replacement=False),
    ),
    "in_batch": functools.partial(SampledSoftmax, sampler=InBatchSampler),
}


class NarrowLabelGradients(SampledSoftmax):
    """Returns bfloat16 for the rows of labels alone."""

    def value_and_gradients(self, hidden, **arguments):
        result = super().value_and_gradients(hidden, **arguments)
        rows = result.d_label_rows
        return dataclasses.replace(result, d_label_rows=Rows(tf.cast(rows.embedding, tf.bfloat16), rows.bias))


def trainer(strategy, *, head, groups, input_dim=None):
    task = language_model(
        body=functools.partial(lstm_body, num_layers=1, hidden_dim=HIDDEN_DIM),
        head=HEADS[head],
        window=WINDOW,
        input_dim=input_dim,
        **untied(input_dim=INPUT_DIM, output_dim=OUTPUT_DIM),
    )
    experiment = tiny_experiments.experiment(task=task, groups=groups, global_batch_size=BATCH)
    ids = np.random.default_rng(2).integers(0, VOCAB_SIZE - 1, 151)  # The last word never occurs.
    run = Trainer(experiment, data=Text(vocab_size=VOCAB_SIZE, ids=ids), strategy=strategy)
    # Far from where they start, so that no gradient is small; the state of the body too.
    rng = np.random.default_rng(1)
    for parameter in run.parameters():
        if parameter.path.startswith(("tables/", "layers/", "state/")) and "seed" not in parameter.path:
            parameter.write(0, rng.normal(scale=0.7, size=parameter.shape).astype(np.float32))
    run.step = 1  # Of the first epoch, not its first: the state is carried.
    assert not run.batches.at(1).starts_epoch
    return run


def loss(parameters, ids, *, counts, head):
    """Mean cross-entropy of the model's definition, from {path: float64 array}.

    In-batch: over the label and every other label of the batch that differs, as often as it occurs, logits less the log
    of how often that was to be expected.
    """
    p = parameters
    x = p["tables/inputs/embedding"][ids[:, :-1]]
    if "layers/input_projection/kernel" in p:
        x = x @ p["layers/input_projection/kernel"]
    weights = {name: p[f"layers/lstm_0/{name}"] for name in ("kernel", "recurrent_kernel", "bias")}
    hidden, _, _ = lstm(x, **weights, h=p["state/0"], c=p["state/1"])
    hidden = hidden @ p["layers/projection/kernel"]
    logits = hidden @ p["tables/outputs/embedding"].T + p["tables/outputs/bias"]
    labels = ids[:, 1:]
    if head == "in_batch":
        smoothed = np.maximum(counts, 1.0)
        logits = logits - np.log(labels.size * smoothed / smoothed.sum())
        times = np.bincount(labels.ravel(), minlength=VOCAB_SIZE)
        # The label itself once, whatever it occurs elsewhere.
        times = np.where(np.arange(VOCAB_SIZE) == labels[..., np.newaxis], 1, times)
        with np.errstate(divide="ignore"):
            weighted = logits + np.log(times)
        chosen = np.take_along_axis(logits, labels[..., np.newaxis], axis=-1)[..., 0]
        return np.mean(np.log(np.exp(weighted).sum(axis=-1)) - chosen)
    return -np.mean(np.take_along_axis(log_softmax(logits), labels[..., np.newaxis], axis=-1))


def gradient(parameters, path, loss):
    """By central differences in float64, element by element: the error is about 1e-10."""
    result = np.zeros(parameters[path].shape)
    for index in np.ndindex(result.shape):
        ends = []
        for size in (-1e-5, 1e-5):
            moved = parameters[path].copy()
            moved[index] += size
            ends.append(loss({**parameters, path: moved}))
        result[index] = (ends[1] - ends[0]) / 2e-5
    return result


@pytest.mark.parametrize("num_replicas", [1, 2, 3])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("input_dim", [None, 6])
def test_loss_and_all_gradients(mirrored, num_replicas, head, input_dim):
    """With a learning rate of 1, a step of plain descent moves each weight by its gradient."""
    run = trainer(
        mirrored(num_replicas),
        head=head,
        groups=[Group(pattern=".*", update=SGD(learning_rate=1.0))],
        input_dim=input_dim,
    )
    before = {p: v.astype(np.float64) for p, v in values(run.parameters()).items() if v.dtype == np.float32}
    ids = run.batches.at(1).features["ids"]
    metrics = {name: m[0].numpy() for name, m in run.train_steps().items()}
    after = values(run.parameters())
    loss_of = functools.partial(loss, ids=ids, counts=run.data.counts, head=head)
    assert metrics["loss"] == pytest.approx(loss_of(before), rel=2e-6)
    assert metrics["loss/next"] == metrics["loss"]
    squares = 0.0
    paths = set(run.model.treatments)
    assert paths == {path for path in before if path.startswith(("tables/", "layers/"))}
    for path in sorted(paths):
        expected = gradient(before, path, loss_of)
        # Differences of float32 weights of order 1.
        np.testing.assert_allclose(before[path] - after[path], expected, rtol=1e-5, atol=5e-7, err_msg=path)
        assert np.abs(expected).max() > 1e-3, path
        squares += np.sum(expected**2)
    assert metrics["gradient_norm"] == pytest.approx(np.sqrt(squares), rel=1e-5)
    touched = len(np.unique(ids[:, :-1]))
    assert metrics["rows_touched/inputs"].sum() == touched < VOCAB_SIZE
    assert metrics["rows_touched/outputs"].sum() == (
        len(np.unique(ids[:, 1:])) if head == "in_batch" else VOCAB_SIZE
    )


@pytest.mark.parametrize("num_replicas", [1, 3])
@pytest.mark.parametrize("head", HEADS)
def test_each_table_by_its_own_rule(mirrored, num_replicas, head):
    """Rows that no input names stay; those of the outputs move by row-wise Adagrad, slots of each table apart."""
    groups = [
        Group(pattern="tables/inputs/.*", update=SGD(learning_rate=0.25)),
        Group(pattern="tables/outputs/.*", update=RowWiseAdagrad(learning_rate=0.5, epsilon=1e-3)),
        Group(pattern="layers/.*", update=SGD(learning_rate=2.0)),
    ]
    run = trainer(mirrored(num_replicas), head=head, groups=groups)
    state = values(run.parameters())
    before = {p: v.astype(np.float64) for p, v in state.items() if v.dtype == np.float32}
    ids = run.batches.at(1).features["ids"]
    loss_of = functools.partial(loss, ids=ids, counts=run.data.counts, head=head)
    run.train_steps()
    after = values(run.parameters())
    slots = {path for path in after if path.startswith("slots/")}
    assert slots == {f"slots/tables/outputs/{name}/accumulator" for name in ("embedding", "bias")}
    for path in run.model.treatments:
        d = gradient(before, path, loss_of)
        if path.startswith("tables/outputs/"):
            squares = d**2 if d.ndim == 1 else np.mean(d**2, axis=1)
            accumulator = 0.1 + squares
            np.testing.assert_allclose(after[f"slots/{path}/accumulator"], accumulator, rtol=1e-5)
            scale = 0.5 / (np.sqrt(accumulator) + 1e-3)
            expected = before[path] - (scale if d.ndim == 1 else scale[:, np.newaxis]) * d
        else:
            expected = before[path] - (0.25 if path.startswith("tables/") else 2.0) * d
        np.testing.assert_allclose(after[path], expected, rtol=1e-5, atol=1e-6, err_msg=path)
    unread = np.setdiff1d(np.arange(VOCAB_SIZE), ids[:, :-1])
    assert len(unread)
    name = "tables/inputs/embedding"
    np.testing.assert_array_equal(after[name][unread], state[name][unread])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"inputs": "input"}, r"inputs='input'.*missing: input; not used: inputs"),
        ({"outputs": "inputs"}, r"outputs='inputs'.*not used: outputs\."),
        ({"input_dim": INPUT_DIM}, r"input_dim=3, embed_dim=3"),
        (
            {"inputs": "outputs", "outputs": "inputs"},
            r"bias='zeros' of the table 'outputs'. Set its TableConfig\.bias = 'none'",
        ),
    ],
)
def test_tables_that_do_not_fit_are_refused(mirrored, names, message):
    task = language_model(**{**untied(input_dim=INPUT_DIM, output_dim=OUTPUT_DIM), **names})
    with pytest.raises(ValueError, match=message):
        Trainer(tiny_experiments.experiment(task=task), data=Text(), strategy=mirrored(1))


@pytest.mark.parametrize("num_replicas", [1, 3])
def test_in_batch_asks_for_no_row_twice(mirrored, num_replicas, monkeypatch):
    """The labels' rows are those of the candidates: the table of outputs is asked for the batch's labels, once."""
    asked = []
    pull = ShardedTable.pull

    def spy(table, ids, shared_ids):
        asked.append((table.embed_dim, ids.shape[0], shared_ids.shape[0]))
        return pull(table, ids, shared_ids)

    monkeypatch.setattr(ShardedTable, "pull", spy)
    run = trainer(
        mirrored(num_replicas), head="in_batch", groups=[Group(pattern=".*", update=SGD(learning_rate=1.0))]
    )
    run.train_steps()
    tokens = BATCH * WINDOW
    assert set(asked) == {(INPUT_DIM, tokens // num_replicas, 0), (OUTPUT_DIM, 0, tokens)}


def test_gradients_of_in_batch_rows_may_be_narrow(mirrored, monkeypatch):
    """Of labels in bfloat16, of candidates in float32: their sum is that of float32, up to bfloat16's rounding."""
    monkeypatch.setitem(HEADS, "narrow", functools.partial(NarrowLabelGradients, sampler=InBatchSampler))
    moved = {}
    for head in ("in_batch", "narrow"):
        run = trainer(mirrored(1), head=head, groups=[Group(pattern=".*", update=SGD(learning_rate=1.0))])
        before = values(run.parameters())
        run.train_steps()
        moved[head] = (
            values(run.parameters())["tables/outputs/embedding"] - before["tables/outputs/embedding"]
        )
    difference = np.abs(moved["narrow"] - moved["in_batch"]).max()
    assert 0 < difference < 2**-8 * np.abs(moved["in_batch"]).max()
