"""The minimum cut of a flow network, after Dinic (1970)."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

Tensor = TypeVar("Tensor", bound=Hashable)
Op = TypeVar("Op", bound=Hashable)

UNLIMITED = 1 << 62
"""Capacity of an edge that no cut may contain."""


class FlowNetwork:
    """A directed graph with integer capacities.

    Example:
        >>> network = FlowNetwork(3)
        >>> network.connect(0, 1, 5)
        >>> network.connect(1, 2, 4)
        >>> network.sink_side(0, 2)
        frozenset({2})
    """

    def __init__(self, num_nodes: int) -> None:
        self._edges: list[list[int]] = [[] for _ in range(num_nodes)]
        self._head: list[int] = []
        self._room: list[int] = []  # of edge e; that of its reverse edge is at e ^ 1

    def connect(self, tail: int, head: int, capacity: int) -> None:
        """Adds an edge from `tail` to `head`."""
        for start, end, room in ((tail, head, capacity), (head, tail, 0)):
            self._edges[start].append(len(self._head))
            self._head.append(end)
            self._room.append(room)

    def sink_side(self, source: int, sink: int) -> frozenset[int]:
        """Returns the nodes on the sink's side of the minimum cut that is nearest to the sink."""
        while (level := self._levels(source))[sink] >= 0:
            following = [0] * len(self._edges)
            while self._augment(source, sink, level, following):
                pass
        side, stack = {sink}, [sink]
        while stack:
            for edge in self._edges[stack.pop()]:
                node = self._head[edge]
                if node not in side and self._room[edge ^ 1]:
                    side.add(node)
                    stack.append(node)
        return frozenset(side)

    def _levels(self, source: int) -> list[int]:
        """Returns the distance of each node from the source; -1 if there is no room to it."""
        level = [-1] * len(self._edges)
        level[source] = 0
        reached = [source]
        for node in reached:
            for edge in self._edges[node]:
                other = self._head[edge]
                if self._room[edge] and level[other] < 0:
                    level[other] = level[node] + 1
                    reached.append(other)
        return level

    def _augment(self, source: int, sink: int, level: list[int], following: list[int]) -> bool:
        """Sends flow along one path; returns whether there was one."""
        path: list[int] = []
        node = source
        while node != sink:
            edges = self._edges[node]
            while following[node] < len(edges):
                edge = edges[following[node]]
                if self._room[edge] and level[self._head[edge]] == level[node] + 1:
                    path.append(edge)
                    node = self._head[edge]
                    break
                following[node] += 1
            else:  # a dead end
                if not path:
                    return False
                node = self._head[path.pop() ^ 1]
                following[node] += 1
        flow = min(self._room[edge] for edge in path)
        for edge in path:
            self._room[edge] -= flow
            self._room[edge ^ 1] += flow
        return True


def cheapest_cut(
    read: Sequence[Tensor],
    maker: Callable[[Tensor], Op | None],
    inputs: Callable[[Op], Iterable[Tensor]],
    is_fixed: Callable[[Op], bool],
    size: Callable[[Tensor], int],
) -> tuple[list[Tensor], list[Op]]:
    """Returns the smallest tensors that others can be computed from, and the operations for it.

    Args:
        read: The tensors to compute.
        maker: Returns the operation that makes a tensor; None if the tensor is available anyway.
        inputs: Returns the tensors that an operation reads.
        is_fixed: Whether an operation must not run.
        size: Returns the size of a tensor, up to `UNLIMITED`.

    Returns:
        The tensors to keep, in a fixed order; and the operations to run.
    """
    tensors: dict[Tensor, int] = {}
    ops: dict[Op, int] = {}
    stack = list(reversed(read))
    count = 2
    while stack:
        tensor = stack.pop()
        op = None if tensor in tensors else maker(tensor)
        if op is None:
            continue
        tensors[tensor], count = count, count + 2
        if op not in ops:
            ops[op], count = count, count + 1
            stack.extend(inputs(op))
    network = FlowNetwork(count)
    for op, node in ops.items():
        if is_fixed(op):
            network.connect(0, node, UNLIMITED)
        for tensor in inputs(op):
            if tensor in tensors:
                network.connect(tensors[tensor] + 1, node, UNLIMITED)
    for tensor, node in tensors.items():
        op = maker(tensor)
        assert op is not None
        network.connect(ops[op], node, UNLIMITED)
        network.connect(node, node + 1, size(tensor))
    for tensor in read:
        if tensor in tensors:
            network.connect(tensors[tensor] + 1, 1, UNLIMITED)
    side = network.sink_side(0, 1)
    kept = [t for t, node in tensors.items() if node not in side and node + 1 in side]
    return kept, [op for op, node in ops.items() if node in side]
