"""Functions on the replicas of a strategy."""

import numpy as np
import tensorflow as tf


def run_everywhere(strategy, function, *, compiled):
    """The results of a replica function, a list with one of each replica."""
    run = tf.function(lambda: strategy.run(function)) if compiled else lambda: strategy.run(function)
    results = run()
    return [
        tf.nest.map_structure(lambda x, i=i: np.asarray(strategy.experimental_local_results(x)[i]), results)
        for i in range(strategy.num_replicas_in_sync)
    ]
