"""Zero bubble H2: more microbatches in flight, so that no device waits once it has begun."""

from __future__ import annotations

from opensmp.compiler.schedule.actions import Schedule, TaskGraph
from opensmp.compiler.schedule.regular.on_graph import on_graph
from opensmp.compiler.schedule.regular.passes import BACKWARD, FORWARD, WEIGHTS, Passes, listed


def zb_h2(graph: TaskGraph, active_microbatches: int) -> Schedule:
    """Schedules so many forward passes ahead that each device is busy until the end.

    This is H2 of Qi et al., "Zero Bubble Pipeline Parallelism", 2024 (arXiv 2401.10241). Device d
    of P runs 2 (P - d) - 1 forward passes before its first backward pass, and its weight gradients
    d backward passes later. With passes of equal time, P <= M, a step takes 3 M + P - 1 of them,
    so the bubble is (P - 1) / (3 M + P - 1), the wait for the first microbatch; the first device
    holds the activations of 2 P - 1 microbatches, device d those of d fewer. Two devices, four
    microbatches; the first segment has no inputs to differentiate, so its B is not split:

        device 0 | F0 F1 F2 B0--- F3 B1--- B2--- .. B3---
        device 1 | .. F0 B0 F1 B1 W0 F2 B2 W1 F3 B3 W2 W3
        zb_h2: makespan 13 s, bubble 7.7 %, one column 1 s

    Args:
        graph: Any task graph; see `on_graph` for those that are no such chain.
        active_microbatches: Maximum number of microbatches in flight, >= 1.
    """
    return on_graph("zb_h2", graph, passes, active_microbatches, pieces=1)


def passes(num_devices: int, num_microbatches: int, pieces: int = 1) -> list[Passes]:
    """Returns the passes of each device, which has one piece."""
    return [_of_device(d, num_devices, num_microbatches) for d in range(num_devices)]


def _of_device(device: int, num_devices: int, num_microbatches: int) -> Passes:
    ahead = min(num_microbatches, 2 * (num_devices - device) - 1)
    late = min(num_microbatches, device)
    rows = [(FORWARD, 0, m) for m in range(ahead)]
    for m in range(num_microbatches):
        rows.append((BACKWARD, 0, m))
        if m >= late:
            rows.append((WEIGHTS, 0, m - late))
        if m + ahead < num_microbatches:
            rows.append((FORWARD, 0, m + ahead))
    rows += [(WEIGHTS, 0, m) for m in range(num_microbatches - late, num_microbatches)]
    return listed(rows)
