"""The zero-bubble schedule of a V: no more memory than 1F1B, and almost no bubble."""

from __future__ import annotations

from opensmp.compiler.schedule.actions import Schedule, TaskGraph
from opensmp.compiler.schedule.regular.on_graph import on_graph
from opensmp.compiler.schedule.regular.passes import Passes, Turns, repeated


def zb_v(graph: TaskGraph, active_microbatches: int) -> Schedule:
    """Sends each microbatch down the devices and back up again, with passes packed without gaps.

    This is ZB-V of Qi et al., "Zero Bubble Pipeline Parallelism", 2024 (arXiv 2401.10241, section
    6), made from a building block as in "Pipeline Parallelism with Controllable Memory" (Qi et al.,
    2024, arXiv 2405.15362). Each device has two pieces, the first device the first and the last one
    of the model. With passes of equal time and M >= P >= 2, a step takes 6 M + 2 P - 3 of them, so
    the bubble is (2 P - 3) / (6 M + 2 P - 3). Every device holds the activations of P microbatches
    (2 P of pieces), as the first one does with 1F1B.

    Two devices, three microbatches; the first segment has no inputs to differentiate, so its B is
    not split:

        device 0 | 0F0 0F1 ... 3F0 3B0 3W0 0F2 3F1 3B1 0B0---- 3W1 3F2 3B2 0B1---- 3W2 0B2----
        device 1 | ... 1F0 2F0 1F1 2F1 2B0 1B0 1W0 2W0 1F2 2F2 2B1 1B1 1W1 2W1 2B2 1B2 1W2 2W2
        zb_v: makespan 19 s, bubble 5.3 %, one column 1 s

    Args:
        graph: Any task graph; see `on_graph` for those that are no such chain.
        active_microbatches: Maximum number of microbatches in flight, >= 1.
    """
    return on_graph("zb_v", graph, passes, active_microbatches, pieces=2)


def passes(num_devices: int, num_microbatches: int, pieces: int = 2) -> list[Passes]:
    """Returns the passes of each device, which has two pieces."""
    return repeated(Turns(3, 3, 3, 3, 1, 1, 1), num_devices, num_microbatches)
