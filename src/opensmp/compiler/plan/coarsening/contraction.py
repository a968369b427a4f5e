"""Contracts an acyclic graph: joins nodes such that it stays acyclic.

A graph is a number of nodes and, for each node, its predecessors (`needs`). A grouping maps each
node to the number of its group; groups are numbered in the order of their first nodes.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence

from opensmp.errors import PlanError

Needs = Sequence[Iterable[int]]
Pair = tuple[int, int]

_CHECKS = 8
_MORE_NODES = 50_000
"""`joined` visits at most `_CHECKS` * (number of nodes) + `_MORE_NODES` nodes."""


def contracted(needs: Needs, groups: Sequence[int]) -> list[set[int]]:
    """Returns the graph of the groups: the predecessors of each group, without itself."""
    result: list[set[int]] = [set() for _ in range(max(groups, default=-1) + 1)]
    for node, producers in enumerate(needs):
        group = groups[node]
        result[group].update(groups[p] for p in producers if groups[p] != group)
    return result


def topological_order(needs: Needs) -> list[int]:
    """Returns the nodes in topological order; of the ready ones, the lowest number comes first."""
    order, waiting = _peeled(needs)
    if len(order) < len(waiting):
        stuck = [node for node, count in enumerate(waiting) if count]
        raise PlanError(
            f"The graph has a cycle: {len(stuck)} of its {len(waiting)} nodes wait for each "
            f"other, among them {stuck[:5]}. Expected: a graph whose operations are in "
            "topological order."
        )
    return order


def joined(needs: Needs, pairs: Sequence[Pair]) -> tuple[list[int], list[Pair]]:
    """Joins the nodes of each pair unless that creates a cycle.

    All pairs are tried at once. Pairs that are part of no cycle are accepted; the others are tried
    again in halves, so that a few bad pairs cost little. Refused pairs are tried once more after
    others were accepted, since these may have joined the whole cycle. The number of trials is
    bounded; pairs that are not accepted by then are refused.
    """
    parent = list(range(len(needs)))
    refused: list[Pair] = []
    budget = _CHECKS * len(needs) + _MORE_NODES
    batches = [list(pairs)] if pairs else []
    accepted = False  # whether a pair was accepted after the first refusal
    while batches or (accepted and refused):
        if not batches:
            batches, refused, accepted = [refused], [], False
        batch = batches.pop()
        if budget <= 0:
            refused.extend(
                pair for pair in batch if _root(parent, pair[0]) != _root(parent, pair[1])
            )
            continue
        trial = parent.copy()
        for a, b in batch:
            _unite(trial, a, b)
        groups = _numbered([_root(trial, node) for node in range(len(trial))])
        graph = contracted(needs, groups)
        budget -= len(graph)
        cyclic = _cyclic(graph)
        if not cyclic:
            parent = trial
            accepted |= bool(refused)
            continue
        good = [pair for pair in batch if groups[pair[0]] not in cyclic]
        bad = [pair for pair in batch if groups[pair[0]] in cyclic]
        for a, b in good:
            _unite(parent, a, b)
        accepted |= bool(good and refused)
        if len(bad) == 1:
            refused.extend(bad)
        elif good:
            batches.append(bad)
        else:  # try the half with the more important pairs first
            batches += [bad[len(bad) // 2 :], bad[: len(bad) // 2]]
    return _numbered([_root(parent, node) for node in range(len(parent))]), refused


def chained(needs: Needs, weights: Sequence[float], limit: float, *, by_reader: bool) -> list[int]:
    """Joins light nodes with their only predecessor, or with their only successor if `by_reader`.

    This cannot create a cycle: all paths out of a node with one successor lead through it, and all
    paths into a node with one predecessor lead through it. Nodes that are not light have infinite
    weight; the light nodes added to a node weigh at most `limit` together.
    """
    near = _readers(needs) if by_reader else [sorted(set(producers)) for producers in needs]
    parent = list(range(len(near)))
    added = [0.0 if weight == math.inf else weight for weight in weights]
    for node, others in enumerate(near):
        if len(others) == 1 and weights[node] < math.inf:
            a, b = _root(parent, node), _root(parent, others[0])
            if added[a] + added[b] <= limit:
                root = _unite(parent, a, b)
                added[root] = added[a] + added[b]
    return _numbered([_root(parent, node) for node in range(len(parent))])


def reduced(needs: Needs, weights: Sequence[float], most: int) -> list[int]:
    """Joins nodes until at most `most` (>= 1) groups remain, with weights as even as possible.

    Chains are joined first: a node and its only successor or predecessor, if their total weight is
    within a limit, which doubles when no more joins are found. The remaining nodes, such as a dense
    web of tiny nodes, are joined as runs of a topological order. Heavy nodes thus keep their
    boundaries, where cuts are worthwhile.
    """
    groups = list(range(len(needs)))
    total = float(sum(weights))
    limit = total / most / 4
    while max(groups, default=-1) + 1 > most:
        before = max(groups) + 1
        for by_reader in (True, False):
            graph, heavy = contracted(needs, groups), _sums(weights, groups)
            merged = chained(graph, heavy, limit, by_reader=by_reader)
            groups = _numbered([merged[g] for g in groups])
        after = max(groups) + 1
        if after > 0.9 * before:
            if not limit or limit > 4 * total / most:  # doubling a limit of 0 has no effect
                break
            limit *= 2
    if max(groups, default=-1) + 1 > most:
        graph, heavy = contracted(needs, groups), _sums(weights, groups)
        runs = _runs(topological_order(graph), heavy, most)
        groups = _numbered([runs[g] for g in groups])
    return groups


# --- steps ------------------------------------------------------------------------------------


def _runs(order: Sequence[int], weights: Sequence[float], most: int) -> list[int]:
    """Cuts an order into at most `most` runs of similar weight and limited length."""
    share = [w / max(sum(weights), 1e-30) + 1 / len(order) for w in weights]
    run, filled, runs = 0, 0.0, [0] * len(order)
    for node in order:
        if filled and filled + share[node] > 4 / most:
            run, filled = run + 1, 0.0
        runs[node] = run
        filled += share[node]
    return runs


def _readers(needs: Needs) -> list[list[int]]:
    readers: list[list[int]] = [[] for _ in needs]
    for node, producers in enumerate(needs):
        for p in set(producers):
            readers[p].append(node)
    return readers


def _sums(weights: Sequence[float], groups: Sequence[int]) -> list[float]:
    result = [0.0] * (max(groups, default=-1) + 1)
    for weight, group in zip(weights, groups, strict=True):
        result[group] += weight
    return result


def _peeled(needs: Needs) -> tuple[list[int], list[int]]:
    """Returns the nodes before any cycle, in order, and each node's count of unmet predecessors."""
    readers = _readers(needs)
    waiting = [len(set(producers)) for producers in needs]
    ready = [node for node, count in enumerate(waiting) if not count]
    heapq.heapify(ready)
    order = []
    while ready:
        node = heapq.heappop(ready)
        order.append(node)
        for reader in readers[node]:
            waiting[reader] -= 1
            if not waiting[reader]:
                heapq.heappush(ready, reader)
    return order, waiting


def _cyclic(needs: Needs) -> set[int]:
    """Returns the nodes on cycles and on paths between cycles."""
    _, waiting = _peeled(needs)
    left = {node for node, count in enumerate(waiting) if count}
    users = dict.fromkeys(left, 0)
    for node in left:
        for p in needs[node]:
            if p in left:
                users[p] += 1
    ends = [node for node, count in users.items() if not count]
    while ends:
        node = ends.pop()
        left.discard(node)
        for p in needs[node]:
            if p in left:
                users[p] -= 1
                if not users[p]:
                    ends.append(p)
    return left


def _root(parent: list[int], node: int) -> int:
    while parent[node] != node:
        parent[node] = parent[parent[node]]
        node = parent[node]
    return node


def _unite(parent: list[int], a: int, b: int) -> int:
    low, high = sorted((_root(parent, a), _root(parent, b)))
    parent[high] = low
    return low


def _numbered(roots: Sequence[int]) -> list[int]:
    """Numbers groups in the order of their first nodes."""
    number: dict[int, int] = {}
    return [number.setdefault(root, len(number)) for root in roots]
