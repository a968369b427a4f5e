from __future__ import annotations

import inspect
import textwrap

import pytest

from opensmp.compiler.schedule.actions import Action, TaskGraph, default_seconds
from opensmp.compiler.schedule.grid import grid
from opensmp.compiler.schedule.methods import zero_bubble as module
from opensmp.compiler.schedule.methods.interleaved import interleaved
from opensmp.compiler.schedule.methods.zero_bubble import zero_bubble
from opensmp.compiler.schedule.pipelines import build
from opensmp.compiler.schedule.simulate import simulate
from opensmp.compiler.schedule.validate import validate
from opensmp.errors import ScheduleError


def split_chain(partitions: int, microbatches: int) -> TaskGraph:
    return TaskGraph.chain(partitions, microbatches, split_backward=True)


def test_weight_gradients_fill_the_bubble() -> None:
    graph = split_chain(2, 4)
    schedule = zero_bubble(graph, active_microbatches=4)
    drawn = textwrap.indent(grid(schedule, graph), 4 * " ")
    assert drawn in (inspect.getdoc(zero_bubble) or "")
    whole = TaskGraph.chain(2, 4)
    before = simulate(interleaved(whole, active_microbatches=4), whole)
    after = simulate(schedule, graph)
    assert sum(after.busy_seconds) == sum(before.busy_seconds)
    assert after.makespan_seconds < before.makespan_seconds


@pytest.mark.parametrize("partitions", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("microbatches", [1, 4, 16])
def test_is_never_longer_than_interleaved_with_the_same_bound(
    partitions: int, microbatches: int
) -> None:
    whole, split = TaskGraph.chain(partitions, microbatches), split_chain(partitions, microbatches)
    for bound in (partitions, partitions + 2):
        schedule = zero_bubble(split, bound)
        validate(schedule, split)
        simulation = simulate(schedule, split)
        assert simulation.peak_in_flight <= bound
        expected = simulate(interleaved(whole, bound), whole).makespan_seconds
        assert simulation.makespan_seconds <= expected


@pytest.mark.parametrize("partitions", [2, 3, 4, 8])
@pytest.mark.parametrize("microbatches", [16, 32])
def test_last_device_never_idles_once_it_has_begun(partitions: int, microbatches: int) -> None:
    graph = split_chain(partitions, microbatches)
    simulation = simulate(zero_bubble(graph, 2 * partitions + 2), graph)
    assert simulation.makespan_seconds == 3 * microbatches + partitions - 1


def test_only_as_many_weight_gradients_wait_as_fill_the_bubble() -> None:
    graph = split_chain(2, 16)
    orders = zero_bubble(graph, 4).orders[1]
    follows = [orders[orders.index(Action("B", 1, m)) + 1] for m in range(16)]
    assert follows[:12] == [Action("W", 1, m) for m in range(12)]
    assert simulate(zero_bubble(graph, 4), graph).live_activations == (3, 3)


def test_without_weight_gradients_it_is_interleaved() -> None:
    graph = TaskGraph.chain(num_partitions=3, num_microbatches=5)
    assert zero_bubble(graph, 3).orders == interleaved(graph, 3).orders


def test_a_backward_pass_is_half_as_long_without_its_weight_gradients() -> None:
    actions = [Action.parse(text) for text in ("0B0", "1B0", "1W0")]
    assert list(default_seconds(actions).values()) == [2.0, 1.0, 1.0]


def test_is_known_by_its_name() -> None:
    graph = split_chain(2, 2)
    assert build("zero_bubble", graph, 4).orders == zero_bubble(graph, 4).orders


def test_refuses_a_bound_of_zero() -> None:
    with pytest.raises(ScheduleError, match="active_microbatches=0"):
        zero_bubble(split_chain(2, 2), 0)


@pytest.mark.parametrize("partitions", [3, 4, 8, 12])
@pytest.mark.parametrize("more", [0, 2, 20])
def test_large_chains_are_as_fast_with_the_few_numbers_that_are_tried(
    partitions: int, more: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = split_chain(partitions, 3 * partitions)
    best = simulate(zero_bubble(graph, partitions + more), graph).makespan_seconds
    monkeypatch.setattr(module, "MOST_ACTIONS_TO_SEARCH", 0)
    few = simulate(zero_bubble(graph, partitions + more), graph).makespan_seconds
    assert few <= 1.01 * best
