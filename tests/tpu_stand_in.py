"""TensorFlow's own `TPUStrategy`, on a machine without a TPU: what it traces can be looked at, and not run.

A resolver that tells of cores which are not there stands in for the machine. TensorFlow puts what is meant for them on
the CPU; variables and initial values are real.
"""

import tensorflow as tf
from tensorflow.python.tpu.tpu_system_metadata import TPUSystemMetadata


class Resolver(tf.distribute.cluster_resolver.TPUClusterResolver):
    """Of one host with so many cores."""

    def __init__(self, num_cores):
        self._tpu, self.task_type, self.task_id = "local", None, None
        name = "/job:localhost/replica:0/task:0/device:TPU"
        self._cores = [tf.config.LogicalDevice(f"{name}:{i}", "TPU") for i in range(num_cores)]

    def get_tpu_system_metadata(self):
        return TPUSystemMetadata(
            num_cores=len(self._cores),
            num_hosts=1,
            num_of_cores_per_host=len(self._cores),
            topology=None,
            devices=self._cores,
        )

    def cluster_spec(self):
        return tf.train.ClusterSpec({})

    def get_job_name(self):
        return None

    def master(self, task_type=None, task_id=None, rpc_layer=None):
        return ""


def tpu_strategy(num_cores):
    """A `TPUStrategy` of so many cores that are not there."""
    return tf.distribute.TPUStrategy(Resolver(num_cores))
