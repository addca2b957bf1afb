"""The flags of commands that use a trained run on devices: to its restored model."""

from absl import flags

from lmscale import machine_flags, workdir_flags

flags.adopt_module_key_flags(workdir_flags)
flags.adopt_module_key_flags(machine_flags)


def experiment_and_strategy(workdir, group):
    """(`Experiment` of the run, strategy of the processes' devices).

    Raises:
      ValueError: if no run has started in `workdir`; as `configuration.load`.
    """
    config = workdir_flags.config(workdir)
    group.check_same("The configuration", config.text)
    return config.experiment, machine_flags.strategy(group)


def restored_model(workdir, group):
    """The `RestoredModel` of the run in `workdir`, not yet filled."""
    from lmscale.restored import RestoredModel

    experiment, strategy = experiment_and_strategy(workdir, group)
    return RestoredModel(experiment, workdir=workdir, strategy=strategy, group=group)
