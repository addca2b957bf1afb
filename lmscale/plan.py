"""Plans a run without making a table: python -m lmscale.plan --gin_file=quickstart.gin --device_memory_gib=16

Memory of each device by part, arithmetic and bytes of a step, what bounds it, whether a full softmax would be better
than a sampled one, and the fewest devices whose memory is enough. Exit codes: 0, whether the run fits or not; 2 a
mistake in flags, configuration or data.
"""

import json

from absl import flags

from lmscale.command_line import DEFINE_multi_path, run_main

_GIN_FILE = DEFINE_multi_path(
    "gin_file",
    [],
    "Configuration file, or the name of one of lmscale's own, such as quickstart.gin; may be given several times.",
)
_GIN_PARAM = flags.DEFINE_multi_string(
    "gin_param", [], "Override, such as LEARNING_RATE=0.001; may be repeated."
)
_DEVICES = flags.DEFINE_integer("devices", 1, "Number of devices.")
_DEVICE_MEMORY_GIB = flags.DEFINE_float("device_memory_gib", None, "Memory of each device, in GiB.")
# By default the rates of an NVIDIA A100 with 40 GB, without TensorFloat-32, on PCI Express 4.0 with 16 lanes.
_BANDWIDTH_GBPS = flags.DEFINE_float(
    "bandwidth_gbps", 25.0, "10^9 bytes a second that a device receives from others."
)
_TFLOPS = flags.DEFINE_float("tflops", 19.5, "10^12 operations a second of a device's matrix products.")
_MEMORY_BANDWIDTH_GBPS = flags.DEFINE_float(
    "memory_bandwidth_gbps", 1555.0, "10^9 bytes a second of a device's memory."
)
_JSON = flags.DEFINE_bool("json", False, "Print JSON alone.")


def main(argv):
    """Flags to a plan, printed."""
    del argv
    if not _GIN_FILE.value:
        raise ValueError(
            "--gin_file is required. Received: none. Pass for example --gin_file=quickstart.gin."
        )
    if _DEVICE_MEMORY_GIB.value is None:
        raise ValueError(
            "--device_memory_gib is required. Received: none. Pass for example --device_memory_gib=16."
        )
    if _DEVICES.value < 1:
        raise ValueError(
            f"--devices must be at least 1. Received: {_DEVICES.value}. Pass for example --devices=4."
        )
    # TensorFlow takes seconds to import: mistakes in flags come before.
    from lmscale import configuration
    from lmscale.planning.planner import make_plan
    from lmscale.planning.report import print_plan
    from lmscale.planning.work import Rates

    rates = Rates(
        tflops=_TFLOPS.value,
        memory_bandwidth_gbps=_MEMORY_BANDWIDTH_GBPS.value,
        bandwidth_gbps=_BANDWIDTH_GBPS.value,
    )
    config = configuration.load(_GIN_FILE.value, _GIN_PARAM.value)
    plan, memory = make_plan(
        config.experiment,
        num_devices=_DEVICES.value,
        device_memory_gib=_DEVICE_MEMORY_GIB.value,
        rates=rates,
    )
    if _JSON.value:
        print(json.dumps(plan))
    else:
        print_plan(plan, memory)
    return 0


def run():
    """Console script lmscale-plan."""
    run_main(main)


if __name__ == "__main__":
    run()
