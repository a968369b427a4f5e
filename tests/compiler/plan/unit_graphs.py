"""Graphs of units for the partitioner, by hand and at random, and all plans of tiny ones."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from opensmp.compiler.plan.partitioner.problem import Problem, price
from opensmp.compiler.plan.settings import PlanSettings
from opensmp.compiler.plan.unit_graph import CoarseGraph, CutTensor, Machine, SharedVariable

Edge = tuple[int, Sequence[int], int]


def unit_graph(
    seconds: Sequence[float],
    edges: Sequence[Edge],
    *,
    shared: Sequence[SharedVariable] = (),
    residual_bytes: int | Sequence[int] = 10,
    frozen: Sequence[int] = (),
) -> CoarseGraph:
    """Units of 100 B parameters; an edge is (producer, consumers, bytes), gradients as large.

    The backward pass takes twice the forward pass. Frozen units have none, keep nothing,
    and get no gradient.
    """
    size = len(seconds)
    trained = np.array([unit not in frozen for unit in range(size)], dtype=np.int64)
    return CoarseGraph(
        names=tuple(f"unit{i}" for i in range(size)),
        forward_seconds=np.array(seconds, dtype=np.float64),
        backward_seconds=2 * np.array(seconds, dtype=np.float64) * trained,
        parameter_bytes=np.full(size, 100),
        state_bytes=200 * trained,
        residual_bytes=np.broadcast_to(np.asarray(residual_bytes), (size,)) * trained,
        tensors=tuple(
            CutTensor(a, tuple(to), num_bytes, num_bytes if trained[a] else 0, f"t{a}")
            for a, to, num_bytes in edges
        ),
        shared=tuple(shared),
    )


def two_units(**rest: Any) -> CoarseGraph:
    """Two units that keep 100 and 40 bytes; `rest` are further fields of the graph."""
    return CoarseGraph(
        names=("first", "second"),
        forward_seconds=np.array([1.0, 1.0]),
        backward_seconds=np.array([2.0, 2.0]),
        parameter_bytes=np.array([10, 10]),
        state_bytes=np.array([0, 0]),
        residual_bytes=np.array([100, 40]),
        tensors=(CutTensor(0, (1,), forward_bytes=1, backward_bytes=1),),
        **rest,
    )


def chain(seconds: Sequence[float], num_bytes: int = 100, **rest: Any) -> CoarseGraph:
    edges = [(i, (i + 1,), num_bytes) for i in range(len(seconds) - 1)]
    return unit_graph(seconds, edges, **rest)


def random_chain(size: int, seed: int) -> CoarseGraph:
    random = np.random.default_rng(seed)
    sizes = random.integers(1, 1000, size).tolist()
    return unit_graph(
        random.uniform(0.5, 1.5, size).tolist(),
        [(i, (i + 1,), sizes[i]) for i in range(size - 1)],
        residual_bytes=random.integers(1, 100, size).tolist(),
    )


def random_dag(size: int, seed: int, reach: int = 6) -> CoarseGraph:
    """Like a model: most units read what was made shortly before, a few read from afar."""
    random = np.random.default_rng(seed)
    consumers: list[set[int]] = [set() for _ in range(size)]
    for unit in range(1, size):
        for producer in random.integers(max(0, unit - reach), unit, random.integers(1, 3)):
            consumers[producer].add(unit)
        if random.random() < 0.1:
            consumers[random.integers(unit)].add(unit)
    return unit_graph(
        random.uniform(0.1, 1.5, size).tolist(),
        [
            (a, sorted(units), int(random.integers(1, 1000)))
            for a, units in enumerate(consumers)
            if units
        ],
        residual_bytes=random.integers(1, 100, size).tolist(),
    )


@st.composite
def unit_graphs(draw: st.DrawFn, max_size: int = 14) -> CoarseGraph:
    """Any graph: several inputs and outputs, loose units, frozen and free ones, variables."""
    size = draw(st.integers(1, max_size))
    units = st.integers(0, size - 1)
    edges: list[Edge] = []
    for unit in range(size - 1):
        for _ in range(draw(st.integers(0, 2))):
            readers = draw(st.sets(st.integers(unit + 1, size - 1), min_size=1, max_size=3))
            edges.append((unit, sorted(readers), draw(st.integers(0, 1000))))
    shared = [
        SharedVariable(tuple(sorted(readers)), 300, draw(st.sampled_from([0, 300])), "table")
        for readers in draw(st.lists(st.sets(units, min_size=1, max_size=3), max_size=1))
    ]
    return unit_graph(
        draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=size, max_size=size)),
        edges,
        shared=shared,
        residual_bytes=draw(st.lists(st.integers(0, 99), min_size=size, max_size=size)),
        frozen=sorted(draw(st.sets(units, max_size=3))),
    )


MACHINES = st.builds(
    Machine,
    transfer_seconds=st.sampled_from([0.0, 0.01, 0.5]),
    transfer_bytes_per_second=st.sampled_from([1e3, 1e5]),
)


def made_for(machine: Machine, microbatches: int = 4, **rules: Any) -> PlanSettings:
    """Settings for a machine; `rules` are the others of `PlanSettings`."""
    return PlanSettings(microbatches, machine=machine, **rules)


def problem_of(
    graph: CoarseGraph, num_partitions: int, machine: Machine | None = None, microbatches: int = 4
) -> Problem:
    """The problem as `partition_units` states it, for the default schedule."""
    return price(graph, num_partitions, made_for(machine or Machine(), microbatches))


def all_plans(graph: CoarseGraph, num_partitions: int) -> Iterator[NDArray[np.int64]]:
    """Every assignment that leaves no partition empty and no tensor going back."""
    used = min(num_partitions, len(graph))
    for placed in itertools.product(range(used), repeat=len(graph)):
        if len(set(placed)) == used and all(
            placed[tensor.producer] <= placed[unit]
            for tensor in graph.tensors
            for unit in tensor.consumers
        ):
            yield np.array(placed, dtype=np.int64)
