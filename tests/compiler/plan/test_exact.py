from __future__ import annotations

from dataclasses import replace

import pytest
from compiler.plan.exact import optimal_units
from compiler.plan.unit_graphs import (
    MACHINES,
    all_plans,
    chain,
    made_for,
    problem_of,
    unit_graph,
    unit_graphs,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from opensmp.compiler.plan.cost_model import Prediction, evaluate
from opensmp.compiler.plan.partitioner.connectivity import excess_pieces
from opensmp.compiler.plan.partitioner.ideals import LatticeError, all_ideals
from opensmp.compiler.plan.partitioner.partitioner import MEMORY_TOLERANCE
from opensmp.compiler.plan.unit_graph import CoarseGraph, Machine
from opensmp.errors import PlanError


@given(
    unit_graphs(max_size=7),
    MACHINES,
    st.integers(1, 3),
    st.sampled_from([1, 2, 8]),
    st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_no_plan_of_all_is_faster(
    graph: CoarseGraph, machine: Machine, num_partitions: int, microbatches: int, contiguous: bool
) -> None:
    best = optimal_units(
        graph,
        num_partitions,
        made_for(machine, microbatches, optimize="speed", contiguous=contiguous),
    )
    steps = [
        plan.step_seconds
        for plan in predictions(graph, num_partitions, machine, microbatches, contiguous)
    ]
    step = evaluate(graph, best, num_partitions, made_for(machine, microbatches)).step_seconds
    assert step == pytest.approx(min(steps), rel=1e-9, abs=1e-12)


@given(unit_graphs(max_size=7), MACHINES, st.integers(1, 3), st.booleans())
@settings(max_examples=60, deadline=None)
def test_no_plan_of_all_has_a_fullest_device_that_is_smaller_or_is_as_small_and_faster(
    graph: CoarseGraph, machine: Machine, num_partitions: int, contiguous: bool
) -> None:
    placed = optimal_units(graph, num_partitions, made_for(machine, 4, contiguous=contiguous))
    best = evaluate(graph, placed, num_partitions, made_for(machine, 4))
    plans = predictions(graph, num_partitions, machine, 4, contiguous)
    cap = int(min(max(plan.peak_bytes) for plan in plans) * (1 + MEMORY_TOLERANCE))
    fastest = min(plan.step_seconds for plan in plans if max(plan.peak_bytes) <= cap)
    assert max(best.peak_bytes) <= cap
    assert best.step_seconds == pytest.approx(fastest, rel=1e-9, abs=1e-12)


def predictions(
    graph: CoarseGraph, num_partitions: int, machine: Machine, microbatches: int, contiguous: bool
) -> list[Prediction]:
    problem = problem_of(graph, num_partitions)
    return [
        evaluate(graph, placed, num_partitions, made_for(machine, microbatches))
        for placed in all_plans(graph, num_partitions)
        if not contiguous or not excess_pieces(problem, placed)
    ]


def test_ideals_of_a_chain_are_its_prefixes() -> None:
    problem = problem_of(chain([1.0] * 4), 2)
    assert all_ideals(problem, most=10) == [0b0, 0b1, 0b11, 0b111, 0b1111]


def test_ideals_of_units_side_by_side_are_all_subsets() -> None:
    problem = problem_of(unit_graph([1.0] * 3, []), 2)
    assert sorted(all_ideals(problem, most=10)) == list(range(8))


def test_graph_with_too_many_ideals_is_refused() -> None:
    with pytest.raises(LatticeError, match="more than 3000 ways to cut it in two"):
        optimal_units(unit_graph([1.0] * 14, []), 2, made_for(Machine(), 4))


def test_memory_is_kept_to() -> None:
    graph = chain([3.0, 1.0, 1.0, 1.0], num_bytes=1, residual_bytes=[0, 0, 0, 1000])
    machine = Machine(memory_bytes=4400)
    placed = optimal_units(graph, 2, made_for(machine, 4, optimize="speed"))
    assert max(evaluate(graph, placed, 2, made_for(machine, 4)).peak_bytes) <= 4400


def test_memory_that_no_plan_meets_is_an_error() -> None:
    with pytest.raises(PlanError, match="too much"):
        optimal_units(chain([1.0] * 4), 2, made_for(replace(Machine(), memory_bytes=500), 4))


def test_no_units_make_an_empty_plan() -> None:
    assert optimal_units(unit_graph([], []), 2, made_for(Machine(), 4)).tolist() == []
