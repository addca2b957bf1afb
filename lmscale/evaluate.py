"""Exact perplexity of a run: python -m lmscale.evaluate --workdir=runs/quickstart --split=test

Full softmax over every row of the vocabulary, every token of the split once. The last line on stdout is a JSON object.
With --follow, each checkpoint of a run that is training, as it appears: a line on stdout for each, and metrics in the
folder eval_SPLIT of the work directory. It ends with the run.
"""

import json
import math

from absl import flags, logging

from lmscale import machine_flags, run_flags, workdir_flags
from lmscale.command_line import run_main

flags.adopt_module_key_flags(run_flags)

_SPLIT = flags.DEFINE_enum("split", "valid", ["train", "valid", "test"], "What to evaluate on.")
_FOLLOW = flags.DEFINE_bool(
    "follow", False, "Evaluate each new checkpoint, until the run is finished and its last one is evaluated."
)
_POLL_SECS = flags.DEFINE_float(
    "poll_secs", 10.0, "With --follow: seconds after which to look for a new checkpoint.", lower_bound=0.01
)


def main(argv):
    """Flags to configuration to `evaluate`."""
    del argv
    workdir_flags.check()
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.INFO)
    for name, is_used in (("checkpoint", not _FOLLOW.value), ("poll_secs", _FOLLOW.value)):
        if flags.FLAGS[name].present and not is_used:
            way_out = "Leave it out" if _FOLLOW.value else "Leave it out, or pass --follow"
            raise ValueError(
                f"--{name} must be given {'without' if _FOLLOW.value else 'with'} --follow. "
                f"Received: --{name}={flags.FLAGS[name].value}. {way_out}."
            )
    with machine_flags.processes() as group:
        if _FOLLOW.value:
            _follow(group)
        else:
            _print(_evaluate(group), group)
    return 0


def _print(report, group):
    if group.is_chief:
        print(json.dumps(_finite(report), allow_nan=False), flush=True)


def _finite(value):
    """JSON has neither NaN nor infinity."""
    if isinstance(value, dict):
        return {key: _finite(of) for key, of in value.items()}
    if isinstance(value, list):
        return [_finite(of) for of in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _follow(group):
    from lmscale.follow import Follower

    path = workdir_flags.workdir_path()
    with Follower(path, split=_SPLIT.value, poll_secs=_POLL_SECS.value, group=group) as follower:
        workdir = follower.wait_for_run()
        experiment, strategy = run_flags.experiment_and_strategy(workdir, group)
        for report in follower.reports(experiment, workdir=workdir, strategy=strategy):
            _print(report, group)


def _evaluate(group):
    # TensorFlow takes seconds to import: mistakes in flags come before.
    from lmscale.evaluation import CheckpointEvaluator
    from lmscale.workdir import Workdir

    with Workdir(workdir_flags.workdir_path(), readonly=True) as workdir:
        restored = run_flags.restored_model(workdir, group)
        evaluator = CheckpointEvaluator(restored, split=_SPLIT.value)
        return evaluator.evaluate(restored.step_of(workdir_flags.checkpoint()))


def run():
    """Console script lmscale-evaluate."""
    run_main(main)


if __name__ == "__main__":
    run()
