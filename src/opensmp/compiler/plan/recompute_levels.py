"""What recomputation saves and costs in a plan, and how much of it a memory limit asks for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from opensmp.compiler.plan.settings import PlanSettings
from opensmp.compiler.plan.unit_graph import CoarseGraph
from opensmp.compiler.recomputation.policy import Policy
from opensmp.config.recompute import AUTO, FULL, NONE, SELECTIVE


class Recomputed(NamedTuple):
    """What recomputation changes in each unit; arrays have one entry per unit.

    Attributes:
        kept_bytes: Residuals that are kept for each microbatch in flight.
        passing_bytes: The other residuals, which exist once, while a backward pass runs.
        seconds: Time that is added to the backward pass of a microbatch.
    """

    kept_bytes: NDArray[np.int64]
    passing_bytes: NDArray[np.int64]
    seconds: NDArray[np.float64]


class Choice(NamedTuple):
    """How a partition recomputes.

    Attributes:
        level: The level of the microbatches that recompute.
        recomputed: How many of the microbatches in memory do; the others keep everything.
    """

    level: str = NONE
    recomputed: int = 0

    def level_of(self, microbatch: int, held: int) -> str:
        """Returns the level of one microbatch.

        Of any `held` microbatches in a row, `recomputed` ones recompute.
        """
        return self.level if microbatch % held < self.recomputed else NONE


def recomputed(
    graph: CoarseGraph, settings: PlanSettings, placed: NDArray[np.int64] | None = None
) -> Recomputed:
    """Returns what the settings recompute in each unit.

    Args:
        graph: The units.
        settings: The settings; `"auto"` counts as nothing here, see `choices`.
        placed: The partition of each unit; None if it is not known yet, then only the levels of
            layers and the default count.
    """
    policy = Policy.of(settings.recompute)
    labels = graph.layers or ("*",) * len(graph)
    partitions = [-1] * len(graph) if placed is None else placed.tolist()
    levels = [
        policy.level(partition, label or "*")
        for partition, label in zip(partitions, labels, strict=True)
    ]
    return of_levels(graph, levels)


def of_levels(graph: CoarseGraph, levels: list[str]) -> Recomputed:
    """Returns what levels of units change; see `recomputed`."""
    kept = graph.residual_bytes.astype(np.int64)
    seconds = np.zeros(len(graph))
    selective = np.array([level == SELECTIVE for level in levels], dtype=bool)
    full = np.array([level == FULL for level in levels], dtype=bool)
    if graph.selective_bytes is not None:
        kept = np.where(selective, np.minimum(graph.selective_bytes, kept), kept)
    if graph.selective_seconds is not None:
        seconds = np.where(selective, graph.selective_seconds, seconds)
    least = np.zeros_like(kept) if graph.full_bytes is None else graph.full_bytes
    kept = np.where(full, np.minimum(least, kept), kept)
    trains = graph.backward_seconds > 0
    seconds = np.where(full & trains, graph.forward_seconds, seconds)
    return Recomputed(kept, graph.residual_bytes - kept, seconds)


def choices(
    graph: CoarseGraph,
    placed: NDArray[np.int64],
    peaks: NDArray[np.int64],
    resident: Sequence[int],
    settings: PlanSettings,
) -> tuple[Choice, ...]:
    """Returns the least recomputation with which each partition fits the memory.

    Selective recomputation comes before full one, and few microbatches before many. A partition
    that does not fit at all recomputes everything.

    Args:
        graph: The units.
        placed: The partition of each unit.
        peaks: Peak memory of each partition without recomputation.
        resident: Of how many microbatches in flight each partition has the residuals in memory.
        settings: The settings; `"auto"` with a memory limit, otherwise nothing is chosen.
    """
    cap = settings.machine.memory_bytes
    found = [Choice()] * len(peaks)
    if settings.recompute != AUTO or cap is None:
        return tuple(found)
    saved = {level: savings(graph, placed, len(peaks), level) for level in (SELECTIVE, FULL)}
    for partition in np.flatnonzero(peaks > cap):
        excess, held = int(peaks[partition]) - cap, resident[int(partition)]
        found[partition] = Choice(FULL, held)
        for level in (SELECTIVE, FULL):
            # What is recomputed exists once, beside what the others keep.
            each = int(saved[level][partition])
            needed = 1 - (-excess // each) if each else held + 1
            if needed <= held:
                found[partition] = Choice(level, needed)
                break
    return tuple(found)


def savings(
    graph: CoarseGraph, placed: NDArray[np.int64], num_partitions: int, level: str
) -> NDArray[np.int64]:
    """Returns the bytes of a microbatch that a level does not keep in each partition."""
    passing = of_levels(graph, [level] * len(graph)).passing_bytes
    saved = np.zeros(num_partitions, dtype=np.int64)
    np.add.at(saved, placed, passing)
    return saved
