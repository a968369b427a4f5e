"""The interleaved schedule (1F1B): ready backward passes run before forward passes."""

from __future__ import annotations

from opensmp.compiler.schedule.actions import Action, Schedule, TaskGraph
from opensmp.compiler.schedule.interleaving import by_turns, quickest
from opensmp.compiler.schedule.list_scheduling import draft

# A recomputation ranks as the backward pass that follows it; weight gradients run right after their
# backward pass.
_RANK = {"W": 0, "B": 1, "R": 1, "F": 2}


def interleaved(graph: TaskGraph, active_microbatches: int) -> Schedule:
    """Runs ready backward passes first: one forward, one backward (1F1B) in steady state.

    This is the schedule of PipeDream-Flush (Narayanan et al., "Memory-Efficient Pipeline-Parallel
    DNN Training", 2021). Its bubble equals that of `simple`, but only microbatches in flight hold
    activations. Three devices, four microbatches, at most three in flight:

        device 0 | F0 F1 F2 .. .. .. .. B0--- F3 B1--- .. B2--- .. B3---
        device 1 | .. F0 F1 F2 .. B0--- .. B1--- F3 B2--- .. B3--- .. ..
        device 2 | .. .. F0 B0--- F1 B1--- F2 B2--- F3 B3--- .. .. .. ..
        interleaved: makespan 18 s, bubble 33.3 %, one column 1 s

    Among actions of a kind, the oldest microbatch goes first, so that it finishes early. Split
    backward passes stay together: the weight gradients (W) follow the input gradients (B)
    immediately, while the latter are being sent. If devices have several segments each, forward and
    backward passes alternate if that is faster: interleaved 1F1B, see `by_turns`.

    Args:
        graph: Any task graph.
        active_microbatches: Maximum number of microbatches in flight, >= 1; the number of devices
            is the minimum that fills a chain. Dependencies between microbatches can require more;
            the schedule records the bound that it needs.
    """
    return quickest(
        graph,
        [
            draft(
                graph,
                name="interleaved",
                priority=priority,
                active_microbatches=active_microbatches,
            )
            for priority in (backward_first, by_turns(graph))
        ],
    )


def backward_first(action: Action) -> tuple[int, ...]:
    """Priority: weight gradients, then backward passes and recomputations, then forward passes."""
    along_the_pass = action.segment if action.kind == "F" else -action.segment
    return (_RANK[action.kind], action.microbatch, action.call, along_the_pass)
