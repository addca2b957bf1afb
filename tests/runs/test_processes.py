"""A run in several processes is the run of one: the same losses, the same checkpoints, whoever wrote them."""

import dataclasses

import numpy as np
import pytest
import tiny_runs

from lmscale import configuration
from lmscale.checkpoints.directory import Checkpoints
from lmscale.data.token_files import PreparedData
from lmscale.trainer import Trainer

NUM_PROCESSES = (2, 4)
TRAIN_STEPS, SAVE_EVERY = 12, 4
RTOL = 1e-6
# Word counts that no number of processes divides; state, dropout and sampling, a rule with slots of two kinds.
SETTINGS = tiny_runs.TINY_MACROS | {
    "TRAIN_STEPS": TRAIN_STEPS,
    "SAVE_EVERY": SAVE_EVERY,
    "EVAL_EVERY": 6,
    "LOG_EVERY": 2,
}


@dataclasses.dataclass(frozen=True)
class Runs:
    """Work directories by (number of processes, devices of each), and the checkpoint that went from hand to hand."""

    workdirs: dict
    handed_on: list  # of (who restored and saved it, checkpoints folder), the first who wrote it


def bindings(data_dir):
    return [f"DATA_DIR = {str(data_dir)!r}", *(f"{name} = {value!r}" for name, value in SETTINGS.items())]


@pytest.fixture(scope="module")
def runs(data_dir, mirrored, tmp_path_factory):
    directory = tmp_path_factory.mktemp("processes")
    config = configuration.load([str(tiny_runs.QUICKSTART)], bindings(data_dir))
    workdirs = {}
    for num_devices in (1, *NUM_PROCESSES):
        workdirs[1, num_devices] = directory / f"on_{num_devices}_devices"
        tiny_runs.train_here(
            config.experiment, workdir=workdirs[1, num_devices], strategy=mirrored(num_devices)
        )
    source = workdirs[1, 1] / "checkpoints"
    handed_on = [("one device", source)]
    for size in NUM_PROCESSES:
        workdirs[size, 1] = directory / f"in_{size}_processes"
        target = directory / f"saved_by_{size}"
        todo = {
            "config": str(tiny_runs.QUICKSTART),
            "bindings": bindings(data_dir),
            "train": str(workdirs[size, 1]),
            "convert": [[str(source), str(target)]],
        }
        tiny_runs.finish_in_processes(size, [todo], log=directory / f"log_{size}")
        handed_on.append((f"{size} processes", target))
        source = target
    # And back, to one process with a number of devices that is none of those.
    target = directory / "saved_by_3_devices"
    trainer = Trainer(config.experiment, data=PreparedData.open(data_dir), strategy=mirrored(3))
    metadata = Checkpoints(source, readonly=True).restore(trainer.parameters())
    Checkpoints(target).save(metadata.pop("step"), trainer.parameters(), metadata={})
    handed_on.append(("three devices", target))
    return Runs(workdirs=workdirs, handed_on=handed_on)


@pytest.mark.parametrize("size", NUM_PROCESSES)
def test_losses_equal_those_of_one_process(runs, size):
    for name in ("train", "eval"):
        lines = tiny_runs.without_times(tiny_runs.metrics(runs.workdirs[size, 1], name))
        for reference in ((1, 1), (1, size)):
            expected = tiny_runs.without_times(tiny_runs.metrics(runs.workdirs[reference], name))
            assert len(lines) == len(expected) == {"train": TRAIN_STEPS // 2, "eval": 2}[name]
            for line, other in zip(lines, expected, strict=True):
                of_numbers = {tag for tag in other if not tag.startswith("rows_touched/")}
                assert any(tag.endswith("_loss_nats") for tag in of_numbers)
                for tag in of_numbers - {"probe/sampled_minus_exact_nats"}:
                    assert line[tag] == pytest.approx(other[tag], rel=RTOL), (tag, line["step"])
                if reference == (
                    1,
                    size,
                ):  # As many shards: even the rows that each has touched are told alike.
                    assert {**line, **{tag: other[tag] for tag in of_numbers}} == other


def test_hidden_states_travel_between_processes(data_dir, mirrored, tmp_path):
    """As few tokens as here make it the way that moves less; it loses what rows that travel lose."""
    steps, name = 4, "sampled.SampledSoftmax.exchange"
    changed = [
        *bindings(data_dir),
        f"TRAIN_STEPS = {steps}",
        "LOG_EVERY = 1",
        "EVAL_EVERY = 4",
        "SAVE_EVERY = 4",
    ]
    in_one = {}
    for exchange in ("rows", "hidden"):
        config = configuration.load([str(tiny_runs.QUICKSTART)], [*changed, f"{name} = {exchange!r}"])
        in_one[exchange] = tmp_path / exchange
        tiny_runs.train_here(config.experiment, workdir=in_one[exchange], strategy=mirrored(2))
    workdir = tmp_path / "processes"
    todo = {"config": str(tiny_runs.QUICKSTART), "train": str(workdir), "convert": []}
    todo["bindings"] = [*changed, f"{name} = 'hidden'"]
    tiny_runs.finish_in_processes(2, [todo], log=tmp_path / "log")
    lines = tiny_runs.metrics(workdir)
    of_rows, of_hidden = (tiny_runs.metrics(in_one[exchange]) for exchange in ("rows", "hidden"))
    assert len(lines) == len(of_rows) == len(of_hidden) == steps
    for line, rows, hidden in zip(lines, of_rows, of_hidden, strict=True):
        for tag in ("sampled_loss_nats", "gradient_norm"):
            assert line[tag] == pytest.approx(rows[tag], rel=RTOL), tag
        # What travels between processes is padded, not by much.
        part = "bytes_received/hidden_states"
        assert hidden[part] <= line[part] <= 1.1 * hidden[part]
        assert part not in rows
        total, least = (
            sum(v for t, v in of.items() if t.startswith("bytes_received/")) for of in (line, hidden)
        )
        assert least < total < 1.5 * least


@pytest.mark.parametrize("size", NUM_PROCESSES)
def test_checkpoints_equal_those_of_as_many_devices(runs, size):
    workdir, reference = runs.workdirs[size, 1], runs.workdirs[1, size]
    steps = tiny_runs.checkpoint_steps(workdir)
    assert steps == tiny_runs.checkpoint_steps(reference) == [4, 6, 8, 12]
    tiny_runs.assert_same_bits(
        tiny_runs.tensors(workdir, TRAIN_STEPS), tiny_runs.tensors(reference, TRAIN_STEPS)
    )
    for name in ("config.gin", "vocab.txt", "saved.json"):
        assert (workdir / name).exists(), name


def test_a_checkpoint_goes_from_hand_to_hand_bit_for_bit(runs):
    _, first = runs.handed_on[0]
    expected = tiny_runs.tensors(first.parent, TRAIN_STEPS)
    assert np.abs(expected["slots/tables/words/embedding/second_moment"]).max() > 0
    for who, folder in runs.handed_on[1:]:
        reader = tiny_runs.tensors_of(folder / f"step_{TRAIN_STEPS:08d}")
        assert reader.keys() == expected.keys(), who
        tiny_runs.assert_same_bits(reader, expected)


@pytest.mark.parametrize("size", NUM_PROCESSES)
def test_every_process_wrote_a_part(runs, size):
    """In small blocks, as here, at least one file each, none of which holds most of it."""
    folder = dict(runs.handed_on)[f"{size} processes"] / f"step_{TRAIN_STEPS:08d}"
    sizes = sorted(path.stat().st_size for path in folder.glob("tensors.data-*"))
    assert len(sizes) >= size
    assert sizes[-1] < 0.6 * sum(sizes)
    assert not list(folder.glob("parts"))
