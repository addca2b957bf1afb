"""What steps carry from one batch to the next: on each device the part of its own examples."""

import numpy as np
import tensorflow as tf

from lmscale.distribution import collectives
from lmscale.distribution.all_to_all import gather_on_hosts
from lmscale.distribution.strategies import first_local_replica
from lmscale.parameters.tree import Parameter


class CarriedState:
    """Variables of [examples of a replica, ...], for each replica its own. Make it in the strategy's scope."""

    def __init__(self, initial, *, strategy):
        """Args:
        initial: list of tensors [examples of a replica, ...]; empty for a task that carries nothing.
        strategy: `tf.distribute.Strategy`.
        """
        self._strategy = strategy
        self._variables = [collectives.local_variable(x) for x in initial]

    @property
    def variables(self):
        """The variables, in the order of the initial values."""
        return tuple(self._variables)

    def read(self, *, starts_epoch):
        """This replica's values; zeros where starts_epoch, a bool scalar. In `strategy.run`."""
        values = [collectives.local_value(variable) for variable in self._variables]
        return [tf.where(starts_epoch, tf.zeros_like(x), x) for x in values]

    def assign(self, values):
        """Carries these values of this replica on. In `strategy.run`."""
        for variable, value in zip(self._variables, values, strict=True):
            collectives.local_value(variable).assign(value)

    def parameters(self):
        """`Parameter`s state/0, state/1, ..., of all examples of the global batch."""
        return [self._parameter(i, variable) for i, variable in enumerate(self._variables)]

    def _parameter(self, i, variable):
        num_replicas = self._strategy.num_replicas_in_sync
        return Parameter(
            path=f"state/{i}",
            shape=(num_replicas * variable.shape[0], *variable.shape[1:]),
            dtype=variable.dtype.as_numpy_dtype,
            sharded=True,
            trainable=False,
            read=lambda start, stop: self._read(variable)[start:stop],
            write=lambda start, values: self._send(variable, start, values),
            scatter=lambda rows, values: self._write(variable, rows, values),
        )

    def _read(self, variable):
        components = self._strategy.experimental_local_results(variable)
        own = np.concatenate([component.numpy() for component in components])
        return np.concatenate(gather_on_hosts(self._strategy, own))

    def _send(self, variable, start, values):
        """Writes rows from `start` on, of several processes each rows of its own, whoever holds them."""
        ranges = gather_on_hosts(self._strategy, np.array([start, start + len(values)]))
        padded = np.zeros([max(stop - start for start, stop in ranges), *values.shape[1:]], values.dtype)
        padded[: len(values)] = values
        for (start, stop), received in zip(ranges, gather_on_hosts(self._strategy, padded), strict=True):
            self._write(variable, np.arange(start, stop), received[: stop - start])

    def _write(self, variable, rows, values):
        components = self._strategy.experimental_local_results(variable)
        first = first_local_replica(self._strategy, num_local=len(components))
        size = variable.shape[0]
        for replica, component in enumerate(components, start=first):
            own = component.numpy()
            is_own = (rows >= replica * size) & (rows < (replica + 1) * size)
            own[rows[is_own] - replica * size] = values[is_own]
            component.assign(own)
