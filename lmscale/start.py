"""What a run starts from beside its initialisers: pretrained vectors, and another run's checkpoint."""

import numpy as np

_SAMPLE_ROWS = 65_536
_WARM_START = "warm_start"


def report_names(task):
    """Every name that `start_from_elsewhere` can give a report, whatever is configured."""
    return [*map(_pretrained, task.tables), _WARM_START]


def check_sources(experiment, task, tensors):
    """Raises ValueError unless what `start_from_elsewhere` would read is there, and fits, as far as that shows at once.

    Args:
      experiment: `Experiment`.
      task: its `Task`.
      tensors: {path: (shape, numpy dtype)} of the run's parameters.
    """
    for config in task.tables.values():
        if config.pretrained is not None:
            config.pretrained.describe(dim=config.embed_dim)
    if experiment.warm_start is not None:
        loaded = experiment.warm_start.check(tensors, vocabularies=task.vocabularies)
        _check_vectors_remain(experiment.warm_start, loaded, task)


def start_from_elsewhere(experiment, trainer):
    """Fills a new run's parameters with what its configuration names, pretrained vectors first.

    Args:
      experiment: `Experiment`.
      trainer: its `Trainer`, before the first step.

    Returns:
      {"pretrained_TABLE" or "warm_start": report as text}, empty if the configuration names nothing.

    Raises:
      ValueError: as `check_sources`, before anything is filled; as `PretrainedVectors.fill` and `WarmStart.apply`.
    """
    reports = {}
    parameters = trainer.parameters()
    by_path = {parameter.path: parameter for parameter in parameters}
    tensors = {path: (parameter.shape, parameter.dtype) for path, parameter in by_path.items()}
    check_sources(experiment, trainer.task, tensors)
    for name, config in trainer.task.tables.items():
        if config.pretrained is None:
            continue
        rows = by_path[_embedding(name)]
        sample = rows.read(0, min(_SAMPLE_ROWS, rows.shape[0])).astype(np.float64)
        coverage = config.pretrained.fill(
            vocabulary=trainer.task.vocabularies[name],
            dim=config.embed_dim,
            write=rows.scatter,
            initial_stddev=float(np.sqrt(np.mean(np.square(sample)))),
        )
        reports[_pretrained(name)] = coverage.text()
    if experiment.warm_start is not None:
        report = experiment.warm_start.apply(parameters, vocabularies=trainer.task.vocabularies)
        trainer.model.earlier_updates = dict(report.updates)
        reports[_WARM_START] = report.text()
    return reports


def _check_vectors_remain(warm_start, loaded, task):
    """Raises ValueError where vectors would be read for rows all of which another run's then replace."""
    if warm_start.rows_by_word and warm_start.new_rows == "initializer":
        return
    for name, config in task.tables.items():
        path = _embedding(name)
        if config.pretrained is not None and path in loaded:
            raise ValueError(
                f"The rows of {path} must start from vectors or from another run. Received: TableConfig.pretrained, "
                f"and a warm start that replaces all rows of it. Put ('{path}', None) first in WarmStart.rename; or "
                "set rows_by_word = True and new_rows = 'initializer', which leaves the rows of new words to the "
                "vectors; or take pretrained out."
            )


def _embedding(table_name):
    return f"tables/{table_name}/embedding"


def _pretrained(table_name):
    return f"pretrained_{table_name}"
