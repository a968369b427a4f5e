"""Finds the best cuts of one topological order: each partition is an interval of it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from opensmp.compiler.plan.partitioner.connectivity import interval_excess
from opensmp.compiler.plan.partitioner.dynamic_programming import (
    Steps,
    best_chains,
    most_bytes,
    most_ticks,
)
from opensmp.compiler.plan.partitioner.problem import Problem, Score
from opensmp.compiler.plan.partitioner.topological_orders import Order

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Rectangles = tuple[Integers, Integers, Integers, Integers]

_MOST_POSITIONS = 512


def cut_order(
    problem: Problem, order: Order, best: Score, *, contiguous: bool, near: Integers | None = None
) -> list[Integers]:
    """Returns assignments that cut an order well."""
    positions = _positions(problem, order, best, near)
    steps = _steps(problem, order, positions, best, contiguous=contiguous)
    return [_assignment(order, positions[cuts]) for cuts in best_chains(problem, steps, best)]


def _assignment(order: Order, stops: Integers) -> Integers:
    placed = np.empty(len(order), dtype=np.int64)
    placed[order] = np.repeat(np.arange(len(stops) - 1), np.diff(stops))
    return placed


def _positions(problem: Problem, order: Order, best: Score, near: Integers | None) -> Integers:
    """Returns the positions of cuts that can lead to a result about as good as the best known."""
    size, count = len(problem), problem.num_partitions
    useful = np.zeros(size + 1, dtype=np.bool_)
    limits = [
        (np.concatenate([[0], np.cumsum(weights[order])]).astype(np.float64), limit)
        for weights, limit in (
            (problem.ticks, most_ticks(problem, best)),
            (problem.bytes, most_bytes(problem, best)),
        )
        if limit < np.inf
    ]
    for k in range(1, count):
        begin, end = k, size - (count - k) + 1
        for total, limit in limits:
            begin = max(begin, int(np.searchsorted(total, total[-1] - (count - k) * limit)))
            end = min(end, int(np.searchsorted(total, k * limit, side="right")))
        useful[begin:end] = True
    useful[[0, size]] = False
    inner = np.flatnonzero(useful)
    if len(inner) > _MOST_POSITIONS:
        inner = _choose(problem, order, inner, near)
    return np.concatenate([[0], inner, [size]]).astype(np.int64)


def _choose(problem: Problem, order: Order, inner: Integers, near: Integers | None) -> Integers:
    """Samples positions: a third near `near`, a third with cheap cuts, the rest evenly spaced."""
    third = _MOST_POSITIONS // 3
    crossing = _crossing(problem, order)[inner]
    kept = [np.argsort(crossing, kind="stable")[:third]]
    if near is not None and len(near):
        distance = np.abs(inner[:, None] - near[None, :]).min(axis=1)
        kept.append(np.argsort(distance, kind="stable")[:third])
    rest = _MOST_POSITIONS - len(np.unique(np.concatenate(kept)))
    kept.append(np.linspace(0, len(inner) - 1, rest).astype(np.int64))
    return inner[np.unique(np.concatenate(kept))]


def _crossing(problem: Problem, order: Order) -> Integers:
    """Returns the transfer cost of the links that cross a cut at each position, once per link."""
    first, last = _span(problem, _where(order))
    change = np.zeros(len(order) + 2, dtype=np.int64)
    cost = problem.forward_ticks + problem.backward_ticks
    np.add.at(change, first + 1, cost)
    np.add.at(change, last + 1, -cost)
    return np.cumsum(change)[: len(order) + 1]


def _where(order: Order) -> Integers:
    where = np.empty(len(order), dtype=np.int64)
    where[order] = np.arange(len(order))
    return where


def _span(problem: Problem, where: Integers) -> tuple[Integers, Integers]:
    """Returns the first and the last position of the units of each link."""
    first = where[problem.homes].copy()
    last = first.copy()
    np.minimum.at(first, problem.links, where[problem.readers])
    np.maximum.at(last, problem.links, where[problem.readers])
    return first, last


def _steps(
    problem: Problem, order: Order, positions: Integers, best: Score, *, contiguous: bool
) -> Steps:
    """Adds each cost to the rectangles of intervals [begin, end) that it applies to."""
    size, where = len(order), _where(order)
    home = where[problem.homes]
    first, last = _span(problem, where)
    # A reader adds a receive to an interval if the home is outside and it is the interval's first
    # reader after the home (or the last one before it, for a variable).
    sort = np.lexsort((where[problem.readers], problem.links))
    links, reader = problem.links[sort], where[problem.readers][sort]
    same = links[1:] == links[:-1]
    previous = np.concatenate([[-1], np.where(same, reader[:-1], -1)])[: len(reader)]
    following = np.concatenate([np.where(same, reader[1:], size), [size]])[: len(reader)]
    after = reader > home[links]
    receive = (
        np.where(after, np.maximum(previous, home[links]) + 1, 0),
        reader,
        reader + 1,
        np.where(after, size, np.minimum(following, home[links])),
    )
    everything = np.full(len(home), size)
    # A home receives a gradient if it is inside and not all readers are.
    around = (np.zeros_like(home), home, home + 1, everything)
    whole = (np.zeros_like(home), first, last + 1, everything)
    paint = _Canvas(positions)
    forward, backward = problem.forward_ticks, problem.backward_ticks
    ticks = paint((receive, forward[links]), (around, backward), (whole, -backward)) + _between(
        problem.ticks, order, positions
    )
    moved = paint((receive, (forward + backward)[links]))
    sent = problem.sent_bytes
    held = paint(
        (receive, problem.received_bytes[links]), (around, sent), (whole, -sent)
    ) + _between(problem.bytes, order, positions)
    keep = np.triu(np.ones(ticks.shape, dtype=np.bool_), 1)
    keep &= (ticks <= most_ticks(problem, best)) & (held <= most_bytes(problem, best))
    if contiguous:
        keep &= interval_excess(problem, order, positions) == 0
    stop, start = np.nonzero(keep.T)
    at = (start, stop)
    return Steps(len(positions), start, stop, ticks[at], moved[at], held[at])


def _between(weights: Integers, order: Order, positions: Integers) -> Floats:
    total = np.concatenate([[0], np.cumsum(weights[order])])[positions].astype(np.float64)
    return np.asarray(total[None, :] - total[:, None])


class _Canvas:
    """Sums weights over rectangles of intervals: begin in [0], [1] and end in [2], [3]."""

    def __init__(self, positions: Integers) -> None:
        self._positions = positions

    def __call__(self, *layers: tuple[Rectangles, Integers]) -> Floats:
        width = len(self._positions) + 1
        change = np.zeros(width * width)
        for (top, bottom, left, right), weights in layers:
            rows = (
                np.searchsorted(self._positions, top),
                np.searchsorted(self._positions, bottom, side="right"),
            )
            columns = (
                np.searchsorted(self._positions, left),
                np.searchsorted(self._positions, right, side="right"),
            )
            real = (rows[0] < rows[1]) & (columns[0] < columns[1])
            for row, sign in zip(rows, (1, -1), strict=True):
                for column, factor in zip(columns, (sign, -sign), strict=True):
                    at = (row * width + column)[real]
                    np.add.at(change, at, factor * weights[real])
        painted = change.reshape(width, width).cumsum(axis=0).cumsum(axis=1)
        return np.asarray(painted[:-1, :-1])
