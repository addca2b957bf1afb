import re
import subprocess
import sys

import pytest
import tensorflow as tf

from lmscale.distribution.strategies import make_strategy

# In a process of its own, where TensorFlow has not started its devices yet.
_FRESH_PROCESS = """
import sys, tensorflow as tf
from lmscale.distribution.strategies import make_strategy
strategy = make_strategy(cpu_devices=3)
def where():
    return tf.distribute.get_replica_context().replica_id_in_sync_group + tf.constant(0)
places = [x.device[-5:] for x in strategy.experimental_local_results(strategy.run(where))]
print(strategy.num_replicas_in_sync, *places, len(tf.config.list_logical_devices("CPU")))
"""


def test_the_cpu_is_split_into_as_many_devices_as_asked():
    process = subprocess.run(
        [sys.executable, "-c", _FRESH_PROCESS], capture_output=True, text=True, check=True
    )
    assert process.stdout.split() == ["3", "CPU:0", "CPU:1", "CPU:2", "3"]


def test_devices_that_were_started_before_serve():
    assert make_strategy(cpu_devices=2).num_replicas_in_sync == 2


def test_more_devices_than_were_started_are_refused():
    started = len(tf.config.list_logical_devices("CPU"))
    message = f"cpu_devices={started + 1} must be set before TensorFlow starts .* {started} CPU device"
    with pytest.raises(ValueError, match=message):
        make_strategy(cpu_devices=started + 1)


@pytest.mark.parametrize("cpu_devices", [0, -2])
def test_fewer_than_one_device_is_refused(cpu_devices):
    with pytest.raises(
        ValueError, match=re.escape(f"cpu_devices must be at least 1. Received: cpu_devices={cpu_devices}.")
    ):
        make_strategy(cpu_devices=cpu_devices)


def test_without_a_number_every_gpu_is_used_or_one_cpu_device():
    gpus = tf.config.list_logical_devices("GPU")
    strategy = make_strategy()
    assert strategy.num_replicas_in_sync == max(1, len(gpus))
    assert ("GPU" if gpus else "CPU:0") in strategy.extended.worker_devices[0]
