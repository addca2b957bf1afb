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


def pytest_make_parametrize_id(config, val, argname):
    """Names bytes by their argument: what a compressor wrote may hold the time of its writing, and
    the workers of one run must collect the same names."""
    return argname if isinstance(val, bytes) else None


@pytest.fixture(scope="session")
def mirrored():
    """mirrored(n): a MirroredStrategy over n CPU devices, the same object at each call."""
    from lmscale.distribution.strategies import mirrored_strategy

    return lambda num_replicas: mirrored_strategy(tuple(f"CPU:{i}" for i in range(num_replicas)))
