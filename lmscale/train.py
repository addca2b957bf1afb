"""Trains a language model: python -m lmscale.train --gin_file=configs/quickstart.gin --workdir=runs/quickstart

Run again on the same work directory, it resumes; on a finished one it says so. Exit codes: 0 finished, 2 a mistake in
flags, configuration or data, 3 stopped on a NaN or infinite loss or gradient, 75 stopped by a signal or Ctrl-C after
saving, 69 another process of the run was lost: after these two, run the same command again to go on.
"""

import json
import re
import sys

from absl import flags, logging

from lmscale import machine_flags, stop_signals
from lmscale.command_line import DEFINE_multi_path, DEFINE_path, run_main

flags.adopt_module_key_flags(machine_flags)

_GIN_FILE = DEFINE_multi_path(
    "gin_file",
    [],
    "Configuration file, or the name of one of lmscale's own, such as quickstart.gin; may be given several times.",
)
_GIN_PARAM = flags.DEFINE_multi_string(
    "gin_param", [], "Override, such as LEARNING_RATE=0.001; may be repeated."
)
_WORKDIR = DEFINE_path(
    "workdir", None, "Where the run writes: checkpoints, metrics, its configuration.", remote=True
)
_SEED = flags.DEFINE_integer("seed", None, "Overrides SEED.")
_DRY_RUN = flags.DEFINE_bool(
    "dry_run",
    False,
    "Resolve everything, print configuration, parameters, memory a device and what a step moves, and stop.",
)
_PROFILE_STEPS = flags.DEFINE_string(
    "profile_steps", None, "FIRST:LAST, steps to write a profile of, for TensorBoard: such as 100:103."
)

EXIT_NON_FINITE = 3
EXIT_STOPPED = 75


def main(argv):
    """Flags to configuration to `train`."""
    del argv
    if not _GIN_FILE.value:
        raise ValueError(
            "--gin_file is required. Received: none. Pass for example --gin_file=quickstart.gin."
        )
    if not _WORKDIR.value and not _DRY_RUN.value:
        raise ValueError("--workdir is required. Received: none. Pass for example --workdir=runs/my_run.")
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.INFO)
    if _DRY_RUN.value:
        _dry_run(num_processes=machine_flags.cluster().size)
        return 0
    with machine_flags.processes() as group:
        return _train(group)


def _load():
    from lmscale import configuration

    return configuration.load(_GIN_FILE.value, _GIN_PARAM.value, seed=_SEED.value)


def _profile_steps(config):
    """(first, last) of --profile_steps, None without it; raises ValueError unless they are steps of the run."""
    text, train_steps = _PROFILE_STEPS.value, config.experiment.train_steps
    if text is None:
        return None
    match = re.fullmatch(r"(\d+):(\d+)", text, re.ASCII)
    first, last = map(int, match.groups()) if match else (0, 0)
    if not 1 <= first <= last <= train_steps:
        raise ValueError(
            f"--profile_steps must be FIRST:LAST, two steps of the run, which are 1 to {train_steps}. "
            f"Received: {text}. Pass for example --profile_steps=100:103 for four steps."
        )
    return first, last


def _dry_run(*, num_processes):
    # TensorFlow takes seconds to import: mistakes in flags come before.
    from lmscale import configuration, dry_run

    config = _load()
    _profile_steps(config)
    strategy = machine_flags.strategy()
    print(configuration.describe(config))
    dry_run.print_report(config.experiment, num_devices=num_processes * strategy.num_replicas_in_sync)


def _train(group):
    from lmscale.run import NonFiniteError, StoppedEarlyError, check_same_run, train
    from lmscale.workdir import Workdir

    config = _load()
    profile_steps = _profile_steps(config)
    group.check_same("The configuration", config.text)
    group.check_same("--profile_steps", _PROFILE_STEPS.value)
    with Workdir.of_group(_WORKDIR.value, group) as workdir:
        finished = group.of_chief(workdir.finished() if group.is_chief else None)
        if group.is_chief:
            check_same_run(config, workdir)
        if finished is not None and finished["step"] >= config.experiment.train_steps:
            _say(group, f"This run is finished: {workdir.path}, {json.dumps(finished)}")
            return 0
        strategy = machine_flags.strategy(group)
        try:
            summary = train(
                config.experiment,
                workdir=workdir,
                strategy=strategy,
                config_text=config.text,
                hparams=config.settings,
                group=group,
                profile_steps=profile_steps,
            )
        except StoppedEarlyError as stopped:
            stop_signals.ignore_stop_signals()
            _say(group, f"{stopped}. Run the same command again to go on.", file=sys.stderr)
            return EXIT_STOPPED
        except NonFiniteError as error:
            _say(group, f"error: {error}", file=sys.stderr)
            return EXIT_NON_FINITE
        stop_signals.ignore_stop_signals()
        if group.is_chief:
            workdir.mark_finished(step=summary["step"], summary=summary)
        _say(group, f"Finished: {workdir.path}, {json.dumps(summary)}")
        _say(group, f"TensorBoard: tensorboard --logdir={workdir.path}")
    return 0


def _say(group, message, *, file=None):
    """Of several processes, the chief says it."""
    if group.is_chief:
        print(message, file=file)


def run():
    """Console script lmscale-train."""
    run_main(main)


if __name__ == "__main__":
    run()
