from __future__ import annotations

import inspect

import pytest

from opensmp.compiler.schedule.actions import Action, TaskGraph
from opensmp.compiler.schedule.methods.simple import simple
from opensmp.compiler.schedule.simulate import simulate
from opensmp.compiler.schedule.validate import validate


def texts(order: tuple[Action, ...]) -> str:
    return " ".join(map(str, order))


def tied(graph: TaskGraph, **more: str) -> TaskGraph:
    """The graph with further dependencies, such as _0F1="0B0"."""
    needs = dict(graph.needs)
    for action, needed in more.items():
        needs[Action.parse(action[1:])] |= {Action.parse(needed)}
    return TaskGraph(graph.device, needs, graph.seconds, graph.num_devices)


def test_all_forwards_come_before_all_backwards() -> None:
    schedule = simple(TaskGraph.chain(num_partitions=2, num_microbatches=3))
    assert schedule.name == "simple"
    assert [texts(order) for order in schedule.orders] == [
        "0F0 0F1 0F2 0B0 0B1 0B2",
        "1F0 1F1 1F2 1B0 1B1 1B2",
    ]


def test_device_with_two_segments_finishes_both_forwards_first() -> None:
    chain = TaskGraph.chain(num_partitions=4, num_microbatches=2)
    graph = TaskGraph({a: a.segment % 2 for a in chain.device}, chain.needs)
    assert [texts(order) for order in simple(graph).orders] == [
        "0F0 0F1 2F0 2F1 2B0 2B1 0B0 0B1",
        "1F0 1F1 3F0 3F1 3B0 3B1 1B0 1B1",
    ]


def test_slow_first_segment_does_not_let_backwards_in_between() -> None:
    chain = TaskGraph.chain(num_partitions=2, num_microbatches=3)
    slow = TaskGraph(chain.device, chain.needs, {a: 9.0 for a in chain.device if a.segment == 0})
    assert texts(simple(slow).orders[1]) == "1F0 1F1 1F2 1B0 1B1 1B2"


@pytest.mark.parametrize(("partitions", "microbatches"), [(1, 4), (2, 2), (4, 8), (3, 16), (8, 1)])
def test_bubble_is_the_one_of_gpipe(partitions: int, microbatches: int) -> None:
    chain = TaskGraph.chain(partitions, microbatches)
    graph = TaskGraph(chain.device, chain.needs, dict.fromkeys(chain.device, 1.0))
    simulation = simulate(simple(graph), graph)
    assert simulation.bubble == pytest.approx(
        (partitions - 1) / (microbatches + partitions - 1), abs=1e-12
    )
    assert simulation.makespan_seconds == 2 * (microbatches + partitions - 1)


def test_activations_of_all_microbatches_are_alive() -> None:
    graph = TaskGraph.chain(num_partitions=4, num_microbatches=8)
    schedule = simple(graph)
    assert simulate(schedule, graph).live_activations == (8, 8, 8, 8)
    assert schedule.active_microbatches == 8
    assert schedule.releases == ()


def test_forward_that_needs_a_backward_comes_in_a_second_round() -> None:
    graph = tied(TaskGraph.chain(num_partitions=2, num_microbatches=3), _0F1="0B0")
    schedule = simple(graph)
    validate(schedule, graph)
    assert [texts(order) for order in schedule.orders] == [
        "0F0 0F2 0B0 0B2 0F1 0B1",
        "1F0 1F2 1B0 1B2 1F1 1B1",
    ]


def test_microbatches_that_all_depend_on_each_other_run_one_by_one() -> None:
    graph = tied(TaskGraph.chain(num_partitions=2, num_microbatches=3), _0F1="0B0", _0F2="0B1")
    schedule = simple(graph)
    validate(schedule, graph)
    assert texts(schedule.orders[0]) == "0F0 0B0 0F1 0B1 0F2 0B2"


def test_second_call_of_a_backward_follows_the_first() -> None:
    chain = TaskGraph.chain(num_partitions=1, num_microbatches=2)
    again = {Action("B", 0, m, call=1): 0 for m in (0, 1)}
    needs = {action: frozenset({Action("F", 0, action.microbatch)}) for action in again}
    graph = TaskGraph({**chain.device, **again}, {**chain.needs, **needs})
    assert texts(simple(graph).orders[0]) == "0F0 0F1 0B0 0B0.1 0B1 0B1.1"


def test_forward_only_is_the_plain_stream() -> None:
    graph = TaskGraph.chain(num_partitions=2, num_microbatches=3, backward=False)
    assert [texts(order) for order in simple(graph).orders] == ["0F0 0F1 0F2", "1F0 1F1 1F2"]


def test_picture_in_the_docstring_is_true() -> None:
    picture = str(simple(TaskGraph.chain(num_partitions=3, num_microbatches=4)))
    lines = [line.strip() for line in (inspect.getdoc(simple) or "").splitlines()]
    start = lines.index(picture.splitlines()[0])
    assert lines[start : start + 4] == picture.splitlines()
