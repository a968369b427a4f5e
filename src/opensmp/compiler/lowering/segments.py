"""Cuts a planned graph into segments: operations of one partition that run as one call."""

from __future__ import annotations

import heapq
from collections.abc import Container, Iterable
from dataclasses import dataclass
from functools import cached_property

from opensmp import _private
from opensmp.base.types import Op, Tensor
from opensmp.compiler.plan.plan import Plan
from opensmp.compiler.trace.intermediate_outputs import cuts
from opensmp.compiler.trace.shared_ops import replicated
from opensmp.compiler.trace.trace import TracedGraph


@dataclass(frozen=True, eq=False)
class Segment:
    """Operations of one partition that run as one call.

    Attributes:
        index: Position in a topological order of the segments.
        partition: Partition that it runs on.
        phase: Largest number of partition changes on a path to it.
        operations: Its operations in topological order, without replicated ones.
        inputs: Tensors that it reads from model inputs and from other segments.
        variables: Placeholders of the variables that it reads.
        captures: Placeholders of other captured tensors that it reads.
        outputs: Tensors that it produces for other segments or for the caller.
        after: Indices of segments that must run before it because of control edges alone.
    """

    index: int
    partition: int
    phase: int
    operations: tuple[Op, ...]
    inputs: tuple[Tensor, ...]
    variables: tuple[Tensor, ...]
    captures: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    after: tuple[int, ...]

    @cached_property
    def side_effects(self) -> tuple[Op, ...]:
        """Operations that must run even if their results are not read."""
        return tuple(op for op in self.operations if _private.is_stateful(op))

    def __str__(self) -> str:
        return (
            f"segment {self.index} (partition {self.partition}): {len(self.operations)} "
            f"operations, {len(self.inputs)} in, {len(self.outputs)} out"
        )


@dataclass
class _Group:
    """A segment under construction."""

    partition: int
    phase: int
    operations: list[Op]


def cut(traced: TracedGraph, plan: Plan) -> tuple[Segment, ...]:
    """Cuts a traced graph into as few segments as the plan's order allows.

    An operation's phase is the largest number of partition changes on a path to it. Operations of
    equal partition and phase form a segment, so the segments are acyclic. Segments of one partition
    are then joined if that creates no cycle. A tensor that is returned to the caller and that
    further outputs are computed from ends a segment.

    Small operations on constants and integer state (shapes, seeds) are replicated into every
    segment that reads them, which avoids transfers of their values.
    """
    copied = replicated(traced)
    apart = cuts(traced)
    groups = _join(_phases(traced, plan, copied, apart), copied, apart)
    return _finish(traced, groups, copied)


def _producers(op: Op) -> Iterable[Op]:
    yield from (tensor.op for tensor in op.inputs)
    yield from op.control_inputs


def _phases(
    traced: TracedGraph, plan: Plan, replicated: frozenset[Op], apart: frozenset[tuple[Op, Op]]
) -> list[_Group]:
    """Groups operations by phase and partition; see `cut`."""
    movable = [op for op in traced.operations if op not in traced.sources and op not in replicated]
    phase: dict[Op, int] = {}

    def changes(maker: Op, reader: Op) -> bool:
        return plan.partition(maker) != plan.partition(reader) or (maker, reader) in apart

    active: set[Op] = {tensor.op for tensor in traced.inputs}
    for op in movable:
        phase[op] = max(
            (phase[p] + changes(p, op) for p in _producers(op) if p in phase), default=0
        )
        if any(p in active for p in _producers(op)):
            active.add(op)
    last = dict.fromkeys(range(plan.num_partitions), 0)
    for op, value in phase.items():
        last[plan.partition(op)] = max(last[plan.partition(op)], value)
    consumers: dict[Op, list[Op]] = {}
    for op in movable:
        for producer in _producers(op):
            consumers.setdefault(producer, []).append(op)
    for op in reversed(movable):  # operations independent of activations run as late as possible
        if op not in active:
            part = plan.partition(op)
            users = [phase[u] - changes(op, u) for u in consumers.get(op, [])]
            phase[op] = max(phase[op], min(users, default=last[part]))
    groups: dict[tuple[int, int], _Group] = {}
    for op in movable:
        key = (phase[op], plan.partition(op))
        groups.setdefault(key, _Group(key[1], key[0], [])).operations.append(op)
    ordered = [groups[key] for key in sorted(groups)]
    known = frozenset(traced.operations)
    for op in dict.fromkeys(t.op for t in traced.results if t.op in replicated):
        _first_reader(ordered, op, plan, replicated, known).operations.append(op)
    return ordered


def _first_reader(
    groups: list[_Group], op: Op, plan: Plan, replicated: frozenset[Op], traced: frozenset[Op]
) -> _Group:
    """Returns the group that computes a replicated result: the first that reads the same state.

    Then the next seed is available after the first segment, and later segments of one microbatch do
    not delay the first segment of the next microbatch.
    """
    state = {id(t) for t in _reads([op], set(), replicated, traced)}
    for group in groups:
        read = _reads(group.operations, set(group.operations), replicated, traced)
        if not state or any(id(t) in state for t in read):
            return group
    groups.append(_Group(plan.partition(op), 0, []))
    return groups[-1]


def _edges(groups: list[_Group], replicated: frozenset[Op]) -> list[set[int]]:
    """Returns for each group the groups that it depends on, by data or control."""
    home = {op: i for i, group in enumerate(groups) for op in group.operations}
    return [
        {
            home[p]
            for op in group.operations
            if op not in replicated
            for p in _producers(op)
            if p in home and home[p] != i and p not in replicated
        }
        for i, group in enumerate(groups)
    ]


def _join(
    groups: list[_Group], replicated: frozenset[Op], apart: frozenset[tuple[Op, Op]]
) -> list[_Group]:
    """Joins groups of one partition where that creates no cycle and violates no required cut."""
    merged = True
    while merged:
        merged = False
        needs = _edges(groups, replicated)
        divided = _divided(groups, apart)
        for i, first in enumerate(groups):
            for j in range(i + 1, len(groups)):
                second = groups[j]
                if first.partition != second.partition or (i, j) in divided:
                    continue
                if not _connected_through_others(needs, i, j):
                    first.operations.extend(second.operations)
                    first.phase = max(first.phase, second.phase)
                    del groups[j]
                    merged = True
                    break
            if merged:
                break
    return groups


def _divided(groups: list[_Group], apart: frozenset[tuple[Op, Op]]) -> set[tuple[int, int]]:
    """Returns the pairs of groups, lower index first, that must not be joined."""
    home = {op: i for i, group in enumerate(groups) for op in group.operations}
    pairs = [(home[maker], home[reader]) for maker, reader in apart if reader in home]
    return {(min(pair), max(pair)) for pair in pairs}


def _connected_through_others(needs: list[set[int]], first: int, second: int) -> bool:
    """Returns whether a path of length two or more connects two groups, in either direction."""
    for start, goal in ((first, second), (second, first)):
        stack, seen = [n for n in needs[start] if n != goal], set()
        while stack:
            node = stack.pop()
            if node == goal:
                return True
            if node not in seen:
                seen.add(node)
                stack.extend(needs[node])
    return False


def _finish(
    traced: TracedGraph, groups: list[_Group], replicated: frozenset[Op]
) -> tuple[Segment, ...]:
    """Turns groups into segments in topological order, with their inputs and outputs."""
    needs = _edges(groups, replicated)
    order = _topological(groups, needs)
    position = {group: index for index, group in enumerate(order)}
    creation = {op: i for i, op in enumerate(traced.operations)}
    home = {op: i for i, group in enumerate(groups) for op in group.operations}
    read_elsewhere: set[int] = {id(tensor) for tensor in traced.results}
    for i, group in enumerate(groups):
        for op in group.operations:
            for tensor in op.inputs:
                if tensor.op not in replicated and home.get(tensor.op, i) != i:
                    read_elsewhere.add(id(tensor))
    variables = {id(v.placeholder) for v in traced.variables}
    captures = {id(inner) for _, inner in traced.captures}
    segments = []
    for index, g in enumerate(order):
        operations = sorted(groups[g].operations, key=creation.__getitem__)
        members = set(operations)
        read = _reads(operations, members, replicated, creation)
        outputs = [t for op in operations for t in op.outputs if id(t) in read_elsewhere]
        data = {home[t.op] for t in read if t.op in home}
        segments.append(
            Segment(
                index=index,
                partition=groups[g].partition,
                phase=groups[g].phase,
                operations=tuple(operations),
                inputs=tuple(t for t in read if id(t) not in variables and id(t) not in captures),
                variables=tuple(t for t in read if id(t) in variables),
                captures=tuple(t for t in read if id(t) in captures),
                outputs=tuple(outputs),
                after=tuple(sorted(position[n] for n in needs[g] - data)),
            )
        )
    return tuple(segments)


def _reads(
    operations: list[Op], members: set[Op], replicated: frozenset[Op], traced: Container[Op]
) -> list[Tensor]:
    """Returns the outside tensors that operations read, also through replicated operations.

    Those of operations that are not `traced` are left out: a gradient that was taken before gives
    loops further inputs, which do not depend on anything that the segment gets from outside.
    """
    found: dict[int, Tensor] = {}
    seen: set[Op] = set()
    stack = list(reversed(operations))
    while stack:
        op = stack.pop()
        if op in seen:
            continue
        seen.add(op)
        for tensor in op.inputs:
            if tensor.op in replicated:
                stack.append(tensor.op)
            elif tensor.op not in members and tensor.op in traced:
                found.setdefault(id(tensor), tensor)
    return list(found.values())


def _topological(groups: list[_Group], needs: list[set[int]]) -> list[int]:
    """Returns the groups in topological order, ready ones by phase and partition."""
    waiting = [len(n) for n in needs]
    users: list[list[int]] = [[] for _ in groups]
    for i, required in enumerate(needs):
        for n in required:
            users[n].append(i)
    ready = [(g.phase, g.partition, i) for i, g in enumerate(groups) if not waiting[i]]
    heapq.heapify(ready)
    order = []
    while ready:
        *_, i = heapq.heappop(ready)
        order.append(i)
        for user in users[i]:
            waiting[user] -= 1
            if not waiting[user]:
                heapq.heappush(ready, (groups[user].phase, groups[user].partition, user))
    return order
