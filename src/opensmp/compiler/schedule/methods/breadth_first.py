"""The breadth-first schedule: all microbatches go through a piece before the next one begins."""

from __future__ import annotations

import numpy as np

from opensmp.compiler.schedule.actions import Schedule, TaskGraph
from opensmp.compiler.schedule.regular.on_graph import on_graph
from opensmp.compiler.schedule.regular.passes import BACKWARD, FORWARD, WEIGHTS, Passes


def breadth_first(graph: TaskGraph, active_microbatches: int | None = None) -> Schedule:
    """Runs all microbatches through the first piece of each device, then through the second ones.

    This is the schedule of Lamy-Poirier, "Breadth-First Pipeline Parallelism", 2022 (arXiv
    2211.05953), for devices with several pieces in turn. Backward passes run from the last piece to
    the first, all microbatches of a piece at a time. Each piece is needed once in each direction,
    and what it sends has the time of the other microbatches to arrive. With P devices, V pieces
    each, M >= P microbatches and whole backward passes the bubble is (P - 1) / (V M + P - 1), as
    small as that of interleaved 1F1B; every device holds the activations of all M microbatches. Two
    devices with two pieces, two microbatches:

        device 0 | 0F0 0F1 2F0 2F1 ... ... ... 2B0---- 2B1---- 0B0---- 0B1----
        device 1 | ... 1F0 1F1 3F0 3F1 3B0---- 3B1---- 1B0---- 1B1---- ... ...
        breadth_first: makespan 15 s, bubble 20.0 %, one column 1 s

    With one piece for each device it is `simple`.

    Args:
        graph: Any task graph; see `on_graph` for those that are no such chain.
        active_microbatches: Ignored: all microbatches are in flight.
    """
    return on_graph("breadth_first", graph, passes, max(1, len(graph.microbatches)))


def passes(num_devices: int, num_microbatches: int, pieces: int = 1) -> list[Passes]:
    """Returns the passes of each device, which are the same for all."""
    microbatch = np.arange(num_microbatches)
    blocks = [(np.array([FORWARD]), piece) for piece in range(pieces)]
    blocks += [(np.array([BACKWARD, WEIGHTS]), piece) for piece in reversed(range(pieces))]
    rows = [
        np.stack(
            np.broadcast_arrays(kinds[np.newaxis, :], piece, microbatch[:, np.newaxis]), axis=-1
        ).reshape(-1, 3)
        for kinds, piece in blocks
    ]
    return [np.concatenate(rows).astype(np.int32)] * num_devices
