"""A plan as tables and sentences."""

from rich.console import Console
from rich.table import Table

from lmscale.parameters.report import mib
from lmscale.planning.memory import LASTING, PASSING

_WIDTH = 140
_MEANING = {
    "compute": "products, GFLOP",
    "memory bandwidth": "read and written in memory, MB",
    "network": "received from other devices, MB",
}


def memory_table(memory, *, num_devices):
    """Memory of a device as a `rich.table.Table`.

    Args:
      memory: `DeviceMemory`.
      num_devices: N.
    """
    phase = memory.largest_of_step
    table = Table(title=f"Memory of each of {num_devices} device(s), MiB", title_justify="left")
    table.add_column("part")
    for name in ("at most", f"in a step, at its most ({phase})", "in an evaluation"):
        table.add_column(name, justify="right")
    for part, meaning in LASTING.items():
        table.add_row(meaning, *[mib(memory.lasting[part])] * 3)
    for part, meaning in PASSING.items():
        numbers = (
            memory.most_of_part(part),
            memory.phases[phase].get(part, 0),
            memory.phases["evaluate"].get(part, 0),
        )
        if numbers[0]:
            table.add_row(f"{meaning} (estimate)", *(mib(number) if number else "" for number in numbers))
    table.add_row("in all", mib(memory.peak_bytes), mib(memory.step_bytes), mib(memory.evaluation_bytes))
    return table


def print_plan(plan, memory):
    """Prints what `make_plan` returned."""
    console = Console(width=_WIDTH)
    console.print(memory_table(memory, num_devices=plan["devices"]))
    console.print(
        f"Beside it, in the memory of the host: libraries, code and graphs. This process has {plan['code_mib']:,.0f} "
        "MiB of them; a run on one device has about as many, on four logical devices of a CPU some 100 MiB more."
    )
    if plan["has_unknown_sizes"]:
        console.print("Some values of body or heads have sizes that depend on data: they are not counted.")
    console.print(_work_table(plan))
    console.print(
        f"Bottleneck: {plan['bottleneck']}, by the rates {plan['rates']['tflops']:g} TFLOP/s, memory "
        f"{plan['rates']['memory_bandwidth_gbps']:g} GB/s, network {plan['rates']['bandwidth_gbps']:g} GB/s."
    )
    for name, head in plan["heads"].items():
        better = "full" if head["full_is_better"] else "sampled"
        console.print(
            f"Head {name}, {head['vocab_size']:,} rows: the {better} softmax is the better choice. A full "
            f"softmax takes no more time up to {head['turns_at_rows']:,} rows; no more operations up to "
            f"{head['turns_at_rows_by_flops']:,}."
        )
    limit, needed = plan["device_memory_gib"], plan["memory_mib"]["peak"] / 1024
    console.print(
        f"{'Fits' if plan['fits'] else 'Does not fit'}: {plan['devices']} device(s) of {limit:g} GiB, of which the "
        f"run needs {needed:,.2f} GiB each."
    )
    fewest = plan["fewest_devices"]
    console.print(
        f"Fewest devices of {limit:g} GiB: {fewest}."
        if fewest
        else f"No number of devices of {limit:g} GiB is enough with this batch: each needs a copy of the "
        "layers, and its part of the batch."
    )


def _work_table(plan):
    table = Table(title=f"A step, on each of {plan['devices']} device(s)", title_justify="left")
    table.add_column("what")
    table.add_column("amount", justify="right")
    table.add_column("ms, by the rate", justify="right")
    amounts = {
        "compute": plan["work"]["product_flops"] / 1e9,
        "memory bandwidth": plan["work"]["memory_bytes"] / 1e6,
        "network": plan["work"]["network_bytes"] / 1e6,
    }
    for resource, amount in amounts.items():
        table.add_row(_MEANING[resource], f"{amount:,.3f}", f"{plan['secs'][resource] * 1e3:,.4f}")
    return table
