"""FLOPs and bytes of one operation, from its type, attributes and shapes."""

from __future__ import annotations

from opensmp.compiler.costs.families import FAMILIES, UNKNOWN
from opensmp.compiler.costs.work import Call


def formula(call: Call) -> tuple[float, float] | None:
    """Returns FLOPs and bytes of an operation, or None if there is no formula for its type."""
    found = FAMILIES.get(call.type, UNKNOWN).formula
    return None if found is None else found(call)


def default(call: Call) -> tuple[float, float]:
    """Returns FLOPs and bytes of an operation of unknown type, counted as elementwise."""
    return float(call.elements), call.read + call.written


def narrow_flops(call: Call, flops: float) -> float:
    """Returns the FLOPs of a grouped convolution per channel of a group; 0 for other operations.

    Keras compiles grouped convolutions with XLA, and XLA for CPUs turns them into scalar loops,
    which approach matrix products only as the groups get wide
    (`xla/service/cpu/ir_emission_utils.cc`). `DepthwiseConv2dNative` has its own kernel and is
    excluded.
    """
    if call.type not in ("Conv2D", "Conv3D"):
        return 0.0
    layout = call.attribute("data_format")
    layout = layout.decode() if isinstance(layout, bytes) else layout
    channels = call.inputs[0].shape[1 if layout.startswith("NC") else -1]
    of_group = call.inputs[1].shape[-2]
    return flops / max(of_group, 1) if of_group < channels else 0.0
