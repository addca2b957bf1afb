import re
import socket
import subprocess
import sys
from pathlib import Path
from urllib.error import URLError

import pytest
import tensorflow as tf
from tpu_stand_in import Resolver

from lmscale.distribution import strategies
from lmscale.distribution.strategies import limit_gpu_memory, make_strategy

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


class FakeGpus:
    """Two GPUs in place of TensorFlow's configuration, which keeps what is asked for."""

    def __init__(self, monkeypatch, *, started=False):
        self.growing, self.limits, self.visible = [], {}, None
        self._started = started
        monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: [f"{kind}:0", f"{kind}:1"])
        monkeypatch.setattr(
            tf.config, "list_logical_devices", lambda kind: [tf.config.LogicalDevice("GPU:0", "GPU")]
        )
        monkeypatch.setattr(tf.config, "set_logical_device_configuration", self._limit)
        monkeypatch.setattr(tf.config, "set_visible_devices", self._show)
        monkeypatch.setattr(tf.config.experimental, "set_memory_growth", self._grow)
        monkeypatch.setattr(strategies, "mirrored_strategy", lambda devices: devices)

    def _check(self):
        if self._started:
            raise RuntimeError("cannot be modified after being initialized")

    def _grow(self, gpu, enable):
        self._check()
        assert enable
        self.growing.append(gpu)

    def _limit(self, device, parts):
        self._check()
        self.limits[device] = [part.memory_limit for part in parts]

    def _show(self, devices, kind):
        self._check()
        self.visible = (devices, kind)


def test_gpus_are_shared_by_growing_memory_or_by_a_limit(monkeypatch):
    gpus = FakeGpus(monkeypatch)
    assert make_strategy() == ("GPU:0",)
    assert (gpus.growing, gpus.limits, gpus.visible) == (["GPU:0", "GPU:1"], {}, None)
    gpus = FakeGpus(monkeypatch)
    make_strategy(gpu_memory_mib=4000)
    # TensorFlow refuses both for one device.
    assert (gpus.growing, gpus.limits, gpus.visible) == ([], {"GPU:0": [4000], "GPU:1": [4000]}, None)


def test_cpu_devices_leave_gpus_alone(monkeypatch):
    gpus = FakeGpus(monkeypatch)
    assert make_strategy(cpu_devices=2) == ("CPU:0", "CPU:1")
    assert (gpus.growing, gpus.limits, gpus.visible) == ([], {"CPU:0": [None, None]}, ([], "GPU"))


def test_gpus_that_were_started_before(monkeypatch):
    gpus = FakeGpus(monkeypatch, started=True)
    assert make_strategy() == ("GPU:0",)
    assert gpus.growing == []
    with pytest.raises(
        ValueError, match=r"gpu_memory_mib=5 must be set before TensorFlow starts .* make_strategy first"
    ):
        make_strategy(gpu_memory_mib=5)


def test_gpu_memory_that_cannot_be_reserved(monkeypatch):
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: [])
    with pytest.raises(
        ValueError, match=r"needs a GPU that TensorFlow sees. Received: gpu_memory_mib=5 and none"
    ):
        limit_gpu_memory(5)
    with pytest.raises(ValueError, match=r"gpu_memory_mib must be at least 1. Received: gpu_memory_mib=0\."):
        limit_gpu_memory(0)
    with pytest.raises(
        ValueError, match=r"gpu_memory_mib is for runs on GPUs. Received also: cpu_devices=2\."
    ):
        make_strategy(cpu_devices=2, gpu_memory_mib=5)


@pytest.mark.parametrize("text", ["", "rubbish", "5", '{"cluster": 5}'])
def test_a_cluster_that_tensorflow_refuses_is_named(monkeypatch, text):
    monkeypatch.setenv("TF_CONFIG", text)
    with pytest.raises(
        ValueError, match=rf"TF_CONFIG in the environment must .* Received: '{text}'.* Unset it"
    ):
        make_strategy(cpu_devices=1)
    monkeypatch.setenv(
        "TF_CONFIG", '{"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": 1}}'
    )
    assert make_strategy(cpu_devices=1).num_replicas_in_sync == 1


# ------------------------------------------------------------------------------------------------------- TPUs


@pytest.mark.skipif(
    bool(tf.config.list_physical_devices("TPU_SYSTEM")), reason="this TensorFlow has support for TPUs"
)
def test_a_tensorflow_without_tpus_is_named_by_the_command():
    """TensorFlow's own error, in a process of its own."""
    process = subprocess.run(
        [sys.executable, "-m", "lmscale.train", "--gin_file=quickstart.gin", "--dry_run", "--tpu=local"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert process.returncode == 2
    (message,) = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert message.startswith(
        "error: The TPU of this machine must answer. Received: TPUs not found in the cluster"
    )
    assert (
        f"The installed TensorFlow {tf.__version__} has no support for TPUs. Install tensorflow-tpu"
        in message
    )
    assert "launch/setup.sh --tpu; or leave out --tpu." in message


def test_a_worker_that_does_not_answer_is_named():
    with socket.socket() as closed:  # Bound, and listening to nobody.
        closed.bind(("127.0.0.1", 0))
        address = f"grpc://127.0.0.1:{closed.getsockname()[1]}"
        with pytest.raises(
            ValueError,
            match=rf"The TPU '{address}' must answer at {address}. Received: .*refused.* give --tpu=local",
        ):
            make_strategy(tpu=address)


class FakeTpu:
    """In place of what asks for a TPU: notes the calls, and raises what it is told to."""

    def __init__(self, monkeypatch, *, find=None, initialise=None):
        self.calls = []

        def resolver(tpu):
            self.calls.append(f"find {tpu}")
            if find is not None:
                raise find
            return Resolver(2)

        def initialize(resolver):
            self.calls.append("initialise")
            if initialise is not None:
                raise initialise

        monkeypatch.setattr(tf.distribute.cluster_resolver, "TPUClusterResolver", resolver)
        monkeypatch.setattr(tf.tpu.experimental, "initialize_tpu_system", initialize)
        monkeypatch.setattr(
            tf.config, "experimental_connect_to_cluster", lambda resolver: self.calls.append("connect")
        )


def test_a_tpu_is_found_connected_and_initialised(monkeypatch):
    tpu = FakeTpu(monkeypatch)
    strategy = make_strategy(tpu="local")
    assert isinstance(strategy, tf.distribute.TPUStrategy)
    assert strategy.num_replicas_in_sync == 2
    assert tpu.calls == ["find local", "initialise"]

    tpu = FakeTpu(monkeypatch)
    with socket.create_server(("127.0.0.1", 0)) as worker:
        monkeypatch.setattr(Resolver, "master", lambda self: f"grpc://127.0.0.1:{worker.getsockname()[1]}")
        assert make_strategy(tpu="mine").num_replicas_in_sync == 2
    assert tpu.calls == ["find mine", "connect", "initialise"]


def test_a_name_that_nobody_knows(monkeypatch):
    FakeTpu(monkeypatch, find=URLError("Name or service not known"))
    with pytest.raises(
        ValueError,
        match=r"The TPU 'mine' must be found by its name, .* Received: .*service not known.* give --tpu=local",
    ):
        make_strategy(tpu="mine")


# What libtpu says, as TensorFlow passes it on.
@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            tf.errors.AbortedError(
                None, None, "The TPU is already in use by process with pid 4321. Not loading"
            ),
            r"Received: The TPU is already in use by process with pid 4321.* Another process holds the TPU. End it",
        ),
        (
            tf.errors.InternalError(
                None,
                None,
                "Graph execution error:\n\nDetected at node x defined at (most recent call last):\n"
                "<stack traces unavailable>\nRET_CHECK failure (tpu_node_interfaces.cc:432) *platform",
            ),
            r"Received: RET_CHECK failure \(tpu_node_interfaces.cc:432\) \*platform. .*found no TPU",
        ),
    ],
)
def test_a_tpu_that_does_not_start(monkeypatch, error, told):
    FakeTpu(monkeypatch, initialise=error)
    with pytest.raises(ValueError, match=told) as raised:
        make_strategy(tpu="local")
    assert str(raised.value).endswith("; or leave out --tpu.")


def test_a_tpu_beside_other_devices_is_refused():
    with pytest.raises(
        ValueError, match=r"tpu is for runs on TPUs. Received also: cpu_devices=2. Leave out --tpu"
    ):
        make_strategy(tpu="local", cpu_devices=2)
    with pytest.raises(ValueError, match=r"Received also: gpu_memory_mib=5. .* or --gpu_memory_mib"):
        make_strategy(tpu="local", gpu_memory_mib=5)
    with pytest.raises(ValueError, match=r"tpu must be `local`, a name or an address. Received: tpu=''"):
        make_strategy(tpu="")
