"""Exact perplexity of a run: python -m lmscale.evaluate --workdir=runs/quickstart --split=test

Full softmax over every row of the vocabulary, every token of the split once. The last line on stdout is a JSON object.
"""

import json
import math

from absl import flags, logging

from lmscale import machine_flags
from lmscale.command_line import DEFINE_path, run_main

flags.adopt_module_key_flags(machine_flags)

_WORKDIR = DEFINE_path("workdir", None, "Work directory of the run.")
_SPLIT = flags.DEFINE_enum("split", "valid", ["train", "valid", "test"], "What to evaluate on.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", "latest", "A step, `latest` or `best`.")
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
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.INFO)
    with machine_flags.processes() as group:
        report = _evaluate(group, checkpoint)
    if group.is_chief:
        # JSON has neither NaN nor infinity.
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in report.items()}
        print(json.dumps(finite, allow_nan=False))
    return 0


def _evaluate(group, checkpoint):
    # TensorFlow takes seconds to import: mistakes in flags come before.
    from lmscale import configuration
    from lmscale.evaluation import evaluate_checkpoint
    from lmscale.workdir import Workdir

    with Workdir(_WORKDIR.value, readonly=True) as workdir:
        if not workdir.config_path.exists():
            raise ValueError(
                f"No run has started in {workdir.path}: it has no config.gin. Start one with lmscale.train."
            )
        config = configuration.load([str(workdir.config_path)], _GIN_PARAM.value)
        group.check_same("The configuration", config.text)
        strategy = machine_flags.strategy(group)
        return evaluate_checkpoint(
            config.experiment,
            workdir=workdir,
            strategy=strategy,
            split=_SPLIT.value,
            checkpoint=checkpoint,
            group=group,
        )


def run():
    """Console script lmscale-evaluate."""
    run_main(main)


if __name__ == "__main__":
    run()
