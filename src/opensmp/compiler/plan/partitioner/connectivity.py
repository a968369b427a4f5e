"""Connectivity of partitions: finds disconnected partitions and repairs them.

Two units of a partition are connected if one reads a tensor of the other, or if both read the same
variable. If the graph itself has several connected components, the pieces of each component are
counted separately.
"""

from __future__ import annotations

import heapq
from collections import Counter
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from opensmp.compiler.plan.partitioner.problem import Problem

Pair = tuple[int, int]


def excess_pieces(problem: Problem, placed: NDArray[np.int64]) -> int:
    """Returns the number of pieces beyond one per partition and connected component in it."""
    pieces = _piece_of(problem, placed)
    parts = part_of_graph(problem) * problem.num_partitions + placed
    return len(np.unique(pieces)) - len(np.unique(parts))


def part_of_graph(problem: Problem) -> NDArray[np.int64]:
    """Returns for each unit the lowest unit of its connected component of the graph."""
    return _piece_of(problem, np.zeros(len(problem), dtype=np.int64))


def _piece_of(problem: Problem, placed: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns for each unit the lowest unit of its piece."""
    homes, readers = problem.homes[problem.links], problem.readers
    inside = placed[homes] == placed[readers]
    pairs = [np.stack([homes[inside], readers[inside]])]
    variables = ~problem.ordered[problem.links]
    if variables.any():
        links, units = problem.links[variables], readers[variables]
        sort = np.lexsort((placed[units], links))
        links, units = links[sort], units[sort]
        same = (links[1:] == links[:-1]) & (placed[units[1:]] == placed[units[:-1]])
        pairs.append(np.stack([units[1:][same], units[:-1][same]]))
    one, other = np.concatenate(pairs, axis=1)
    piece = np.arange(len(problem), dtype=np.int64)
    while True:
        least = np.minimum(piece[one], piece[other])
        lower = piece.copy()
        np.minimum.at(lower, piece[one], least)
        np.minimum.at(lower, piece[other], least)
        while not np.array_equal(lower, lower[lower]):
            lower = lower[lower]
        if np.array_equal(lower, piece):
            return piece
        piece = lower


class Neighbourhood:
    """Adjacency of units, for queries about few units at a time."""

    def __init__(self, problem: Problem) -> None:
        size = len(problem)
        self._near: list[list[int]] = [
            before + after
            for before, after in zip(problem.predecessors, problem.successors, strict=True)
        ]
        self._variables: list[list[int]] = [[] for _ in range(size)]
        self._units: dict[int, list[int]] = {}
        for link in np.flatnonzero(~problem.ordered).tolist():
            units = [int(problem.homes[link]), *problem.readers_of(link).tolist()]
            self._units[link] = units
            for unit in units:
                self._variables[unit].append(link)
        self.part = part_of_graph(problem).tolist()

    def of(self, unit: int) -> list[int]:
        """Returns the units that `unit` is connected with."""
        shared = [other for link in self._variables[unit] for other in self._units[link]]
        return self._near[unit] + [other for other in shared if other != unit]

    def joins(self, unit: int, to: int, placed: list[int]) -> bool:
        """Returns whether `unit` is connected with a unit of partition `to`."""
        return any(placed[other] == to for other in self.of(unit))

    def splits(self, unit: int, placed: list[int]) -> bool:
        """Returns whether removing `unit` disconnects its piece."""
        here = placed[unit]
        near = {other for other in self.of(unit) if placed[other] == here}
        if len(near) < 2:
            return False
        start = min(near)
        near.discard(start)
        seen, stack, variables = {unit, start}, [start], set[int]()
        while stack and near:
            at = stack.pop()
            for link in self._variables[at]:
                if link not in variables:
                    variables.add(link)
                    stack.extend(self._visit(self._units[link], here, placed, seen, near))
            stack.extend(self._visit(self._near[at], here, placed, seen, near))
        return bool(near)

    @staticmethod
    def _visit(
        units: list[int], here: int, placed: list[int], seen: set[int], near: set[int]
    ) -> list[int]:
        new = [unit for unit in units if placed[unit] == here and unit not in seen]
        seen.update(new)
        near.difference_update(new)
        return new


def join_pieces(problem: Problem, placed: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns an assignment without excess pieces that is close to the given one; it always exists.

    The smaller pieces of a partition move as a whole to the partition of a neighbour: of the first
    unit that reads from the piece or the last unit that the piece reads from, whichever partition
    has the lower load. There the piece merges with the neighbour's, so each move reduces the number
    of pieces and leaves no partition empty.
    """
    near = Neighbourhood(problem)
    pieces = _Pieces(problem, placed, near)
    heap = sorted((len(units), name) for name, units in pieces.members.items())
    while heap:
        size, name = heapq.heappop(heap)
        units = pieces.members.get(name)
        if units is None or len(units) != size or not pieces.is_excess(name):
            continue
        target = pieces.best_target(name)
        heapq.heappush(heap, (len(pieces.move(name, target)), pieces.name_of(name)))
    return pieces.placed()


class _Pieces:
    """The pieces of an assignment while they are merged."""

    def __init__(self, problem: Problem, placed: NDArray[np.int64], near: Neighbourhood) -> None:
        self._problem, self._near = problem, near
        self._parent = _piece_of(problem, placed).tolist()
        self._partition = placed.tolist()  # valid for the unit that names the piece only
        self._load = np.bincount(placed, problem.ticks, problem.num_partitions).tolist()
        self.members: dict[int, list[int]] = {}
        for unit, name in enumerate(self._parent):
            self.members.setdefault(name, []).append(unit)
        self._count = Counter(self._key(name) for name in self.members)

    def _key(self, name: int) -> Pair:
        return self._partition[name], self._near.part[name]

    def name_of(self, unit: int) -> int:
        """Returns the unit that names the piece of a unit."""
        parent = self._parent
        while parent[unit] != unit:
            parent[unit] = parent[parent[unit]]
            unit = parent[unit]
        return unit

    def is_excess(self, name: int) -> bool:
        """Returns whether the piece's partition has other pieces of the same component."""
        return self._count[self._key(name)] > 1

    def best_target(self, name: int) -> int:
        """Returns the least loaded partition of a neighbour that the piece may move to."""
        units, problem = self.members[name], self._problem
        before = [
            self._where(v) for u in units for v in problem.predecessors[u] if self._out(v, name)
        ]
        after = [self._where(v) for u in units for v in problem.successors[u] if self._out(v, name)]
        targets = [max(before)] if before else []
        targets += [min(after)] if after else []
        if not targets:  # connected with others by variables only
            targets = [
                self._where(v) for u in units for v in self._near.of(u) if self._out(v, name)
            ]
        return min(targets, key=lambda target: (self._load[target], target))

    def _out(self, unit: int, name: int) -> bool:
        return self.name_of(unit) != name

    def _where(self, unit: int) -> int:
        return int(self._partition[self.name_of(unit)])

    def move(self, name: int, target: int) -> list[int]:
        """Moves a piece to the partition of a neighbour; returns the units of the merged piece."""
        units = self.members[name]
        work = int(self._problem.ticks[units].sum())
        self._load[self._partition[name]] -= work
        self._load[target] += work
        self._count[self._key(name)] -= 1
        self._partition[name] = target
        self._count[self._key(name)] += 1
        others = {self.name_of(v) for u in units for v in self._near.of(u)} - {name}
        for other in sorted(o for o in others if self._partition[o] == target):
            mine = self.name_of(name)
            low, high = (
                (mine, other)
                if len(self.members[mine]) >= len(self.members[other])
                else (other, mine)
            )
            self._parent[high] = low
            self.members[low].extend(self.members.pop(high))
            self._count[self._key(low)] -= 1
        return self.members[self.name_of(name)]

    def placed(self) -> NDArray[np.int64]:
        """Returns the current assignment."""
        return np.array([self._where(unit) for unit in range(len(self._parent))], dtype=np.int64)


def interval_excess(
    problem: Problem, order: NDArray[np.int64], positions: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Returns the number of excess pieces of every interval of a topological order.

    The number of pieces of an interval is its number of units minus the number of edges of a
    spanning forest of it. While the order is scanned, a single forest serves all intervals that end
    at the current position: the one whose edges start as late as possible. A new edge that closes a
    cycle replaces the edge of the cycle that starts first.

    Args:
        problem: The problem.
        order: The units in a topological order.
        positions: Ascending; the possible begins and (exclusive) ends of intervals.

    Returns:
        Array of shape (len(positions),) * 2; [a, b] is for the units from `positions[a]` to before
            `positions[b]` in the order, and 0 where a >= b.
    """
    size = len(problem)
    where = np.empty(size, dtype=np.int64)
    where[order] = np.arange(size)
    edges: list[list[int]] = [[] for _ in range(size)]
    for a, b in _order_edges(problem, where):
        edges[b].append(a)
    forest = _Forest(size)
    bucket = np.searchsorted(positions, np.arange(size), side="right") - 1
    starts = np.zeros(len(positions), dtype=np.int64)
    pieces = np.zeros((len(positions), len(positions)), dtype=np.int64)
    at = 0
    for column, stop in enumerate(positions.tolist()):
        for right in range(at, stop):
            for left in sorted(set(edges[right]), reverse=True):
                dropped = forest.add(left, right)
                if dropped != left:
                    starts[bucket[left]] += 1
                    if dropped is not None:
                        starts[bucket[dropped]] -= 1
        at = max(at, stop)
        edges_from = np.cumsum(starts[::-1])[::-1]
        pieces[:column, column] = (stop - positions - edges_from)[:column]
    parts = part_of_graph(problem)[order]
    return pieces - _parts_touched(parts, positions)


def _order_edges(problem: Problem, where: NDArray[np.int64]) -> list[Pair]:
    """Returns pairs of positions, lower first, that connect the units of any interval."""
    tensors = problem.ordered[problem.links]
    homes = where[problem.homes[problem.links[tensors]]].tolist()
    pairs = list(zip(homes, where[problem.readers[tensors]].tolist(), strict=True))
    for link in np.flatnonzero(~problem.ordered).tolist():
        units = [problem.homes[link], *problem.readers_of(link)]
        at = sorted(where[units].tolist())
        pairs.extend(pairwise(at))
    return pairs


def _parts_touched(parts: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns how many components of the graph each interval contains units of, at least 1."""
    count = len(positions)
    touched = np.triu(np.ones((count, count), dtype=np.int64), 1)
    names = np.unique(parts)
    if len(names) > 1:
        touched[:] = 0
        for name in names:
            before = np.searchsorted(np.flatnonzero(parts == name), positions)
            touched += before[None, :] > before[:, None]
    return touched


class _Forest:
    """A forest over positions in which paths consist of edges that start as late as possible."""

    def __init__(self, size: int) -> None:
        self._parent: list[int | None] = [None] * size
        self._tree = list(range(size))  # disjoint sets: the tree of each position
        self._size = [1] * size

    def add(self, left: int, right: int) -> int | None:
        """Adds an edge; returns the start of the edge that it replaces, or None.

        If the new edge itself is the one to drop, returns `left`.
        """
        a, b = self._find(left), self._find(right)
        if a != b:
            if self._size[a] > self._size[b]:
                a, b, left, right = b, a, right, left
            self._hang(self._to_root(left), right)
            self._tree[a] = b
            self._size[b] += self._size[a]
            return None
        paths = self._cycle(left, right)
        start, side, index = min(
            (min(path[at], path[at + 1]), side, at)
            for side, path in enumerate(paths)
            for at in range(len(path) - 1)
        )
        if start >= left:
            return left
        self._hang(paths[side][: index + 1], (right, left)[side])
        return start

    def _find(self, position: int) -> int:
        tree = self._tree
        while tree[position] != position:
            tree[position] = tree[tree[position]]
            position = tree[position]
        return position

    def _to_root(self, position: int) -> list[int]:
        path, up = [position], self._parent[position]
        while up is not None:
            path.append(up)
            up = self._parent[up]
        return path

    def _cycle(self, left: int, right: int) -> tuple[list[int], list[int]]:
        """Returns the paths from both nodes to their lowest common ancestor."""
        paths = ([left], [right])
        seen: tuple[dict[int, int], dict[int, int]] = ({left: 0}, {right: 0})
        while True:
            for path, mine, others in zip(paths, seen, seen[::-1], strict=True):
                up = self._parent[path[-1]]
                if up is not None:
                    mine[up] = len(path)
                    path.append(up)
                if path[-1] in others:
                    ends = tuple(at[path[-1]] + 1 for at in seen)
                    return paths[0][: ends[0]], paths[1][: ends[1]]

    def _hang(self, path: list[int], below: int) -> None:
        """Reverses `path`, which goes up the tree, so that its first node is a child of `below`."""
        for child, up in pairwise(path):
            self._parent[up] = child
        self._parent[path[0]] = below
