"""Trains the PyTorch peer on prepared data, evaluating exactly after every epoch."""

import importlib.metadata
import json
import os
import statistics
import sys
import time
from pathlib import Path

from lmscale.benchmarks.peers.peer import ModelShape
from lmscale.data.batches import ContiguousBatches, EvaluationBatches
from lmscale.data.token_files import PreparedData
from lmscale.workdir import replace_file


def train(*, data_dir, output, epochs, dim, batch_size, window, dropout):
    """Trains from the last whole epoch that `output` has, to `epochs`: on CPUs to the bit what one call would.

    Args:
      data_dir: folder that `lmscale.prepare` wrote.
      output: folder for the state and for epochs.jsonl.
      epochs: to train in all.
      dim: width of embedding and LSTM; two layers.
      batch_size, window, dropout: of the training.

    Returns:
      A list, by epoch, of {"epoch", "steps", "train_secs": by the clock, without evaluation; "train_processor_secs";
      "step_secs_median", "valid_loss_nats"}.

    Raises:
      ValueError: if `output` is of other data, another recipe or another PyTorch.
    """
    import torch

    from lmscale.benchmarks.peers.pytorch_full_softmax import PytorchFullSoftmax

    data = PreparedData.open(data_dir)
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    log, state = output / "epochs.jsonl", output / "state"
    _check_same_run(
        output / "recipe.json",
        {
            "data_fingerprint": data.fingerprint,
            **{"dim": dim, "batch_size": batch_size, "window": window, "dropout": dropout},
            "torch": importlib.metadata.version("torch"),
        },
    )
    saved = torch.load(state, map_location="cpu") if state.exists() else {"epochs": []}
    done = saved["epochs"]
    replace_file(log, text=_lines(done))
    if len(done) >= epochs:
        return done[:epochs]
    peer = PytorchFullSoftmax(
        ModelShape(
            vocab_size=data.vocab_size,
            embed_dim=dim,
            hidden_dim=dim,
            num_layers=2,
            batch_size=batch_size,
            window=window,
            num_sampled=0,
            dropout=dropout,
        )
    )
    batches = ContiguousBatches(data.split("train"), global_batch_size=batch_size, window=window, seed=0)
    valid = EvaluationBatches(data.split("valid"), batch_size=24, window=70, eos_id=data.eos_id)
    if done:
        peer.restore(state)
        torch.set_rng_state(saved["rng_state"])
    for epoch in range(len(done), epochs):
        peer.start_epoch()
        seconds, processor_secs = [], 0.0
        for step in range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch):
            start, processor_start = time.perf_counter(), time.process_time()
            peer.train_step(batches.at(step).features["ids"])
            seconds.append(time.perf_counter() - start)
            processor_secs += time.process_time() - processor_start
            if len(seconds) % 100 == 0:
                print(
                    f"epoch {epoch + 1}  step {len(seconds)}  {statistics.median(seconds[-100:]):.3f} s a step",
                    file=sys.stderr,
                    flush=True,
                )
        loss = peer.evaluate(valid.at(i) for i in range(valid.num_steps))
        peer.end_epoch(loss)
        done.append(
            {
                "epoch": epoch + 1,
                "steps": len(seconds),
                "train_secs": sum(seconds),
                "train_processor_secs": processor_secs,
                "step_secs_median": statistics.median(seconds),
                "valid_loss_nats": loss,
            }
        )
        # One file, replaced at once: a kill never leaves an epoch trained and not counted.
        new = state.with_suffix(".new")
        peer.save(new)
        torch.save(torch.load(new) | {"epochs": done, "rng_state": torch.get_rng_state()}, new)
        os.replace(new, state)
        replace_file(log, text=_lines(done))
    return done


def _lines(epochs):
    return "".join(json.dumps(epoch) + "\n" for epoch in epochs)


def _check_same_run(path, recipe):
    """Writes the recipe, or compares it with the one that is there."""
    if not path.exists():
        replace_file(path, text=json.dumps(recipe, indent=1) + "\n")
    elif json.loads(path.read_text(encoding="utf-8")) != recipe:
        raise ValueError(
            f"A training must go on with the recipe it started with, {path}. Received: {recipe}. Give another --output."
        )
