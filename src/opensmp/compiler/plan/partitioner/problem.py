"""The partitioning problem in integers, so that every machine finds the same plan."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from opensmp.compiler.plan.cost_model import bytes_of_units, links_of
from opensmp.compiler.plan.recompute_levels import recomputed
from opensmp.compiler.plan.settings import PlanSettings
from opensmp.compiler.plan.unit_graph import CoarseGraph

# Sums up to this number of ticks, including products with microbatches, are exact in float64.
_MOST_TICKS = 2.0**50


class Score(NamedTuple):
    """Score of an assignment; lower is better.

    Attributes:
        excess_bytes: Bytes above the memory limit, summed over all devices.
        cost: Ticks per step, or bytes of the fullest device if these are minimised.
        tie: The other one of the two.
    """

    excess_bytes: int
    cost: int
    tie: int


@dataclass(frozen=True, eq=False)
class Problem:
    """Units and links with their costs; times are integer ticks of `seconds_per_tick`.

    Sums of floats differ between processors, and near ties could then be decided differently by the
    processes of one run; integers avoid that.

    A link is a tensor, or a variable of several units: it has a home unit and units that read it.
    `ticks` and `bytes` have one entry per unit, `links` and `readers` one per reader of a link, all
    other arrays one per link.

    Attributes:
        num_partitions: Number of partitions, none of which may be empty.
        microbatches: Microbatches per step.
        ticks: Compute time of each unit, int64.
        bytes: Peak memory of each unit, int64.
        homes: Unit that produces each link.
        forward_ticks: Transfer cost of a link for each other partition that reads it.
        backward_ticks: Cost for its home of the gradient from each such partition.
        received_bytes: Bytes that a link takes in each other partition that reads it.
        sent_bytes: Bytes that it takes at its home if any other partition reads it.
        ordered: Whether readers come after the home; false for variables.
        links: Link of each reader, ascending.
        readers: Unit of each reader.
        memory_bytes: Memory limit, None for no limit.
        minimise_bytes: Whether the cost is the fullest device instead of the step time.
        seconds_per_tick: Length of a tick.
    """

    num_partitions: int
    microbatches: int
    ticks: NDArray[np.int64]
    bytes: NDArray[np.int64]
    homes: NDArray[np.int64]
    forward_ticks: NDArray[np.int64]
    backward_ticks: NDArray[np.int64]
    received_bytes: NDArray[np.int64]
    sent_bytes: NDArray[np.int64]
    ordered: NDArray[np.bool_]
    links: NDArray[np.int64]
    readers: NDArray[np.int64]
    memory_bytes: int | None
    minimise_bytes: bool
    seconds_per_tick: float

    def __len__(self) -> int:
        return len(self.ticks)

    @cached_property
    def successors(self) -> list[list[int]]:
        """For each unit, the units that read its tensors, ascending."""
        return self._neighbours(self.homes[self.links], self.readers)

    @cached_property
    def predecessors(self) -> list[list[int]]:
        """For each unit, the units whose tensors it reads, ascending."""
        return self._neighbours(self.readers, self.homes[self.links])

    def _neighbours(self, of: NDArray[np.int64], to: NDArray[np.int64]) -> list[list[int]]:
        tensors = self.ordered[self.links]
        pairs = np.unique(np.stack([of[tensors], to[tensors]], axis=1), axis=0)
        ends = np.searchsorted(pairs[:, 0], np.arange(len(self) + 1))
        flat = pairs[:, 1].tolist()
        return [flat[a:b] for a, b in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)]

    def readers_of(self, link: int) -> NDArray[np.int64]:
        """Returns the units that read a link."""
        first, last = np.searchsorted(self.links, [link, link + 1])
        return self.readers[first:last]

    def loads(self, placed: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Returns ticks and bytes of each partition."""
        count = self.num_partitions
        present = np.zeros(len(self.homes) * count, dtype=np.bool_)
        present[self.links * count + placed[self.readers]] = True
        pairs = np.flatnonzero(present)
        links, readers = pairs // count, pairs % count
        remote = readers != placed[self.homes[links]]
        links, readers = links[remote], readers[remote]
        homes, sent = placed[self.homes[links]], links[np.diff(links, prepend=-1) > 0]
        ticks = (
            np.bincount(placed, self.ticks, count)
            + np.bincount(readers, self.forward_ticks[links], count)
            + np.bincount(homes, self.backward_ticks[links], count)
        )
        held = (
            np.bincount(placed, self.bytes, count)
            + np.bincount(readers, self.received_bytes[links], count)
            + np.bincount(placed[self.homes[sent]], self.sent_bytes[sent], count)
        )
        return ticks.astype(np.int64), held.astype(np.int64)

    def score(self, placed: NDArray[np.int64]) -> Score:
        """Returns the score of an assignment."""
        ticks, held = self.loads(placed)
        return self.score_of(ticks.tolist(), held.tolist())

    def score_of(self, ticks: Sequence[int], held: Sequence[int]) -> Score:
        """Returns the score of an assignment with these ticks and bytes of each partition."""
        step = sum(ticks) + (self.microbatches - 1) * max(ticks)
        if self.minimise_bytes:
            return Score(0, max(held), step)
        cap, fullest = self.memory_bytes, max(held)
        if cap is None or fullest <= cap:
            return Score(0, step, fullest)
        return Score(sum(max(0, size - cap) for size in held), step, fullest)


def price(graph: CoarseGraph, num_partitions: int, settings: PlanSettings) -> Problem:
    """Formulates the problem of minimizing the step time of a graph, in integers.

    Each partition counts with as many microbatches as are in flight, which none exceeds.
    """
    machine, microbatches = settings.machine, settings.microbatches
    held = settings.microbatches_in_flight(num_partitions)
    links = list(links_of(graph, held))
    forward = [link.forward_seconds(machine) for link in links]
    backward = [link.backward_seconds(machine) for link in links]
    readers = [sorted(set(link.readers) - {link.home}) for link in links]
    again = recomputed(graph, settings)
    seconds = (graph.forward_seconds + graph.backward_seconds + again.seconds).tolist()
    transfers = [(f + b) * len(r) for f, b, r in zip(forward, backward, readers, strict=True)]
    most = math.fsum(seconds + transfers) * max(microbatches, 1)
    scale = 2.0 ** math.floor(math.log2(_MOST_TICKS / most)) if most > 0 else 1.0
    return Problem(
        num_partitions=min(num_partitions, len(graph)),
        microbatches=microbatches,
        ticks=_whole(seconds, scale),
        bytes=bytes_of_units(
            graph,
            settings.microbatches_in_memory(num_partitions),
            again,
            settings.offloads_all_slots,
        ),
        homes=np.array([link.home for link in links], dtype=np.int64),
        forward_ticks=_whole(forward, scale),
        backward_ticks=_whole(backward, scale),
        received_bytes=np.array([link.received_bytes for link in links], dtype=np.int64),
        sent_bytes=np.array([link.sent_bytes for link in links], dtype=np.int64),
        ordered=np.array([link.ordered for link in links], dtype=np.bool_),
        links=np.repeat(np.arange(len(links)), [len(r) for r in readers]).astype(np.int64),
        readers=np.array([unit for units in readers for unit in units], dtype=np.int64),
        memory_bytes=machine.memory_bytes,
        minimise_bytes=False,
        seconds_per_tick=1 / scale,
    )


def _whole(seconds: Sequence[float], scale: float) -> NDArray[np.int64]:
    return np.rint(np.array(seconds, dtype=np.float64) * scale).astype(np.int64)
