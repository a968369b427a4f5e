"""The schedule of a V with the least memory: a third of that of 1F1B."""

from __future__ import annotations

from opensmp.compiler.schedule.actions import Schedule, TaskGraph
from opensmp.compiler.schedule.regular.on_graph import on_graph
from opensmp.compiler.schedule.regular.passes import Passes, Turns, repeated


def v_min(graph: TaskGraph, active_microbatches: int) -> Schedule:
    """Sends each microbatch down the devices and back without delay, as few at once as possible.

    This is V-Min of Qi et al., "Pipeline Parallelism with Controllable Memory", 2024 (arXiv
    2405.15362). Each device has two pieces, the first device the first and the last one of the
    model. With passes of equal time and M >= P >= 2, a step takes 6 M + 4 P - 5 of them, one more
    if P is a multiple of 3: about as long as 1F1B. Every device holds the activations of at most
    (P + 2) / 3 microbatches, rounded up (two pieces each).

    Two devices, two microbatches; the first segment has no inputs to differentiate, so its B is
    not split:

        device 0 | 0F0 ... ... 3F0 3B0 3W0 0F1 0B0---- 3F1 3B1 3W1 ... 0B1----
        device 1 | ... 1F0 2F0 ... ... 2B0 1B0 1F1 2F1 1W0 2W0 2B1 1B1 1W1 2W1
        v_min: makespan 15 s, bubble 20.0 %, one column 1 s

    Args:
        graph: Any task graph; see `on_graph` for those that are no such chain.
        active_microbatches: Maximum number of microbatches in flight, >= 1.
    """
    return on_graph("v_min", graph, passes, active_microbatches, pieces=2)


def passes(num_devices: int, num_microbatches: int, pieces: int = 2) -> list[Passes]:
    """Returns the passes of each device, which has two pieces."""
    # Without the gaps, a multiple of 3 devices would have two passes at the same time.
    gap = 1 if num_devices % 3 else 3
    return repeated(Turns(1, 1, 1, 1, gap, 1, gap), num_devices, num_microbatches)
