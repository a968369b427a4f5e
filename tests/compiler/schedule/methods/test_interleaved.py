from __future__ import annotations

import inspect

import pytest

from opensmp.compiler.schedule.actions import Action, TaskGraph
from opensmp.compiler.schedule.methods.interleaved import interleaved
from opensmp.compiler.schedule.methods.simple import simple
from opensmp.compiler.schedule.simulate import simulate
from opensmp.compiler.schedule.validate import validate
from opensmp.errors import ScheduleError


def texts(order: tuple[Action, ...]) -> str:
    return " ".join(map(str, order))


def test_one_forward_one_backward_on_two_devices() -> None:
    graph = TaskGraph.chain(num_partitions=2, num_microbatches=4)
    schedule = interleaved(graph, active_microbatches=2)
    assert schedule.name == "interleaved"
    assert [texts(order) for order in schedule.orders] == [
        "0F0 0F1 0B0 0F2 0B1 0F3 0B2 0B3",
        "1F0 1B0 1F1 1B1 1F2 1B2 1F3 1B3",
    ]


def test_four_devices_warm_up_then_alternate() -> None:
    graph = TaskGraph.chain(num_partitions=4, num_microbatches=6)
    schedule = interleaved(graph, active_microbatches=4)
    assert texts(schedule.orders[0]) == "0F0 0F1 0F2 0F3 0B0 0F4 0B1 0F5 0B2 0B3 0B4 0B5"
    assert texts(schedule.orders[3]) == "3F0 3B0 3F1 3B1 3F2 3B2 3F3 3B3 3F4 3B4 3F5 3B5"


def test_one_active_microbatch_runs_one_after_the_other() -> None:
    graph = TaskGraph.chain(num_partitions=3, num_microbatches=2)
    schedule = interleaved(graph, active_microbatches=1)
    assert texts(schedule.orders[0]) == "0F0 0B0 0F1 0B1"
    assert simulate(schedule, graph).makespan_seconds == 2 * 3 * (1 + 2)


def test_two_segments_on_a_device_go_backward_from_the_later_one() -> None:
    chain = TaskGraph.chain(num_partitions=4, num_microbatches=2)
    graph = TaskGraph({a: a.segment % 2 for a in chain.device}, chain.needs)
    schedule = interleaved(graph, active_microbatches=2)
    assert [texts(order) for order in schedule.orders] == [
        "0F0 0F1 2F0 2F1 2B0 2B1 0B0 0B1",
        "1F0 1F1 3F0 3B0 3F1 3B1 1B0 1B1",
    ]


@pytest.mark.parametrize("partitions", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("microbatches", [1, 4, 16])
def test_makespan_is_no_longer_than_that_of_simple(partitions: int, microbatches: int) -> None:
    graph = TaskGraph.chain(partitions, microbatches)
    ideal = (microbatches + partitions - 1) * (1 + 2)
    assert simulate(simple(graph), graph).makespan_seconds == ideal
    for bound in (partitions, partitions + 2, microbatches + partitions):
        assert simulate(interleaved(graph, bound), graph).makespan_seconds == ideal


@pytest.mark.parametrize("bound", [1, 2, 4, 6, 20])
def test_live_activations_stay_within_active_microbatches(bound: int) -> None:
    graph = TaskGraph.chain(num_partitions=4, num_microbatches=16)
    schedule = interleaved(graph, active_microbatches=bound)
    simulation = simulate(schedule, graph)
    assert schedule.active_microbatches == bound
    assert simulation.peak_in_flight == min(bound, 10)  # backwards come back by then
    assert max(simulation.live_activations) <= bound
    assert simulation.live_activations[-1] == 1


def test_as_many_active_microbatches_as_devices_hold_no_more_activations_than_that() -> None:
    for partitions in (2, 4, 8):
        graph = TaskGraph.chain(partitions, num_microbatches=32)
        simulation = simulate(interleaved(graph, partitions), graph)
        assert max(simulation.live_activations) == partitions


def test_each_segment_of_a_device_holds_its_own_activations_within_the_bound() -> None:
    chain = TaskGraph.chain(num_partitions=8, num_microbatches=16)
    graph = TaskGraph({a: a.segment % 2 for a in chain.device}, chain.needs)
    simulation = simulate(interleaved(graph, active_microbatches=3), graph)
    assert simulation.peak_in_flight == 3
    assert max(simulation.live_activations) <= 3 * 4


def test_weight_gradients_follow_those_of_the_inputs_at_once() -> None:
    chain = TaskGraph.chain(num_partitions=2, num_microbatches=2)
    weights = {Action("W", a.segment, a.microbatch): d for a, d in chain.device.items()}
    needs = {w: frozenset({Action("B", w.segment, w.microbatch)}) for w in weights}
    graph = TaskGraph(
        {**chain.device, **weights},
        {**chain.needs, **needs},
        dict.fromkeys((*chain.device, *weights), 1.0),
    )
    schedule = interleaved(graph, active_microbatches=2)
    assert [texts(order) for order in schedule.orders] == [
        "0F0 0F1 0B0 0W0 0B1 0W1",
        "1F0 1B0 1W0 1F1 1B1 1W1",
    ]


def test_bound_gives_way_to_dependencies_between_microbatches() -> None:
    # A loss over all microbatches: no backward before the last forward.
    chain = TaskGraph.chain(num_partitions=2, num_microbatches=4)
    last_forwards = frozenset(Action("F", 1, m) for m in range(4))
    needs = {a: n | (last_forwards if a.kind == "B" else set()) for a, n in chain.needs.items()}
    graph = TaskGraph(chain.device, needs)
    schedule = interleaved(graph, active_microbatches=2)
    validate(schedule, graph)
    assert schedule.active_microbatches == 4
    assert texts(schedule.orders[0]) == "0F0 0F1 0F2 0F3 0B0 0B1 0B2 0B3"


def test_no_active_microbatch_is_refused() -> None:
    with pytest.raises(
        ScheduleError, match=r"'interleaved': active_microbatches=0 is not possible"
    ):
        interleaved(TaskGraph.chain(num_partitions=2, num_microbatches=2), 0)


def test_picture_in_the_docstring_is_true() -> None:
    graph = TaskGraph.chain(num_partitions=3, num_microbatches=4)
    picture = str(interleaved(graph, active_microbatches=3)).splitlines()
    lines = [line.strip() for line in (inspect.getdoc(interleaved) or "").splitlines()]
    start = lines.index(picture[0])
    assert lines[start : start + 4] == picture
