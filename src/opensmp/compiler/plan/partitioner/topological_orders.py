"""Topological orders of the units, to be cut into intervals."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from opensmp.compiler.plan.partitioner.problem import Problem

Order = NDArray[np.int64]


def topological_orders(problem: Problem, most: int = 6) -> list[Order]:
    """Returns up to `most` distinct topological orders that differ in their traversal.

    The order of the graph itself comes first; then depth-first orders that finish a branch before
    the next one, forward from the inputs and backward from the outputs; one that keeps few bytes
    alive; and orders by depth.
    """
    size = len(problem)
    before, after = problem.predecessors, problem.successors
    makers: tuple[Callable[[], Order], ...] = (
        lambda: np.arange(size, dtype=np.int64),
        lambda: _post_order(before, range(size - 1, -1, -1)),
        lambda: _post_order(after, range(size))[::-1],
        lambda: _least_alive(problem),
        lambda: _by_depth(before),
        lambda: size - 1 - _by_depth([[size - 1 - u for u in s] for s in after[::-1]])[::-1],
    )
    found: dict[bytes, Order] = {}
    for make in makers[:most]:
        order = np.ascontiguousarray(make(), dtype=np.int64)
        found.setdefault(order.tobytes(), order)
    return list(found.values())


def follow(placed: NDArray[np.int64], order: Order) -> Order:
    """Returns the order sorted by partition, and within each partition as in `order`."""
    return order[np.argsort(placed[order], kind="stable")]


def _post_order(needs: Sequence[Sequence[int]], roots: Sequence[int]) -> Order:
    """Returns a depth-first post-order of the units."""
    order: list[int] = []
    state = [0] * len(needs)  # 0 new, 1 waiting for its predecessors, 2 done
    for root in roots:
        stack = [root]
        while stack:
            unit = stack[-1]
            if state[unit] == 0:
                state[unit] = 1
                stack.extend(need for need in reversed(needs[unit]) if state[need] == 0)
            else:
                stack.pop()
                if state[unit] == 1:
                    state[unit] = 2
                    order.append(unit)
    return np.array(order, dtype=np.int64)


def _by_depth(before: Sequence[Sequence[int]]) -> Order:
    depth = [0] * len(before)
    for unit, needs in enumerate(before):
        depth[unit] = 1 + max((depth[need] for need in needs), default=-1)
    return np.argsort(np.array(depth, dtype=np.int64), kind="stable")


def _least_alive(problem: Problem) -> Order:
    """Greedily picks the ready unit after which the fewest bytes are alive."""
    made = [0] * len(problem)
    read: list[list[int]] = [[] for _ in made]
    waiting = np.bincount(problem.links, minlength=len(problem.homes)).tolist()
    sizes = problem.sent_bytes.tolist()
    for link, home in enumerate(problem.homes.tolist()):
        made[home] += sizes[link] if waiting[link] else 0
    readers: list[list[int]] = [[] for _ in sizes]
    for link, unit in zip(problem.links.tolist(), problem.readers.tolist(), strict=True):
        read[unit].append(link)
        readers[link].append(unit)
    growth = list(made)
    for link, units in enumerate(readers):
        if len(units) == 1:
            growth[units[0]] -= sizes[link]
    missing = [len(needs) for needs in problem.predecessors]
    heap = [(growth[unit], unit) for unit, count in enumerate(missing) if not count]
    heapq.heapify(heap)
    done = [False] * len(made)
    order = []
    while heap:
        key, unit = heapq.heappop(heap)
        if done[unit] or key != growth[unit]:
            continue
        done[unit] = True
        order.append(unit)
        for link in read[unit]:
            waiting[link] -= 1
            if waiting[link] == 1:
                last = next(other for other in readers[link] if not done[other])
                growth[last] -= sizes[link]
                if not missing[last]:
                    heapq.heappush(heap, (growth[last], last))
        for reader in problem.successors[unit]:
            missing[reader] -= 1
            if not missing[reader]:
                heapq.heappush(heap, (growth[reader], reader))
    return np.array(order, dtype=np.int64)
