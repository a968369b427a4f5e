from __future__ import annotations

import pytest

from opensmp.compiler.schedule.actions import Action, Schedule, TaskGraph, default_seconds
from opensmp.compiler.schedule.methods.simple import simple
from opensmp.errors import ScheduleError


def actions(text: str) -> tuple[Action, ...]:
    return tuple(Action.parse(word) for word in text.split())


@pytest.mark.parametrize(
    ("action", "text"),
    [
        (Action("F", 2, 0), "2F0"),
        (Action("B", 0, 13), "0B13"),
        (Action("W", 10, 1), "10W1"),
        (Action("R", 1, 2, 0), "1R2"),
        (Action("B", 2, 0, 1), "2B0.1"),
    ],
)
def test_text_of_an_action_reads_back(action: Action, text: str) -> None:
    assert action.text == str(action) == f"{action}" == text
    assert Action.parse(text) == action


@pytest.mark.parametrize(
    "text", ["", "F0", "2F", "2X0", "2f0", "-1F0", "2F0.", " 2F0", "2F0 ", "²F0"]
)
def test_text_that_is_no_action_is_refused(text: str) -> None:
    with pytest.raises(ScheduleError) as error:
        Action.parse(text)
    assert str(error.value) == (
        f"Action: {text!r} is not the text of an action; write segment, kind (F, B, W, R), "
        "microbatch and, above 0, the call: '2F0', '2B0.1'."
    )


def test_backward_takes_twice_the_seconds_of_forward_by_default() -> None:
    assert list(default_seconds(actions("0F0 0B0 0R0")).values()) == [1.0, 2.0, 1.0]


def test_chain_has_the_dependencies_of_a_linear_pipeline() -> None:
    graph = TaskGraph.chain(num_partitions=3, num_microbatches=2)
    assert graph.num_devices == 3
    assert len(graph.device) == 12
    assert all(graph.device[action] == action.segment for action in graph.device)
    for text, needed in {
        "0F1": "",
        "1F1": "0F1",
        "2F1": "1F1",
        "2B1": "2F1",
        "1B1": "1F1 2B1",
        "0B1": "0F1 1B1",
    }.items():
        assert graph.needs[Action.parse(text)] == frozenset(actions(needed))


def test_chain_without_backward_has_forwards_only() -> None:
    graph = TaskGraph.chain(num_partitions=2, num_microbatches=2, backward=False)
    assert set(graph.device) == set(actions("0F0 1F0 0F1 1F1"))


def test_chain_of_nothing_is_refused() -> None:
    with pytest.raises(ScheduleError, match=r"num_partitions=0 and num_microbatches=4 must both"):
        TaskGraph.chain(0, 4)


def test_dependents_are_the_reverse_of_needs() -> None:
    graph = TaskGraph.chain(num_partitions=2, num_microbatches=1)
    assert set(graph.dependents[Action.parse("0F0")]) == set(actions("1F0 0B0"))
    assert graph.dependents[Action.parse("0B0")] == ()


def test_topological_order_puts_dependencies_first() -> None:
    graph = TaskGraph.chain(num_partitions=3, num_microbatches=3)
    order = graph.topological_order
    assert sorted(order) == sorted(graph.device)
    position = {action: index for index, action in enumerate(order)}
    assert all(position[n] < position[a] for a in order for n in graph.needs[a])


def test_what_is_left_out_of_a_task_graph_is_filled_in() -> None:
    forward, backward = actions("0F0 0B0")
    graph = TaskGraph({forward: 0, backward: 2}, {backward: frozenset({forward})}, {forward: 5.0})
    assert graph.num_devices == 3
    assert graph.needs[forward] == frozenset()
    assert graph.seconds == {forward: 5.0, backward: 2.0}
    assert graph.microbatches == (0,)


def test_task_graph_does_not_change_with_the_dicts_it_was_made_from() -> None:
    forward, backward = actions("0F0 0B0")
    device, seconds = {forward: 0}, {forward: 1.0}
    graph = TaskGraph(device, {}, seconds)
    device[backward] = 1
    seconds[forward] = 9.0
    assert graph.device == {forward: 0}
    assert graph.seconds == {forward: 1.0}


def test_every_fault_of_a_task_graph_is_named_at_once() -> None:
    first, second, unknown = actions("0F0 1F0 7F7")
    with pytest.raises(ScheduleError) as error:
        TaskGraph(
            device={first: 0, second: 2, Action("X", 0, 0): 1, Action("F", 0, -1): 0},
            needs={second: frozenset({first, unknown}), unknown: frozenset({first})},
            seconds={first: -1.0, second: float("nan"), unknown: 1.0},
            num_devices=2,
            transfer_seconds=-2.0,
        )
    assert str(error.value) == (
        "TaskGraph: "
        "Action(kind='X', segment=0, microbatch=0, call=0) has the kind 'X'; "
        "choose one of F, B, W, R; "
        "Action(kind='F', segment=0, microbatch=-1, call=0) has a negative number; "
        "segment, microbatch, call are >= 0; "
        "1F0 is on device 2, but there are only devices 0 to 1; "
        "1F0 needs 7F7, which has no device; "
        "7F7 has dependencies, but no device; "
        "0F0 takes -1.0 seconds; give a finite number >= 0; "
        "1F0 takes nan seconds; give a finite number >= 0; "
        "7F7 has a duration, but no device; "
        "a transfer takes -2.0 seconds; give a finite number >= 0."
    )


def test_cycle_of_dependencies_is_named() -> None:
    a, b, c, d = actions("0F0 1F0 2F0 3F0")
    needs = {a: {c}, b: {a}, c: {b}, d: {c}}
    with pytest.raises(ScheduleError) as error:
        TaskGraph(
            dict.fromkeys((a, b, c, d), 0),
            {action: frozenset(needed) for action, needed in needs.items()},
        )
    assert str(error.value) == (
        "TaskGraph: the dependencies form a cycle: 0F0 needs 2F0 needs 1F0 needs 0F0; no order "
        "of the actions can meet them, so drop one of these dependencies."
    )


def test_action_that_needs_itself_is_a_cycle() -> None:
    action = Action.parse("0F0")
    with pytest.raises(ScheduleError, match="form a cycle: 0F0 needs 0F0; no order"):
        TaskGraph({action: 0}, {action: frozenset({action})})


def test_empty_task_graph_has_no_devices() -> None:
    graph = TaskGraph({}, {})
    assert (graph.num_devices, graph.microbatches, graph.topological_order) == (0, (), ())


def test_schedules_with_the_same_orders_are_equal_and_hash_equal() -> None:
    graph = TaskGraph.chain(num_partitions=2, num_microbatches=2)
    made = simple(graph)
    written = Schedule("simple", made.orders, active_microbatches=2)
    assert made == written
    assert hash(made) == hash(written)


def test_schedule_prints_as_its_grid() -> None:
    graph = TaskGraph.chain(num_partitions=1, num_microbatches=1)
    assert str(simple(graph)) == (
        "device 0 | F0 B0---\nsimple: makespan 3 s, bubble 0.0 %, one column 1 s"
    )


def test_broken_schedule_prints_its_bare_orders() -> None:
    graph = TaskGraph.chain(num_partitions=1, num_microbatches=1)
    broken = Schedule("broken", (actions("0B0 0F0"),), graph=graph)
    assert str(broken) == "device 0 | B0 F0\nbroken: one column per action"
