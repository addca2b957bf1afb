"""Word vectors at tiny sizes: equal losses on any number of devices, exact resume, exact losses, gradients."""

import functools

import numpy as np
import pytest
import tensorflow as tf
import tiny_experiments
import tiny_families
import tiny_runs
from references import log_softmax

from lmscale.data.token_files import PreparedData
from lmscale.parameters.groups import Group
from lmscale.parameters.update_rules import SGD
from lmscale.softmax.full import FullSoftmax
from lmscale.softmax.negative_sampling import NegativeSampling
from lmscale.softmax.sampled import SampledSoftmax
from lmscale.softmax.samplers import UnigramSampler
from lmscale.tables.rows import Rows
from lmscale.tables.table_config import TableConfig
from lmscale.tasks.task import TaskContext
from lmscale.tasks.word2vec import CBOW, SkipGram
from lmscale.trainer import Trainer

NUM_STEPS = tiny_families.WORD2VEC["TRAIN_STEPS"]
# Only the order of float32 sums differs.
TOLERANCE = 1e-5
TAGS = {"quickstart_word2vec": "negative_sampling", "quickstart_cbow": "sampled"}


def train(config, *, workdir, strategy):
    tiny_runs.train_here(
        config.experiment,
        workdir=workdir,
        strategy=strategy,
        config_text=config.text,
        hparams=config.settings,
    )
    return workdir


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tiny_families.text(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="module", params=sorted(TAGS))
def runs(request, data_dir, mirrored, tmp_path_factory):
    """(name of a configuration, {devices: work directory})."""
    directory = tmp_path_factory.mktemp(request.param)
    found = {}
    for devices in (1, 2, 4):
        config = tiny_families.load(request.param, directory, DATA_DIR=str(data_dir))
        found[devices] = train(config, workdir=directory / f"on_{devices}", strategy=mirrored(devices))
    return request.param, found


@pytest.mark.parametrize("devices", [2, 4])
def test_losses_do_not_depend_on_the_devices(runs, devices):
    name, workdirs = runs
    tag = f"{TAGS[name]}_loss_nats"
    tags = {
        "train": (tag, "gradient_norm"),
        "eval": ("valid/exact_loss_nats", "probe/exact_loss_nats", f"probe/{tag}"),
    }
    for folder, of_folder in tags.items():
        one, other = (tiny_runs.metrics(workdirs[n], folder) for n in (1, devices))
        assert len(one) == len(other) == {"train": NUM_STEPS, "eval": 2}[folder]
        for tag in of_folder:
            values = [[line[tag] for line in lines] for lines in (other, one)]
            np.testing.assert_allclose(*values, rtol=TOLERANCE, err_msg=tag)


def test_a_run_that_stopped_goes_on_with_the_same_bits(runs, data_dir, mirrored, tmp_path):
    name, workdirs = runs
    workdir = tiny_runs.go_back(workdirs[2], tmp_path / "resumed", step=2)
    config = tiny_families.load(name, tmp_path, DATA_DIR=str(data_dir))
    train(config, workdir=workdir, strategy=mirrored(2))
    tiny_runs.assert_same_bits(
        tiny_runs.tensors(workdir, NUM_STEPS), tiny_runs.tensors(workdirs[2], NUM_STEPS)
    )
    lines = [tiny_runs.without_times(tiny_runs.metrics(w)) for w in (workdir, workdirs[2])]
    assert lines[0] == lines[1]


def test_exact_losses_are_those_of_every_pair(runs, data_dir):
    """The split again, pair by pair, in float64."""
    name, workdirs = runs
    data = PreparedData.open(data_dir)
    tensors = tiny_runs.tensors(workdirs[1], NUM_STEPS)
    inputs, outputs = (
        tensors[f"tables/{table}/embedding"].astype(np.float64) for table in ("words", "contexts")
    )
    lines, line = [], []
    for token in data.split("valid"):
        if token == data.eos_id:
            lines.append(line)
            line = []
        elif token != data.unk_id:
            line.append(int(token))
    losses = []
    for words in [*lines, line]:
        for i, word in enumerate(words):
            around = words[max(0, i - 5) : i] + words[i + 1 : i + 6]
            if name == "quickstart_word2vec":
                losses += list(-log_softmax(outputs @ inputs[word])[around])
            elif around:
                losses.append(-log_softmax(outputs @ inputs[around].mean(axis=0))[word])
    (*_, last) = tiny_runs.metrics(workdirs[1], "eval")
    assert last["valid/eval_tokens"] == len(losses)
    assert last["valid/exact_loss_nats"] == pytest.approx(np.mean(losses), rel=1e-5)


SAMPLER = functools.partial(UnigramSampler, num_sampled=16)
HEAD = functools.partial(NegativeSampling, sampler=SAMPLER)


def make(task, data_dir, *, head=HEAD, widths=(4, 4), **changes):
    context = TaskContext(
        data=PreparedData.open(data_dir),
        seed=1,
        global_batch_size=3,
        eval_batch_size=3,
        num_replicas=1,
        training=True,
    )
    tables = {
        name: TableConfig(embed_dim=width, bias="none")
        for name, width in zip(("words", "contexts"), widths, strict=True)
    }
    settings = {"tables": tables, "inputs": "words", "outputs": "contexts", "head": head}
    return task(context, **(settings | changes))


def test_cbow_is_the_mean_of_the_window_and_its_gradient(data_dir):
    task = make(CBOW, data_dir, window=3, chunk=11)
    features = {name: tf.constant(x) for name, x in task.training_batches().at(0).features.items()}
    rng = np.random.default_rng(0)
    table = rng.normal(size=[211, 4]).astype(np.float32)
    ids = task.lookups(features)["words"].ids.numpy()
    embedding, d_hidden = tf.constant(table[ids]), rng.normal(size=[33, 4]).astype(np.float32)
    with tf.GradientTape() as tape:
        tape.watch(embedding)
        (hidden,) = task.forward({"words": Rows(embedding)}, features, [], dropout=None)[0].values()
    gradient = tape.gradient(hidden, embedding, output_gradients=tf.constant(d_hidden))
    expected, d_expected, weights = np.zeros([33, 4]), np.zeros(embedding.shape), np.zeros([33])
    for example in range(3):
        for i in range(11):
            before, after = features["reach"][example, i].numpy()
            places = [3 + i + o for o in range(-before, after + 1) if o]
            for place in places:
                expected[example * 11 + i] += embedding[example, place].numpy() / len(places)
                d_expected[example, place] += d_hidden[example * 11 + i] / len(places)
            weights[example * 11 + i] = len(places) > 0
    np.testing.assert_allclose(hidden, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient, d_expected, rtol=1e-5, atol=1e-6)
    (labels,) = task.labels(features).values()
    np.testing.assert_array_equal(labels.ids, ids[:, 3:-3].reshape(-1))
    np.testing.assert_array_equal(labels.weights, weights)


def losses_of_tied(data_dir, strategy, *, parts):
    """Losses of three steps of a tied model with biases, by the sampled softmax, in so many micro-batches a device."""
    task = functools.partial(
        SkipGram,
        tables={"words": TableConfig(embed_dim=5, bias="zeros")},
        inputs="words",
        outputs="words",
        head=functools.partial(SampledSoftmax, sampler=SAMPLER),
        chunk=9,
        window=2,
    )
    experiment = tiny_experiments.experiment(
        task=task,
        global_batch_size=6,
        gradient_accumulation_steps=parts,
        groups=[Group(pattern=".*", update=SGD(learning_rate=0.3))],
        data_dir=str(data_dir),
    )
    trainer = Trainer(experiment, data=PreparedData.open(data_dir), strategy=strategy)
    metrics = [trainer.train_steps() for _ in range(3)]
    if trainer.traffic is not None:
        counted = trainer.traffic.bytes_received(trainer.model.exchanges)
        for part in ("rows", "row_gradients"):
            assert metrics[0][f"bytes_received/{part}"][0] == counted[part][0], part
    return [float(of_step["loss"][0]) for of_step in metrics]


def test_tied_with_biases_in_micro_batches(data_dir, mirrored):
    losses = losses_of_tied(data_dir, mirrored(1), parts=1)
    np.testing.assert_allclose(losses_of_tied(data_dir, mirrored(3), parts=2), losses, rtol=TOLERANCE)


@pytest.mark.parametrize("task", [SkipGram, CBOW])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("window", 2),
        ("chunk", 8),
        ("subsampling", None),
        ("subsampling", 0.01),
        ("dynamic_window", False),
        ("cross_lines", True),
    ],
)
def test_every_setting_changes_what_a_step_reads(data_dir, task, name, value):
    one, other = (
        make(task, data_dir, **changes).training_batches().at(3).features
        for changes in ({"chunk": 32}, {"chunk": 32, name: value})
    )
    assert any(
        one[feature].shape != other[feature].shape or np.any(one[feature] != other[feature])
        for feature in one
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head": FullSoftmax}, "must take several labels a word. Received: FullSoftmax"),
        ({"widths": (4, 5)}, "must have one width.*Received: embed_dim 4 of 'words', 5 of 'contexts'"),
        ({"inputs": "contexts"}, "The tables must be those that inputs and outputs name"),
    ],
)
def test_refused(data_dir, changes, message):
    with pytest.raises(ValueError, match=message):
        make(SkipGram, data_dir, **changes)
