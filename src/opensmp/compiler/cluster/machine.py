"""The numbers of the cost model for a device that was named, and how people read them."""

from __future__ import annotations

from dataclasses import replace

from opensmp.compiler.cluster.links import LINKS
from opensmp.compiler.format import format_bytes, format_seconds
from opensmp.compiler.plan.unit_graph import Machine
from opensmp.config.device import BANDWIDTH, DEVICES, FLOAT32, FLOPS, MEMORY, Device, Setting

MATMUL_SHARE = 0.78
"""Share of a device's peak that large matrix products reach.

From the gradients of weights, which are only products, in table 9 of Qi et al., "Zero Bubble
Pipeline Parallelism", 2024 (arXiv 2401.10241): 0.76 to 0.81 of an A100 in four models.
"""

_GPU_LAUNCH_SECONDS = 5e-6


def machine_of(setting: Setting, base: Machine | None = None, precision: str = FLOAT32) -> Machine:
    """Returns the numbers of the cost model for the configuration's `device`.

    Args:
        setting: The value of the key; None changes nothing.
        base: What the setting does not say.
        precision: Dtype of the matrix products, which decides how fast a device that has a name is.
    """
    base = base or Machine()
    if setting is None:
        return base
    if isinstance(setting, str):
        return machine_of_device(DEVICES[setting], base, precision)
    given = dict(setting)
    return replace(
        base,
        memory_bytes=int(given[MEMORY]) if MEMORY in given else base.memory_bytes,
        flops_per_second=given.get(FLOPS, base.flops_per_second),
        bytes_per_second=given.get(BANDWIDTH, base.bytes_per_second),
    )


def machine_of_device(device: Device, base: Machine, precision: str = FLOAT32) -> Machine:
    """Returns the numbers of a known device, which is linked to others of its machine."""
    link = LINKS[device.link]
    return replace(
        base,
        memory_bytes=device.memory_bytes,
        flops_per_second=MATMUL_SHARE * device.flops_of(precision),
        narrow_flops_per_second=None,
        bytes_per_second=device.bytes_per_second,
        operation_seconds=_GPU_LAUNCH_SECONDS,
        transfer_seconds=link.latency_seconds,
        transfer_bytes_per_second=link.reached_bytes_per_second,
    )


def assumptions(machine: Machine) -> str:
    """Returns one line with the numbers that a prediction is made with."""
    memory = machine.memory_bytes
    limit = "memory without limit" if memory is None else f"{format_bytes(memory)} of memory"
    return (
        f"assumed: {rate(machine.flops_per_second, 'FLOP/s')}, "
        f"{rate(machine.bytes_per_second, 'B/s')} of memory bandwidth, {limit}; "
        f"{format_seconds(machine.operation_seconds)} an operation; transfers "
        f"{format_seconds(machine.transfer_seconds)} + "
        f"{rate(machine.transfer_bytes_per_second, 'B/s')}"
    )


def rate(value: float, unit: str) -> str:
    """Formats a rate with the prefix of its unit: `"3.35 TB/s"`."""
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= 0.9995 * size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"
