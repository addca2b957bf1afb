"""How long it takes to a validation perplexity, beside PyTorch's full softmax; and what the sample costs in quality.

Both sides train the same model, two tied LSTM layers, on the same prepared data; evaluations are exact on both and not
counted. Runs go on where an earlier call with the same folders was cut off.
"""

import collections
import json
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from lmscale.benchmarks.sides import KEEPING_MEMORY
from lmscale.benchmarks.task import TaskFailedError, common_environment, run_task
from lmscale.data.token_files import PreparedData
from lmscale.workdir import replace_file

# The recipe of PyTorch's word_language_model example at its default sizes, with the allocator that makes it fastest.
PEER_RECIPE = {"dim": 200, "batch_size": 20, "window": 35, "dropout": 0.2}


def measure(*, data_dir, config, output, epochs, say):
    """Trains the peer and then lmscale.

    Args:
      data_dir: prepared data of both.
      config: gin file of lmscale's side.
      output: folder for the runs.
      epochs: of the peer.
      say: called with a line of text for each stage.

    Returns:
      {"peer": [an entry an epoch], "ours": [{"epoch", "secs", "clock_secs", "perplexity"} an evaluation], "reached":
      [{"peer_epoch", "perplexity", "peer_secs", "peer_clock_secs", "our_secs", "our_clock_secs", "our_epoch",
      "fraction"}], "peer_recipe", "our_recipe", "startup_secs"}. Seconds are steps times the median step of the fastest
      epoch, so that what disturbed a machine for an hour does not count; those by the clock are the sum of all steps,
      and for lmscale also the time from the command to the first step's start.
    """
    say(f"time to quality: PyTorch, full softmax, {epochs} epochs")
    peer = run_task(
        "lmscale.benchmarks.peer_training:train",
        PEER_RECIPE | {"data_dir": str(data_dir), "output": str(output / "pytorch"), "epochs": epochs},
        log=output / "pytorch.log",
        environment=KEEPING_MEMORY,
    )
    say("time to quality: lmscale")
    workdir = output / "lmscale"
    _note_start(workdir)
    _train(config, workdir=workdir, bindings={"DATA_DIR": repr(str(data_dir))}, log=output / "lmscale.log")
    startup_secs = _startup_secs(workdir)
    ours = _evaluations(workdir)
    return {
        "peer": peer,
        "ours": ours,
        "reached": _reached(peer, ours, startup_secs=startup_secs),
        "startup_secs": startup_secs,
        "peer_recipe": "full softmax, float32, SGD, " + ", ".join(f"{k} {v}" for k, v in PEER_RECIPE.items()),
        "our_recipe": f"configs/{config.name} (sampled softmax, bfloat16 products, Adam on a cosine)",
    }


def _note_start(workdir):
    """Writes the time beside a run that has not logged anything yet: later starts only go on with it."""
    if not (workdir / "train" / "metrics.jsonl").exists():
        workdir.parent.mkdir(parents=True, exist_ok=True)
        replace_file(workdir.with_suffix(".start"), text=str(time.time()))


def _startup_secs(workdir):
    """Seconds from the run's start to its first step: to the first log line, less the steps that it is of."""
    first = json.loads((workdir / "train" / "metrics.jsonl").read_text().splitlines()[0])
    start = float(workdir.with_suffix(".start").read_text())
    return first["wall_time"] - start - first["step"] * first["step_secs"]


def measure_samples(*, data_dir, config, output, nums_sampled, epochs, say):
    """Trains with each number of samples and with the full softmax, for as many steps; exact perplexity after each.

    The full softmax is the sampled one with every row in the sample: drawn without replacement, each is there once,
    and its correction is log 1.

    Args:
      data_dir: prepared data.
      config: gin file.
      output: folder for the runs.
      nums_sampled: numbers of samples; those that the vocabulary does not have are left out.
      epochs: of each run.
      say: called with a line of text for each stage.

    Returns:
      {"train_steps", "results": [{"num_sampled": vocab_size for the full softmax, "perplexity", "train_secs",
      "over_full": perplexity over that of the full softmax}]}.
    """
    # These bring TensorFlow, whose memory the other sections would rather have.
    from lmscale import configuration
    from lmscale.data.batches import ContiguousBatches

    data = PreparedData.open(data_dir)
    macros = configuration.load([str(config)]).macros
    batches = ContiguousBatches(
        data.split("train"), global_batch_size=macros["GLOBAL_BATCH_SIZE"], window=macros["WINDOW"], seed=0
    )
    train_steps = epochs * batches.steps_per_epoch
    results = []
    for num_sampled in (*(n for n in nums_sampled if n < data.vocab_size), data.vocab_size):
        say(f"quality against samples: {num_sampled:,}, {train_steps} steps")
        bindings = {
            "DATA_DIR": repr(str(data_dir)),
            "TRAIN_STEPS": train_steps,
            "EVAL_EVERY": train_steps,
            "SAVE_EVERY": train_steps,
            "NUM_SAMPLED": num_sampled,
        }
        name = f"sampled_{num_sampled}"
        workdir = output / name
        _train(config, workdir=workdir, bindings=bindings, log=output / f"{name}.log")
        last = _evaluations(workdir)[-1]
        results.append(
            {"num_sampled": num_sampled, "perplexity": last["perplexity"], "train_secs": last["secs"]}
        )
    for result in results:
        result["over_full"] = result["perplexity"] / results[-1]["perplexity"]
    return {"train_steps": train_steps, "results": results}


def _train(config, *, workdir, bindings, log):
    """Runs lmscale.train, or goes on with it."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        result = subprocess.run(
            [sys.executable, "-m", "lmscale.train", f"--gin_file={config}", f"--workdir={workdir}"]
            + [f"--gin_param={name}={value}" for name, value in bindings.items()],
            stdout=file,
            stderr=file,
            check=False,
            env=os.environ | common_environment(),
        )
    if result.returncode:
        words = log.read_text(errors="replace").strip().splitlines()
        raise TaskFailedError(f"lmscale.train ended with exit code {result.returncode}: {words[-1]}")


def _evaluations(workdir):
    """Seconds of training and perplexity at each evaluation of a run."""
    train, evaluations = (
        [json.loads(line) for line in (Path(workdir) / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("train", "eval")
    )
    epochs = collections.defaultdict(list)
    for line in train:
        epochs[math.ceil(line["epoch"])].append(line["step_secs"])
    step_secs = min(map(statistics.median, epochs.values()))
    clock, previous = {}, 0
    for line in train:
        clock[line["step"]] = clock.get(previous, 0.0) + (line["step"] - previous) * line["step_secs"]
        previous = line["step"]
    epochs_per_step = train[-1]["epoch"] / train[-1]["step"]
    return [
        {
            "epoch": line["step"] * epochs_per_step,
            "secs": line["step"] * step_secs,
            "clock_secs": clock.get(line["step"]),
            "perplexity": math.exp(line["valid/exact_loss_nats"]),
        }
        for line in evaluations
    ]


def _reached(peer, ours, *, startup_secs):
    """For each epoch of the peer, when lmscale first evaluated as low."""
    peer_step_secs = min(line["step_secs_median"] for line in peer)
    reached, peer_secs, peer_clock_secs = [], 0.0, 0.0
    for line in peer:
        peer_clock_secs += line["train_secs"]
        peer_secs += line["steps"] * peer_step_secs
        perplexity = math.exp(line["valid_loss_nats"])
        first = next((o for o in ours if o["perplexity"] <= perplexity), None)
        reached.append(
            {
                "peer_epoch": line["epoch"],
                "perplexity": perplexity,
                "peer_secs": peer_secs,
                "peer_clock_secs": peer_clock_secs,
                "our_secs": first and first["secs"],
                "our_clock_secs": first and first["clock_secs"] + startup_secs,
                "our_epoch": first and first["epoch"],
                "fraction": first and first["secs"] / peer_secs,
            }
        )
    return reached
