"""Local search: improves an assignment by moving one unit at a time, evaluating the full cost."""

from __future__ import annotations

from collections.abc import Collection
from operator import mul

import numpy as np
from numpy.typing import NDArray

from opensmp.compiler.plan.partitioner.connectivity import Neighbourhood
from opensmp.compiler.plan.partitioner.problem import Problem

_MOST_TRIALS = 10_000
_PATIENCE = 12  # consecutive moves without a new best that end a pass

Key = tuple[int, ...]


def refine(
    problem: Problem,
    placed: NDArray[np.int64],
    near: Neighbourhood | None,
    fixed: Collection[int] | None = None,
) -> NDArray[np.int64]:
    """Moves units between partitions while that improves the assignment; never makes it worse.

    In a pass, the best move is made and its unit locked, even if the move worsens the cost, until
    no unit can move or there is no improvement for a while; then the moves after the best state are
    reverted (Fiduccia and Mattheyses, "A Linear-Time Heuristic for Improving Network Partitions",
    DAC 1982). The search ends with the first pass without improvement, or after a fixed number of
    trials. It never depends on the clock.

    Args:
        problem: The problem.
        placed: A valid assignment.
        near: Adjacency of units, if partitions are to stay connected.
        fixed: Units that must not move; all others may then move to any partition, including lower
            ones. None: all units move, and tensors go to higher partitions only.
    """
    layout = _Layout(problem, placed.tolist(), fixed)
    trials = _MOST_TRIALS
    while trials > 0:
        start = best = layout.key()
        locked: set[int] = set()
        moves: list[tuple[int, int]] = []
        kept = 0
        movable = {unit for unit in range(len(problem)) if layout.targets(unit)}
        while trials > 0 and len(moves) - kept < _PATIENCE:
            options = []
            for unit in sorted(movable - locked):
                for target in layout.targets(unit):
                    options.append((layout.trial(unit, target), unit, target))
            trials -= max(len(options), 1)
            options.sort()
            chosen = next(
                (o for o in options if near is None or layout.keeps_pieces(*o[1:], near)), None
            )
            if chosen is None:
                break
            key, unit, target = chosen
            moves.append((unit, layout.placed[unit]))
            layout.move(unit, target)
            locked.add(unit)
            for other in {unit, *problem.predecessors[unit], *problem.successors[unit]}:
                (movable.add if layout.targets(other) else movable.discard)(other)
            if key < best:
                best, kept = key, len(moves)
        for unit, source in reversed(moves[kept:]):
            layout.move(unit, source)
        if best >= start:
            break
    return np.array(layout.placed, dtype=np.int64)


class _Layout:
    """An assignment with its loads, updated incrementally with each move."""

    def __init__(
        self, problem: Problem, placed: list[int], fixed: Collection[int] | None = None
    ) -> None:
        self._problem = problem
        self._fixed = fixed
        self.placed = placed
        ticks, held = problem.loads(np.array(placed, dtype=np.int64))
        self._ticks: list[int] = ticks.tolist()
        self._held: list[int] = held.tolist()
        self._sizes = np.bincount(placed, minlength=problem.num_partitions).tolist()
        self._homes: list[int] = problem.homes.tolist()
        self._costs = list(
            zip(
                problem.forward_ticks.tolist(),
                problem.backward_ticks.tolist(),
                problem.received_bytes.tolist(),
                problem.sent_bytes.tolist(),
                strict=True,
            )
        )
        self._unit = list(zip(problem.ticks.tolist(), problem.bytes.tolist(), strict=True))
        # Number of readers of each link in each partition.
        self._readers: list[dict[int, int]] = [{} for _ in self._homes]
        self._made: list[list[int]] = [[] for _ in placed]
        self._read: list[list[int]] = [[] for _ in placed]
        for link, home in enumerate(self._homes):
            self._made[home].append(link)
        for link, unit in zip(problem.links.tolist(), problem.readers.tolist(), strict=True):
            counts = self._readers[link]
            counts[placed[unit]] = counts.get(placed[unit], 0) + 1
            self._read[unit].append(link)

    def key(self) -> Key:
        """Returns the score, with the unevenness of the partitions to rank equal scores."""
        score = self._problem.score_of(self._ticks, self._held)
        loads = self._held if self._problem.minimise_bytes else self._ticks
        return (*score[:2], sum(map(mul, loads, loads)), score[2])

    def targets(self, unit: int) -> list[int]:
        """Returns the other partitions that the unit may move to."""
        placed = self.placed
        here = placed[unit]
        if self._sizes[here] == 1:
            return []
        if self._fixed is not None:
            every = range(self._problem.num_partitions)
            return [] if unit in self._fixed else [target for target in every if target != here]
        before, after = self._problem.predecessors[unit], self._problem.successors[unit]
        low = max((placed[other] for other in before), default=0)
        high = min((placed[other] for other in after), default=self._problem.num_partitions - 1)
        return [target for target in range(low, high + 1) if target != here]

    def trial(self, unit: int, target: int) -> Key:
        """Returns the key after a move, without keeping the move."""
        here = self.placed[unit]
        self.move(unit, target)
        key = self.key()
        self.move(unit, here)
        return key

    def keeps_pieces(self, unit: int, target: int, near: Neighbourhood) -> bool:
        """Returns whether the move increases no partition's number of pieces."""
        placed = self.placed
        if near.splits(unit, placed):
            return False
        if near.joins(unit, target, placed):
            return True
        part = near.part
        return not any(
            where == target and part[other] == part[unit] for other, where in enumerate(placed)
        )

    def move(self, unit: int, target: int) -> None:
        """Moves a unit and updates all loads."""
        source = self.placed[unit]
        ticks, held = self._unit[unit]
        self._ticks[source] -= ticks
        self._ticks[target] += ticks
        self._held[source] -= held
        self._held[target] += held
        self._sizes[source] -= 1
        self._sizes[target] += 1
        for link in self._made[unit]:
            self._charge(link, source, -1)
            self._charge(link, target, 1)
        self.placed[unit] = target
        for link in self._read[unit]:
            self._reader_moves(link, source, target)

    def _charge(self, link: int, home: int, sign: int) -> None:
        """Adds (`sign` 1) or subtracts (-1) all costs of a link with its home partition `home`."""
        forward, backward, received, sent = self._costs[link]
        remote = 0
        for reader in self._readers[link]:
            if reader != home:
                self._ticks[reader] += sign * forward
                self._held[reader] += sign * received
                remote += 1
        if remote:
            self._ticks[home] += sign * remote * backward
            self._held[home] += sign * sent

    def _reader_moves(self, link: int, source: int, target: int) -> None:
        """Updates the loads for one reader of a link that moves from `source` to `target`."""
        counts, home = self._readers[link], self.placed[self._homes[link]]
        forward, backward, received, sent = self._costs[link]
        remote = len(counts) - (home in counts)
        counts[source] -= 1
        if not counts[source]:
            del counts[source]
            if source != home:
                self._ticks[source] -= forward
                self._held[source] -= received
                self._ticks[home] -= backward
        if target not in counts:
            counts[target] = 0
            if target != home:
                self._ticks[target] += forward
                self._held[target] += received
                self._ticks[home] += backward
        counts[target] += 1
        still = len(counts) - (home in counts)
        self._held[home] += sent * ((still > 0) - (remote > 0))
