"""The condensed layer graph of a plan for drawing: few nodes, in one band per stage."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from opensmp.compiler.format import shortened
from opensmp.compiler.plan.plan import Plan
from opensmp.compiler.plan.report.predicted_schedule import stages

_WORDS = re.compile(r"[/_]")
_MIN_NODES, _ALL_NODES = 3, 30
_LONGEST_NAME = 26


class Node(NamedTuple):
    """Adjacent units of one stage that are drawn as one node.

    Attributes:
        name: Name of a layer, or the common prefix of several.
        units: The units, in order.
        seconds: Their time per microbatch, forward and backward.
    """

    name: str
    units: tuple[int, ...]
    seconds: float


class Edge(NamedTuple):
    """The tensors from one node to another, for one microbatch.

    Attributes:
        source: Index of the producing node.
        target: Index of the reading node.
        forward_bytes: Size of the tensors.
        cut: Whether any of them changes the partition.
    """

    source: int
    target: int
    forward_bytes: int
    cut: bool


class Band(NamedTuple):
    """One stage, or an empty partition, with the indices of its nodes."""

    partition: int
    nodes: tuple[int, ...]


@dataclass(frozen=True)
class LayerGraph:
    """The condensed layer graph of a plan.

    Attributes:
        nodes: In topological order.
        edges: Between different nodes, sorted by source and target.
        bands: From left to right.
    """

    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    bands: tuple[Band, ...]


def condense(plan: Plan, num_nodes: int = _ALL_NODES) -> LayerGraph:
    """Condenses the layer graph of a plan for drawing.

    Adjacent units of a layer form one node. If there are still too many nodes, adjacent ones with
    the longest common name prefix are joined, those with the least time first.
    """
    graph, assignment = plan.costs, plan.assignment
    stage = stages(graph, assignment)
    num_stages = int(stage.max(initial=-1)) + 1
    most = max(_MIN_NODES, num_nodes // max(num_stages, 1))
    nodes: list[Node] = []
    bands: list[Band] = []
    for s in range(num_stages):
        units = [u for u in range(len(graph)) if stage[u] == s]
        joined = _joined(_by_layer(plan, units), most)
        bands.append(
            Band(int(assignment[units[0]]), tuple(range(len(nodes), len(nodes) + len(joined))))
        )
        nodes += joined
    bands += [Band(p, ()) for p in plan.empty]
    if num_stages + len(plan.empty) == plan.num_partitions:
        bands.sort()  # one band per partition: sort empty ones into place
    return LayerGraph(tuple(nodes), _edges(plan, nodes), tuple(bands))


def _by_layer(plan: Plan, units: Sequence[int]) -> list[Node]:
    """Returns one node per run of adjacent units of the same layer."""
    graph = plan.costs
    nodes: list[Node] = []
    for unit in units:
        name = (graph.layers[unit] if graph.layers else "") or graph.names[unit]
        seconds = float(graph.forward_seconds[unit] + graph.backward_seconds[unit])
        if nodes and nodes[-1].name == name:
            last = nodes[-1]
            nodes[-1] = Node(name, (*last.units, unit), last.seconds + seconds)
        else:
            nodes.append(Node(name, (unit,), seconds))
    return nodes


def _joined(nodes: list[Node], most: int) -> list[Node]:
    """Joins adjacent nodes until at most `most` remain; see `condense`."""
    groups = [[node] for node in nodes]
    while len(groups) > most:
        costs = [
            (-len(_common([*left, *right])), _seconds(left) + _seconds(right), i)
            for i, (left, right) in enumerate(pairwise(groups))
        ]
        _, _, i = min(costs)
        groups[i : i + 2] = [groups[i] + groups[i + 1]]
    return [
        Node(_group_name(group), tuple(u for node in group for u in node.units), _seconds(group))
        for group in groups
    ]


def _seconds(group: Sequence[Node]) -> float:
    return sum(node.seconds for node in group)


def _common(group: Sequence[Node]) -> list[str]:
    """Returns the common leading words of a group's names."""
    words = [_WORDS.split(node.name) for node in (group[0], group[-1])]
    common = []
    for left, right in zip(*words, strict=False):
        if left != right:
            break
        common.append(left)
    return common


def _group_name(group: Sequence[Node]) -> str:
    if len(group) == 1:
        return shortened(group[0].name)
    first = group[0].name
    common = sum(len(word) + 1 for word in _common(group)) - 1
    if common >= min(len(first), 4):
        return f"{shortened(first[:common])} ({len(group)})"
    half = _LONGEST_NAME // 2
    return f"{shortened(first, half)} … {shortened(group[-1].name, half)}"


def _edges(plan: Plan, nodes: Sequence[Node]) -> tuple[Edge, ...]:
    """Returns the edges between nodes, with parallel tensors summed up."""
    graph, assignment = plan.costs, plan.assignment
    home = {unit: index for index, node in enumerate(nodes) for unit in node.units}
    found: dict[tuple[int, int], Edge] = {}
    for tensor in graph.tensors:
        source = home[tensor.producer]
        targets = {home[unit]: unit for unit in tensor.consumers}
        for target, unit in sorted(targets.items()):
            if target != source:
                cut = bool(assignment[unit] != assignment[tensor.producer])
                before = found.get((source, target), Edge(source, target, 0, False))
                size = before.forward_bytes + tensor.forward_bytes
                found[source, target] = Edge(source, target, size, cut or before.cut)
    return tuple(found[key] for key in sorted(found))
