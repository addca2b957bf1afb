import functools
import sys

import pytest

NUM_CPU_DEVICES = 8


def pytest_collection_finish(session):
    """Splits the CPU into logical devices before any op runs, for runs that use TensorFlow at all."""
    tf = sys.modules.get("tensorflow")
    if tf is not None:
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(
            cpu, [tf.config.LogicalDeviceConfiguration()] * NUM_CPU_DEVICES
        )


@pytest.fixture(scope="session")
def mirrored():
    """mirrored(n): a MirroredStrategy over n CPU devices, the same object at each call."""
    import tensorflow as tf

    @functools.cache
    def make(num_replicas):
        # Collectives find each other by a key in the whole process. TensorFlow's tests keep strategies of several
        # sizes in a process apart by this attribute, too.
        key_base = {"_collective_key_base": 100 * num_replicas}
        kind = type("MirroredStrategy", (tf.distribute.MirroredStrategy,), key_base)
        return kind([f"CPU:{i}" for i in range(num_replicas)])

    return make
