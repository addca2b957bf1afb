"""Exact perplexity of a run: python -m lmscale.evaluate --workdir=runs/quickstart --split=test

Full softmax over every row of the vocabulary, every token of the split once. The last line on stdout is a JSON object.
"""

import json
import math

from absl import flags, logging

from lmscale.command_line import DEFINE_path, run_main

_WORKDIR = DEFINE_path("workdir", None, "Work directory of the run.")
_SPLIT = flags.DEFINE_enum("split", "valid", ["train", "valid", "test"], "What to evaluate on.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", "latest", "A step, `latest` or `best`.")
_CPU_DEVICES = flags.DEFINE_integer(
    "cpu_devices", None, "As for lmscale.train; need not be what the run used."
)
_GPU_MEMORY_MIB = flags.DEFINE_integer("gpu_memory_mib", None, "As for lmscale.train.")
_TPU = flags.DEFINE_string("tpu", None, "As for lmscale.train.")
_GIN_PARAM = flags.DEFINE_multi_string(
    "gin_param", [], "Override of the run's configuration, such as DATA_DIR='elsewhere'; may be repeated."
)


def main(argv):
    """Flags to configuration to `evaluate`."""
    del argv
    if not _WORKDIR.value:
        raise ValueError("--workdir is required. Received: none. Pass the work directory of a run.")
    checkpoint = _CHECKPOINT.value
    if checkpoint not in ("latest", "best") and not checkpoint.isdecimal():
        raise ValueError(f"--checkpoint must be a step, `latest` or `best`. Received: {checkpoint}.")
    from lmscale import configuration
    from lmscale.distribution.strategies import make_strategy
    from lmscale.evaluation import evaluate_checkpoint
    from lmscale.workdir import Workdir

    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.INFO)
    with Workdir(_WORKDIR.value, readonly=True) as workdir:
        if not workdir.config_path.exists():
            raise ValueError(
                f"No run has started in {workdir.path}: it has no config.gin. Start one with lmscale.train."
            )
        config = configuration.load([str(workdir.config_path)], _GIN_PARAM.value)
        strategy = make_strategy(
            cpu_devices=_CPU_DEVICES.value, gpu_memory_mib=_GPU_MEMORY_MIB.value, tpu=_TPU.value
        )
        report = evaluate_checkpoint(
            config.experiment, workdir=workdir, strategy=strategy, split=_SPLIT.value, checkpoint=checkpoint
        )
    # JSON has neither NaN nor infinity.
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in report.items()}
    print(json.dumps(finite, allow_nan=False))
    return 0


def run():
    """Console script lmscale-evaluate."""
    run_main(main)


if __name__ == "__main__":
    run()
