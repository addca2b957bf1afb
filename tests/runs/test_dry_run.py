"""What a dry run reports is what a run then holds: each parameter, its slots, and what a step takes beside them."""

import dataclasses
import functools
import re

import keras
import numpy as np
import pytest
import tiny_runs
from array_parameters import array_parameters

from lmscale import dry_run
from lmscale.bodies.body import keras_body
from lmscale.bodies.lstm import lstm_body
from lmscale.checkpoints.directory import Checkpoints
from lmscale.data.token_files import PreparedData
from lmscale.experiment import Experiment
from lmscale.parameters.activity import From, Never
from lmscale.parameters.averages import Averaged
from lmscale.parameters.groups import Group
from lmscale.parameters.pretrained import PretrainedVectors
from lmscale.parameters.update_rules import SGD, Adagrad, RowWiseAdagrad
from lmscale.parameters.warm_start import WarmStart
from lmscale.softmax.full import FullSoftmax
from lmscale.softmax.sampled import SampledSoftmax
from lmscale.softmax.samplers import LogUniformSampler
from lmscale.tables.table_config import TableConfig
from lmscale.tasks.next_token import NextToken
from lmscale.trainer import Trainer

NUM_DEVICES = 3
INPUT_DIM, OUTPUT_DIM = 27, 40
TOKENS = 60 * 15  # Batch and window.
HEADS = {
    "full": FullSoftmax,
    "sampled": functools.partial(
        SampledSoftmax, sampler=functools.partial(LogUniformSampler, num_sampled=64)
    ),
}


@pytest.fixture(scope="module", params=HEADS)
def head(request):
    return request.param


@pytest.fixture(scope="module")
def experiment(data_dir, head):
    """Two tables, of which one has a frozen bias, and layers that thaw."""
    return Experiment(
        data_dir=str(data_dir),
        task=functools.partial(
            NextToken,
            tables={
                "into": TableConfig(embed_dim=INPUT_DIM, bias="none"),
                "out_of": TableConfig(embed_dim=OUTPUT_DIM, bias="log_frequency"),
            },
            inputs="into",
            outputs="out_of",
            body=functools.partial(lstm_body, num_layers=1, hidden_dim=OUTPUT_DIM + 1),
            head=HEADS[head],
            window=15,
        ),
        groups=[
            Group(pattern="tables/out_of/bias", active=Never()),
            Group(pattern="tables/into/.*", update=RowWiseAdagrad(learning_rate=0.1)),
            Group(pattern="tables/.*|layers/.*/kernel", update=Adagrad(learning_rate=0.1)),
            Group(pattern="layers/.*", update=SGD(learning_rate=0.1), active=From(step=1200)),
        ],
        train_steps=1,
        global_batch_size=60,
        seed=1,
        log_every=1,
        eval_every=1,
        save_every=1,
    )


@pytest.fixture
def report(experiment, capsys):
    dry_run.print_report(experiment, num_devices=NUM_DEVICES)
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def model(experiment, mirrored):
    data = PreparedData.open(experiment.data_dir)
    return Trainer(experiment, data=data, strategy=mirrored(NUM_DEVICES)).model


def held(model, path):
    """Bytes that the first device holds of a parameter and of its slots."""
    weights, slots = model.components(path)[0]
    return weights.numpy().nbytes, sum(slot.numpy().nbytes for slot in slots.values())


def cells(text):
    """{path: [other cells of its line]} of the parameter table; what goes on below, for want of room, put together."""
    rows = []
    for line in text.splitlines():
        row = [cell.strip() for cell in line.split("│")[1:-1]]
        if len(row) != 8:
            continue
        if row[6]:
            rows.append(row)
        elif rows:
            rows[-1] = [above + below for above, below in zip(rows[-1], row, strict=True)]
    return {row[0]: row[1:] for row in rows if row[0]}


def test_every_parameter_has_its_line(report, model):
    told = cells(report)
    parameters = {p.path: p for p in model.parameters() if not p.path.startswith("slots/")}
    assert told.keys() == parameters.keys()
    assert {path.split("/")[1] for path in told} == {"into", "out_of", "lstm_0", "projection"}
    for path, (shape, _, group, trained, where, mib, slots_mib) in told.items():
        assert shape == " x ".join(f"{n:,}" for n in parameters[path].shape)
        assert where == ("1/N of it" if path.startswith("tables/") else "a copy")
        if path.endswith("seed_generator_state"):
            assert (group, trained, mib, slots_mib) == ("", "", "0.00", "")
            continue
        treatment = model.treatments[path]
        weights, slots = held(model, path)
        assert (group, mib) == (treatment.group, f"{weights / 2**20:,.2f}")
        assert slots_mib == (f"{slots / 2**20:,.2f}" if slots else "")
        assert trained == {"always": "yes", "never": "no"}.get(repr(treatment.active), repr(treatment.active))
    initializer = told["tables/into/embedding"][1].replace(" ", "")
    assert initializer == "RandomUniform(minval=-0.19245,maxval=0.19245)"  # 27 ** -0.5
    assert told["tables/out_of/bias"][1:4] == ["log frequency", "tables/out_of/bias", "no"]
    assert told["layers/lstm_0/kernel"][2:4] == ["tables/.*|layers/.*/kernel", "from step 1,200"]
    assert all(re.search(rf"│ {path} *│", report) for path in told)


def test_memory_of_a_device(report, model, head):
    def mib(words, column=0):
        # The table of what moves, with an "in all" of its own, follows.
        line = next(line for line in report.splitlines() if re.search(rf"│ {words}", line))
        return float(line.split("│")[2 + column].strip().replace(",", "") or 0)

    def mib_of(kind, which):
        paths = [path for path in model.treatments if path.startswith(kind)]
        return sum(held(model, path)[which] for path in paths) / 2**20

    lasting = {
        "rows of the tables": mib_of("tables/", 0),
        "slots of the rows": mib_of("tables/", 1),
        "layers, a copy": mib_of("layers/", 0),
        "slots of the layers": mib_of("layers/", 1),
        # h and c of the one layer.
        "carried state": 2 * 4 * 60 // NUM_DEVICES * (OUTPUT_DIM + 1) / 2**20,
    }
    for words, expected in lasting.items():
        assert mib(words) == mib(words, 1) == mib(words, 2) == pytest.approx(expected, abs=0.006)
    own = TOKENS // NUM_DEVICES
    if head == "sampled":
        # The probabilities, the mean rows under them, the gradients of the label rows, and which candidates are the
        # label of a token, a byte each.
        expected = own * (64 * 4 + 2 * OUTPUT_DIM * 4 + 64) / 2**20
        assert mib("logits of the heads") == pytest.approx(expected, abs=0.006)
    else:
        # Of all tokens with every row of the shard, there twice for a moment; and a gradient of every row.
        rows = model.tables["out_of"].placement.allocated_rows
        gradient = rows * (OUTPUT_DIM + 1) * 4 / 2**20
        assert 2 * TOKENS * rows * 4 / 2**20 < mib("logits of the heads") - gradient
        assert mib("rows pulled") > gradient
    passing = ["rows pulled", "activations", "logits", "buffers", "messages", "what an update", "blocks"]
    for column in (1, 2):
        parts = [mib(words, column) for words in [*lasting, "batch and ids", *passing]]
        assert mib("in all", column) == pytest.approx(sum(parts), abs=0.08)
    assert mib("in all") == max(mib("in all", 1), mib("in all", 2))


def test_counts(report, model):
    num_parameters = sum(
        int(variable.shape.num_elements()) for variable in model.layers.trainable_variables.values()
    )
    num_parameters += tiny_runs.VOCAB_SIZE * (INPUT_DIM + OUTPUT_DIM + 1)
    padding = NUM_DEVICES * model.tables["into"].placement.allocated_rows - tiny_runs.VOCAB_SIZE
    text = " ".join(report.split())
    assert f"{num_parameters:,} parameters; vocabulary 5,003 rows, {padding} more as padding" in text
    assert f"{TOKENS} tokens a step" in text


@pytest.mark.parametrize("head", ["full"], indirect=True)
@pytest.mark.parametrize(
    "path", ["tables/into/embedding", "tables/out_of/bias", "layers/lstm_0/bias", "layers/projection/kernel"]
)
def test_an_initializer_that_a_run_would_refuse_is_refused(experiment, path):
    initializer = keras.initializers.Constant([1.0, 2.0])
    groups = [Group(pattern=path, initializer=initializer), *experiment.groups]
    with pytest.raises(ValueError, match=f"initializer of {path} must fill its shape"):
        dry_run.print_report(dataclasses.replace(experiment, groups=groups), num_devices=NUM_DEVICES)


@pytest.mark.parametrize("head", ["full"], indirect=True)
def test_an_average_that_a_run_would_refuse_is_refused(experiment):
    def body():
        return keras_body(layer=functools.partial(keras.layers.Dense, 5, kernel_constraint="non_neg"))

    groups = [Group(pattern=".*", update=Averaged(update=SGD(learning_rate=0.1)))]
    changed = dataclasses.replace(
        experiment,
        groups=groups,
        task=functools.partial(experiment.task.func, **experiment.task.keywords | {"body": body}),
    )
    with pytest.raises(ValueError, match="layers/dense_0/kernel, with NonNeg"):
        dry_run.print_report(changed, num_devices=NUM_DEVICES)


@pytest.mark.parametrize("head", ["full"], indirect=True)
def test_a_learning_rate_that_turns_negative_is_refused(experiment):
    decay = keras.optimizers.schedules.PolynomialDecay(0.1, decay_steps=9, end_learning_rate=-0.1)
    groups = [Group(pattern="layers/.*", update=SGD(learning_rate=decay)), *experiment.groups]
    # It passes zero between step 4 and step 5.
    for train_steps in (5, 6):
        changed = dataclasses.replace(experiment, groups=groups, train_steps=train_steps)
        if train_steps == 5:
            dry_run.print_report(changed, num_devices=NUM_DEVICES)
        else:
            with pytest.raises(
                ValueError, match=r"Received: -0\.01\d* at the last step, of the group 'layers/"
            ):
                dry_run.print_report(changed, num_devices=NUM_DEVICES)


@pytest.mark.parametrize("head", ["full"], indirect=True)
def test_what_a_run_would_start_from_must_be_there(experiment, tmp_path):
    missing = WarmStart(checkpoint=str(tmp_path / "gone"))
    with pytest.raises(ValueError, match="gone"):
        dry_run.print_report(dataclasses.replace(experiment, warm_start=missing), num_devices=NUM_DEVICES)
    path = "layers/projection/kernel"
    saved = array_parameters({path: np.ones([OUTPUT_DIM, OUTPUT_DIM], np.float32)})
    Checkpoints(tmp_path / "old" / "checkpoints").save(1, saved, metadata={})
    for rename, message in (
        (
            (path, "layers/gone/kernel"),
            f"renamed to layers/gone/kernel, is no parameter of the new run. .*{path}",
        ),
        ((path, path), rf"{path} must have one shape. .*\({OUTPUT_DIM + 1}, {OUTPUT_DIM}\) in the new run"),
    ):
        other = WarmStart(checkpoint=str(tmp_path / "old"), rename=[rename])
        with pytest.raises(ValueError, match=message):
            dry_run.print_report(dataclasses.replace(experiment, warm_start=other), num_devices=NUM_DEVICES)
    vectors = tmp_path / "vectors.txt"
    vectors.write_text("a 1 2 3\nb 4 5 6\n")
    tables = dict(experiment.task.keywords["tables"])
    tables["into"] = dataclasses.replace(tables["into"], pretrained=PretrainedVectors(path=str(vectors)))
    task = functools.partial(experiment.task.func, **experiment.task.keywords | {"tables": tables})
    with pytest.raises(ValueError, match=f"Received: 3 in the file, {INPUT_DIM} of the table"):
        dry_run.print_report(dataclasses.replace(experiment, task=task), num_devices=NUM_DEVICES)
