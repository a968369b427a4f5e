"""Baseline plans: runs of consecutive units, which the partitioner must never be worse than."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

from opensmp.compiler.plan.cost_model import bytes_of_units
from opensmp.compiler.plan.partitioner.problem import Problem
from opensmp.compiler.plan.recompute_levels import recomputed
from opensmp.compiler.plan.settings import PlanSettings
from opensmp.compiler.plan.unit_graph import CoarseGraph

Assignment = NDArray[np.int64]

_FEW_UNITS = 128


def simple_runs(problem: Problem) -> list[Assignment]:
    """Returns runs of equal unit count, time and bytes, and others.

    These are the block partition of torchgpipe, and the runs of which the slowest is as fast, and
    the fullest as small, as possible. Units are taken in their own order.
    """
    size, count = len(problem), problem.num_partitions
    return [
        even_runs(np.ones(size), count),
        block_runs(problem.ticks, count),
        even_runs(problem.ticks, count),
        even_runs(problem.bytes, count),
        tightest_runs(problem.ticks, count),
        tightest_runs(problem.bytes, count),
    ]


def even_runs(weights: ArrayLike, count: int) -> Assignment:
    """Returns runs that end where the cumulative weight reaches equal shares of the total."""
    total = np.cumsum(np.asarray(weights, dtype=np.float64))
    size = len(total)
    cuts = np.searchsorted(total, total[-1] * np.arange(1, count) / count) + 1
    index = np.arange(1, count)
    cuts = np.maximum.accumulate(cuts - index) + index  # at least one unit apart
    cuts = np.minimum(cuts, size - count + index)
    return np.searchsorted(cuts, np.arange(size), side="right").astype(np.int64)


def tightest_runs(weights: ArrayLike, count: int) -> Assignment:
    """Returns runs of which the heaviest weighs as little as possible."""
    before = np.concatenate([[0], np.cumsum(np.asarray(weights, dtype=np.int64))])
    size = len(before) - 1
    count = min(count, size)
    low, high = -1, int(before[-1])  # no runs within the first bound, some within the second
    while high - low > 1:
        bound = (low + high) // 2
        low, high = (low, bound) if _ends(before, count, bound) is not None else (bound, high)
    ends = _ends(before, count, high)
    assert ends is not None
    return np.searchsorted(ends, np.arange(size), side="right").astype(np.int64)


def _ends(before: NDArray[np.int64], count: int, bound: int) -> list[int] | None:
    """Returns the ends of `count` runs of at most `bound`, without the last one; None if none."""
    size, ends, start = len(before) - 1, list[int](), 0
    for left in range(count, 1, -1):
        reach = int(np.searchsorted(before, before[start] + bound, side="right")) - 1
        start = min(reach, size - left + 1)  # one unit at least for each of the others
        if ends[-1:] == [start] or not start:
            return None
        ends.append(start)
    return ends if before[-1] - before[start] <= bound else None


def block_runs(weights: ArrayLike, count: int) -> Assignment:
    """Returns runs whose weights differ by at most the largest unit weight, as torchgpipe does.

    Such a partition always exists (Barany and Grinberg, "Block Partitions of Sequences", 2015). As
    in their proof, units move from the heaviest run towards the lightest: across the first boundary
    between the two where that makes the heavier of its two neighbours lighter, or else one unit
    across each boundary on the way. If that ends too early, all cuts are tried; for
    more than 128 units, the result may then differ by more.
    """
    each: list[int] = np.asarray(weights, dtype=np.int64).tolist()
    size, largest = len(each), max(each)
    cuts = [run * size // count for run in range(count + 1)]
    sums = [sum(each[a:b]) for a, b in pairwise(cuts)]
    for _ in range(size * count):
        low, high = sums.index(min(sums)), sums.index(max(sums))
        if sums[high] - sums[low] <= largest:
            break
        sign = 1 if high > low else -1
        way = range(low, high, sign)
        movable = {run: each[_crosses(cuts, run, sign)] for run in way}
        single = (run for run in way if sums[run] + movable[run] < sums[run + sign])
        first = next(single, None)
        moved_cuts, moved_sums = cuts.copy(), sums.copy()
        for run in way if first is None else (first,):
            moved_cuts[max(run, run + sign)] += sign
            moved_sums[run] += movable[run]
            moved_sums[run + sign] -= movable[run]
        empty = any(a >= b for a, b in pairwise(moved_cuts))
        if empty or sorted(moved_sums, reverse=True) >= sorted(sums, reverse=True):
            cuts = (_equal_cuts(each, count) if size <= _FEW_UNITS else None) or cuts
            break
        cuts, sums = moved_cuts, moved_sums
    return np.repeat(np.arange(count), np.diff(cuts)).astype(np.int64)


def _equal_cuts(weights: list[int], count: int) -> list[int] | None:
    """Returns cuts between runs whose sums differ by at most the largest weight, by trying all.

    None if no run can be that even without an empty one.
    """
    before = np.concatenate([[0], np.cumsum(weights)])
    largest, mean = max(weights), before[-1] / count
    sums = np.unique(before[None, :] - before[:, None])
    for least in sums[(sums > max(0, mean - largest - 1)) & (sums <= mean)][::-1]:
        reached = [np.array([0])]
        for _ in range(count):
            # Runs that end at a unit may begin between the two positions.
            begin = np.searchsorted(before, before - least - largest, "left")
            end = np.searchsorted(before, before - least, "right")
            ends = np.searchsorted(reached[-1], end) > np.searchsorted(reached[-1], begin)
            reached.append(np.flatnonzero(ends))
        if not len(reached[-1]) or reached[-1][-1] != len(weights):
            continue
        cuts = [len(weights)]
        for starts in reached[-2::-1]:
            sums_to = before[cuts[0]] - before[starts]
            cuts.insert(0, int(starts[(sums_to >= least) & (sums_to <= least + largest)][0]))
        return cuts
    return None


def _crosses(cuts: list[int], run: int, sign: int) -> int:
    """Returns the unit that crosses the boundary into `run` from the side that `sign` points to."""
    return cuts[run + 1] if sign > 0 else cuts[run] - 1


def evenly_full_runs(
    graph: CoarseGraph, num_partitions: int, settings: PlanSettings
) -> NDArray[np.int64]:
    """Cuts the units into runs whose fullest is least, with what each partition holds of them.

    Tensors between runs are not counted.
    """
    again = recomputed(graph, settings)
    lasting = bytes_of_units(graph, 0, again, settings.offloads_all_slots)
    kept = again.kept_bytes
    resident = settings.microbatches_resident(num_partitions)
    sizes = lasting[np.newaxis] + resident[:, np.newaxis] * kept[np.newaxis]
    low, high = int(sizes.max(axis=0).min()), int(sizes.sum(axis=1).max())
    best = _filled(sizes, high)
    while low < high:
        middle = (low + high) // 2
        runs = _filled(sizes, middle)
        if runs is None:
            low = middle + 1
        else:
            best, high = runs, middle
    assert best is not None, "one partition takes all"
    return best


def _filled(sizes: NDArray[np.int64], most: int) -> NDArray[np.int64] | None:
    """Fills one partition after the other up to `most` bytes, but leaves a unit for each."""
    count, num_units = sizes.shape
    placed = np.zeros(num_units, dtype=np.int64)
    unit = 0
    for partition in range(count):
        full, first = 0, unit
        while unit < num_units and (unit == first or num_units - unit > count - partition - 1):
            full += int(sizes[partition, unit])
            if full > most:
                if unit == first:
                    return None  # no partition stays empty
                break
            placed[unit] = partition
            unit += 1
    return placed if unit == num_units else None
