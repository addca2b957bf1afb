"""The exchanges between replicas, for use inside `strategy.run`.

No gradient tape may record them: differentiating a value that every replica computes alike through a collective
gives gradients `num_replicas` times too large. lmscale exchanges values, differentiates locally, exchanges gradients.
With one replica every function here is the identity.
"""

import weakref

import tensorflow as tf

from lmscale.distribution import ledger

# By replica context, which makes an operation of its id whenever it is asked.
_static_ids: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def num_replicas():
    """Number of replicas in the current replica context (1 outside any strategy), a Python int."""
    return tf.distribute.get_strategy().num_replicas_in_sync


def replica_id():
    """Index of this replica among all of them: a Python int where the strategy knows it, else a scalar tensor."""
    context = tf.distribute.get_replica_context()
    if context is None:
        raise ValueError("replica_id must be called inside strategy.run. Received: a cross-replica context.")
    if context not in _static_ids:
        static = tf.get_static_value(context.replica_id_in_sync_group)
        _static_ids[context] = None if static is None else int(static)
    return context.replica_id_in_sync_group if _static_ids[context] is None else _static_ids[context]


def block(x, start, size):
    """Elements start .. start + size - 1 of `x` along its first axis, in a static shape.

    Args:
      x: tensor, of static shape but perhaps for the first axis.
      start: int; or int scalar tensor, where one program serves every replica (TPU): it may not decide a shape.
      size: int; start + size must not be above x.shape[0].

    Returns:
      [size, ...].

    Communication: none.
    """
    if isinstance(start, int):
        return x[start : start + size]
    return tf.slice(x, [start] + [0] * (len(x.shape) - 1), [size, *x.shape[1:]])


def all_gather(x, axis=0):
    """Concatenates `x` of every replica along `axis`, in replica order.

    Communication: all-gather of `x`; every replica receives num_replicas times its bytes.
    """
    # TensorFlow crashes on gathering nothing from several replicas.
    if num_replicas() == 1 or x.shape[axis] == 0:
        return x
    ledger.all_gather(x, num_replicas=num_replicas())
    # all_gather of a tensor captured from outside the replica function fails ("destinations can not be empty").
    gathered = tf.distribute.get_replica_context().all_gather(tf.identity(movable(x)), axis=axis)
    gathered = tf.bitcast(gathered, x.dtype) if x.dtype == tf.bfloat16 else gathered
    # Between processes the static size of the axis gets lost.
    shape = x.shape.as_list()
    if shape[axis] is not None:
        shape[axis] *= num_replicas()
    return tf.ensure_shape(gathered, shape)


def movable(x):
    """`x` in a dtype that TensorFlow's collectives move: the bits of bfloat16 as float16, to compute nothing with."""
    return tf.bitcast(x, tf.float16) if x.dtype == tf.bfloat16 else x


def all_reduce_sum(x):
    """Sums `x` (a tensor, or a list of tensors) over the replicas.

    Communication: all-reduce of `x`; every replica receives the sum.
    """
    if num_replicas() == 1:
        return x
    x = tf.nest.map_structure(tf.identity, x)
    ledger.all_reduce(tf.nest.flatten(x), num_replicas=num_replicas())
    return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, x)


def local_variable(initial_value, *, dtype=None, name=None):
    """A variable with a value of its own on each replica, for `local_value`. Make it in the strategy's scope."""
    return tf.Variable(
        initial_value,
        trainable=False,
        dtype=dtype,
        name=name,
        synchronization=tf.VariableSynchronization.ON_READ,
        aggregation=tf.VariableAggregation.NONE,
    )


def local_value(variable):
    """This replica's own component of a variable with one value per replica.

    Computing on the component, not on the wrapper, is what makes gradients and slice writes work under every strategy.
    """
    components = tf.distribute.get_strategy().experimental_local_results(variable)
    if len(components) == 1:
        return components[0]
    replica = replica_id()
    if not isinstance(replica, int):
        # One program for every core (TPU).
        return _CoreComponent(variable)
    # Every process has the same number of replicas, numbered consecutively.
    return components[replica % len(components)]


class _CoreComponent:
    """The component of a distributed variable on whichever core runs the program, as a `tf.Variable` is used here.

    TensorFlow's own wrapper refuses slice writes, and reduces over the cores what is assigned to a mirrored variable.
    Both are right for gradients of one value on all cores, and neither for a shard, or for an update that every core
    makes by itself. In one program for all cores, the wrapper's `handle` is that of the core's component.
    """

    def __init__(self, variable):
        self._variable = variable
        self.dtype, self.shape = variable.dtype, variable.shape

    def read_value(self):
        value = tf.raw_ops.ReadVariableOp(resource=self._variable.handle, dtype=self.dtype)
        return tf.ensure_shape(value, self.shape)

    def sparse_read(self, indices, name=None):
        """Rows of these indices: what `tf.gather` calls."""
        del name
        return tf.raw_ops.ResourceGather(resource=self._variable.handle, indices=indices, dtype=self.dtype)

    def assign(self, value):
        value = tf.convert_to_tensor(value, self.dtype)
        tf.raw_ops.AssignVariableOp(resource=self._variable.handle, value=tf.ensure_shape(value, self.shape))

    def scatter_update(self, slices):
        tf.raw_ops.ResourceScatterUpdate(
            resource=self._variable.handle, indices=slices.indices, updates=slices.values
        )

    def __tf_tensor__(self, dtype=None, name=None):
        del name
        return tf.convert_to_tensor(self.read_value(), dtype)
