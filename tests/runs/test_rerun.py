"""A run's own configuration is enough to run it again, and a finished run stays as it is."""

import tiny_runs
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

LAST_STEP = tiny_runs.TINY_MACROS["TRAIN_STEPS"]


def test_rerun_from_the_resolved_configuration_is_bit_identical(reference_run, tmp_path):
    old = reference_run(2).result()
    config = (old / "config.gin").read_text()
    assert str(old) not in config
    copy = tmp_path / "elsewhere.gin"  # It needs nothing beside it.
    copy.write_text(config)
    arguments = tiny_runs.train_arguments(workdir=tmp_path / "new", gin_file=copy, bindings={})
    new = tiny_runs.finish(arguments, log=tmp_path / "log")
    assert (new / "config.gin").read_text() == config
    assert (new / "finished.json").read_text() == (old / "finished.json").read_text()
    tiny_runs.assert_same_bits(tiny_runs.tensors(new, LAST_STEP), tiny_runs.tensors(old, LAST_STEP))


def test_finished_run_says_so_and_changes_nothing(reference_run, data_dir, tmp_path):
    workdir = reference_run(2).result()
    before = tiny_runs.snapshot(workdir)
    arguments = tiny_runs.train_arguments(workdir=workdir, data_dir=data_dir, cpu_devices=2)
    process = tiny_runs.Process("lmscale.train", arguments, log=tmp_path / "log")
    assert process.wait() == 0
    assert process.stdout.startswith(f"This run is finished: {workdir}, ")
    assert tiny_runs.snapshot(workdir) == before


def test_metrics_and_tensorboard_say_what_the_run_was(reference_run):
    """Configuration as text, and a loss under a tag that says which loss it is."""
    workdir = reference_run(2).result()
    accumulator = EventAccumulator(str(workdir / "train")).Reload()
    text_tags = accumulator.Tags()["tensors"]
    assert "config" in text_tags
    shown = accumulator.Tensors("config")[0].tensor_proto.string_val[0].decode()
    config = (workdir / "config.gin").read_text()
    assert [line.strip() for line in shown.splitlines()] == [line.strip() for line in config.splitlines()]

    train, evaluation = (set(tiny_runs.metrics(workdir, name)[-1]) for name in ("train", "eval"))
    assert train & evaluation == {"step", "wall_time"}
    losses = {tag for tag in train | evaluation if "loss" in tag or "perplexity" in tag or "minus" in tag}
    assert losses == {
        "sampled_loss_nats",
        "valid/exact_loss_nats",
        "valid/exact_perplexity",
        "probe/exact_loss_nats",
        "probe/exact_perplexity",
        "probe/sampled_loss_nats",
        "probe/sampled_minus_exact_nats",
        "valid/by_frequency/unknown_loss_nats",
        *(f"valid/by_frequency/decile_{decile:02}_loss_nats" for decile in range(1, 11)),
    }
    assert train >= {
        "tokens_per_sec",
        "step_secs",
        "gradient_norm",
        "learning_rate/tables",
        "learning_rate/layers",
        "rows_touched/words/shard_0",
        "rows_touched/words/shard_1",
    }
    assert any(tag.startswith("memory_mib/") for tag in train)
    assert "valid/eval_tokens" in evaluation


def test_the_run_keeps_its_vocabulary(reference_run, data_dir):
    workdir = reference_run(2).result()
    assert (workdir / "vocab.txt").read_bytes() == (data_dir / "vocab.txt").read_bytes()
