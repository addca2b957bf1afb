"""What a run starts from beside its initialisers: pretrained vectors, and another run's checkpoint."""

import numpy as np

_SAMPLE_ROWS = 65_536


def start_from_elsewhere(experiment, trainer):
    """Fills a new run's parameters with what its configuration names, pretrained vectors first.

    Args:
      experiment: `Experiment`.
      trainer: its `Trainer`, before the first step.

    Returns:
      {"pretrained_TABLE" or "warm_start": report as text}, empty if the configuration names nothing.

    Raises:
      ValueError: as `PretrainedVectors.fill` and `WarmStart.apply` do.
    """
    reports = {}
    parameters = trainer.parameters()
    by_path = {parameter.path: parameter for parameter in parameters}
    vocabulary = trainer.data.vocabulary
    for name, config in trainer.task.tables.items():
        if config.pretrained is None:
            continue
        rows = by_path[f"tables/{name}/embedding"]
        sample = rows.read(0, min(_SAMPLE_ROWS, rows.shape[0])).astype(np.float64)
        coverage = config.pretrained.fill(
            vocabulary=vocabulary,
            dim=config.embed_dim,
            write=rows.scatter,
            initial_stddev=float(np.sqrt(np.mean(np.square(sample)))),
        )
        reports[f"pretrained_{name}"] = coverage.text()
    if experiment.warm_start is not None:
        reports["warm_start"] = experiment.warm_start.apply(parameters, vocabulary=vocabulary).text()
    return reports
