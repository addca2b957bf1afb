"""The flags that name a trained run and one of its checkpoints: to its configuration."""

from absl import flags

from lmscale.command_line import DEFINE_path

_WORKDIR = DEFINE_path("workdir", None, "Work directory of the run.", remote=True)
_CHECKPOINT = flags.DEFINE_string("checkpoint", "latest", "A step, `latest` or `best`.")
_GIN_PARAM = flags.DEFINE_multi_string(
    "gin_param", [], "Override of the run's configuration, such as DATA_DIR='elsewhere'; may be repeated."
)


def check():
    """Raises ValueError for flags that cannot be meant, before TensorFlow is imported."""
    if not _WORKDIR.value:
        raise ValueError("--workdir is required. Received: none. Pass the work directory of a run.")
    if _CHECKPOINT.value not in ("latest", "best") and not _CHECKPOINT.value.isdecimal():
        raise ValueError(f"--checkpoint must be a step, `latest` or `best`. Received: {_CHECKPOINT.value}.")


def workdir_path():
    """What --workdir says."""
    return _WORKDIR.value


def checkpoint():
    """What --checkpoint says."""
    return _CHECKPOINT.value


def config(workdir):
    """The `ResolvedConfig` of the run in `workdir`.

    Raises:
      ValueError: if no run has started there; as `configuration.load`.
    """
    from lmscale import configuration

    if not workdir.config_path.exists():
        raise ValueError(
            f"No run has started in {workdir.path}: it has no config.gin. Start one with lmscale.train."
        )
    return configuration.load([str(workdir.config_path)], _GIN_PARAM.value)
