"""The schedule of a V with half the memory of 1F1B."""

from __future__ import annotations

from opensmp.compiler.schedule.actions import Schedule, TaskGraph
from opensmp.compiler.schedule.regular.on_graph import on_graph
from opensmp.compiler.schedule.regular.passes import Passes, Turns, repeated


def v_half(graph: TaskGraph, active_microbatches: int) -> Schedule:
    """Sends each microbatch down the devices and back with half the activations of 1F1B.

    This is V-Half of Qi et al., "Pipeline Parallelism with Controllable Memory", 2024 (arXiv
    2405.15362). Each device has two pieces, the first device the first and the last one of the
    model. With passes of equal time and M > P >= 2, a step takes 6 M + (7 P - 6) / 2 of them, or
    6 M + (7 P - 9) / 2 if P is odd; every device holds the activations of at most P // 2 + 1
    microbatches (two pieces each).

    Two devices, two microbatches; the first segment has no inputs to differentiate, so its B is
    not split:

        device 0 | 0F0 ... ... 3F0 0F1 3B0 3W0 3F1 ... 0B0---- 3B1 3W1 ... 0B1----
        device 1 | ... 1F0 2F0 ... ... 1F1 2F1 2B0 1B0 1W0 2W0 ... 2B1 1B1 1W1 2W1
        v_half: makespan 16 s, bubble 25.0 %, one column 1 s

    Args:
        graph: Any task graph; see `on_graph` for those that are no such chain.
        active_microbatches: Maximum number of microbatches in flight, >= 1.
    """
    return on_graph("v_half", graph, passes, active_microbatches, pieces=2)


def passes(num_devices: int, num_microbatches: int, pieces: int = 2) -> list[Passes]:
    """Returns the passes of each device, which has two pieces."""
    # The block has a gap of a device where an even number of them would meet itself.
    gaps = (2, 1, 1) if num_devices % 2 else (2, 4, 1)
    return repeated(Turns(2, 1, 2, 1, *gaps), num_devices, num_microbatches)
