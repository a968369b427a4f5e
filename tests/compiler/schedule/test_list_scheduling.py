from __future__ import annotations

import pytest

from opensmp.compiler.schedule.actions import Action, TaskGraph
from opensmp.compiler.schedule.list_scheduling import list_schedule
from opensmp.compiler.schedule.methods.interleaved import backward_first
from opensmp.compiler.schedule.simulate import simulate
from opensmp.compiler.schedule.validate import validate
from opensmp.errors import ScheduleError


def texts(order: tuple[Action, ...]) -> str:
    return " ".join(map(str, order))


def oldest_first(action: Action) -> tuple[int, ...]:
    return (action.microbatch,)


def test_smaller_priority_starts_first() -> None:
    graph = TaskGraph.chain(num_partitions=1, num_microbatches=3, backward=False)
    schedule = list_schedule(
        graph, name="newest", priority=lambda a: (-a.microbatch,), active_microbatches=3
    )
    assert schedule.name == "newest"
    assert texts(schedule.orders[0]) == "0F2 0F1 0F0"


def test_equal_priorities_go_by_the_actions() -> None:
    graph = TaskGraph.chain(num_partitions=1, num_microbatches=2)
    schedule = list_schedule(graph, name="any", priority=lambda a: (), active_microbatches=2)
    assert texts(schedule.orders[0]) == "0F0 0B0 0F1 0B1"


def test_durations_decide_what_is_ready() -> None:
    # Device 1 gets the long 0F0 late, so the younger microbatch overtakes it there.
    device = {Action.parse(t): d for t, d in {"0F0": 0, "1F0": 1, "2F1": 2, "1F1": 1}.items()}
    needs = {
        Action.parse("1F0"): frozenset({Action.parse("0F0")}),
        Action.parse("1F1"): frozenset({Action.parse("2F1")}),
    }
    for seconds, expected in ((5.0, "1F1 1F0"), (0.5, "1F0 1F1")):
        graph = TaskGraph(device, needs, {Action.parse("0F0"): seconds})
        schedule = list_schedule(graph, name="x", priority=oldest_first, active_microbatches=2)
        assert texts(schedule.orders[1]) == expected


def test_ends_that_differ_by_rounding_are_one_moment() -> None:
    # 0.1 + 0.2 ends a rounding error after 0.3; the backward still goes first.
    device = {
        Action.parse(t): d for t, d in {"0F0": 0, "1F0": 0, "2B0": 1, "3F9": 1, "4F1": 1}.items()
    }
    needs = {
        Action.parse("1F0"): frozenset({Action.parse("0F0")}),
        Action.parse("2B0"): frozenset({Action.parse("1F0")}),
        Action.parse("4F1"): frozenset({Action.parse("3F9")}),
    }
    seconds = {Action.parse("0F0"): 0.1, Action.parse("1F0"): 0.2, Action.parse("3F9"): 0.3}
    schedule = list_schedule(
        TaskGraph(device, needs, seconds),
        name="x",
        priority=lambda a: (a.kind != "B",),
        active_microbatches=3,
    )
    assert texts(schedule.orders[1]) == "3F9 2B0 4F1"


def test_bound_holds_back_microbatches() -> None:
    graph = TaskGraph.chain(num_partitions=2, num_microbatches=4)
    schedule = list_schedule(graph, name="x", priority=oldest_first, active_microbatches=1)
    assert texts(schedule.orders[0]) == "0F0 0B0 0F1 0B1 0F2 0B2 0F3 0B3"
    assert schedule.active_microbatches == 1
    assert simulate(schedule, graph).peak_in_flight == 1


def test_free_place_goes_to_the_best_microbatch_of_all_devices() -> None:
    # Microbatch 1 waits on device 0, microbatch 0 on device 1: one place, and 0 is older.
    graph = TaskGraph({Action.parse("0F1"): 0, Action.parse("1F0"): 1}, {})
    schedule = list_schedule(graph, name="x", priority=oldest_first, active_microbatches=1)
    assert [(str(a), str(b)) for a, b in schedule.releases] == [("1F0", "0F1")]


def test_bound_is_raised_by_as_little_as_dependencies_between_microbatches_need() -> None:
    # Backwards 0 and 1 need the forward of microbatch 2: three must be in flight.
    graph = TaskGraph.chain(num_partitions=1, num_microbatches=5)
    needs = dict(graph.needs)
    needs[Action.parse("0B0")] |= {Action.parse("0F2")}
    needs[Action.parse("0B1")] |= {Action.parse("0F2")}
    tied = TaskGraph(graph.device, needs)
    schedule = list_schedule(tied, name="x", priority=oldest_first, active_microbatches=1)
    validate(schedule, tied)
    assert schedule.active_microbatches == 3
    assert simulate(schedule, tied).peak_in_flight == 3
    assert texts(schedule.orders[0]) == "0F0 0F1 0F2 0B0 0B1 0B2 0F3 0B3 0F4 0B4"


def test_chain_with_backward_needs_no_releases() -> None:
    graph = TaskGraph.chain(num_partitions=3, num_microbatches=8)
    schedule = list_schedule(graph, name="x", priority=oldest_first, active_microbatches=2)
    assert schedule.releases == ()


def test_releases_keep_the_first_device_from_running_ahead() -> None:
    graph = TaskGraph.chain(num_partitions=2, num_microbatches=4, backward=False)
    schedule = list_schedule(graph, name="x", priority=oldest_first, active_microbatches=2)
    assert [(str(a), str(b)) for a, b in schedule.releases] == [("1F0", "0F2"), ("1F1", "0F3")]
    # The second device is in truth ten times as slow as it was simulated.
    slow = TaskGraph(graph.device, graph.needs, {a: 1.0 + 9 * a.segment for a in graph.device})
    assert simulate(schedule, slow).peak_in_flight == 2


def test_no_release_where_results_that_came_meanwhile_say_as_much() -> None:
    graph = TaskGraph.chain(num_partitions=2, num_microbatches=8, split_backward=True)
    schedule = list_schedule(graph, name="x", priority=backward_first, active_microbatches=4)
    # 1W0 ends microbatch 0 on the second device. The first one starts 0F4 after 0B1, which has
    # the results of 1B1, and that ran after 1W0.
    orders = [texts(order) for order in schedule.orders]
    assert orders[0].index("0B1") < orders[0].index("0F4")
    assert orders[1].index("1W0") < orders[1].index("1B1")
    assert schedule.releases == ()
    for slow in graph.device:
        seconds = {action: 1.0 + 50.0 * (action == slow) for action in graph.device}
        took = TaskGraph(graph.device, graph.needs, seconds)
        assert simulate(schedule, took).peak_in_flight <= 4


def test_releases_join_every_end_of_a_microbatch_to_every_beginning() -> None:
    # Microbatches of two independent actions, each on its own device.
    device = {Action("F", segment, m): segment for segment in (0, 1) for m in (0, 1)}
    schedule = list_schedule(
        TaskGraph(device, {}), name="x", priority=oldest_first, active_microbatches=1
    )
    assert [(str(a), str(b)) for a, b in schedule.releases] == [("1F0", "0F1"), ("0F0", "1F1")]


def test_gate_makes_a_device_wait_for_what_comes_first() -> None:
    graph = TaskGraph.chain(num_partitions=2, num_microbatches=2)
    slow = TaskGraph(graph.device, graph.needs, {a: 9.0 for a in graph.device if str(a) == "0F1"})
    schedule = list_schedule(
        slow,
        name="x",
        priority=oldest_first,
        active_microbatches=2,
        gate=lambda a: "FB".index(a.kind),
    )
    # 1B0 is ready long before 1F1.
    assert texts(schedule.orders[1]) == "1F0 1F1 1B0 1B1"


def test_gate_that_descends_is_refused() -> None:
    graph = TaskGraph.chain(num_partitions=1, num_microbatches=1)
    with pytest.raises(ScheduleError) as error:
        list_schedule(
            graph,
            name="x",
            priority=oldest_first,
            active_microbatches=1,
            gate=lambda a: "BF".index(a.kind),
        )
    assert str(error.value) == (
        "Schedule 'x': a gate must not be below that of a dependency, or devices would wait for "
        "each other for ever: 0B0 (gate 0) needs 0F0 (gate 1)."
    )


@pytest.mark.parametrize("bound", [0, -3])
def test_bound_below_one_is_refused(bound: int) -> None:
    graph = TaskGraph.chain(num_partitions=1, num_microbatches=1)
    with pytest.raises(ScheduleError) as error:
        list_schedule(graph, name="x", priority=oldest_first, active_microbatches=bound)
    assert str(error.value) == (
        f"Schedule 'x': active_microbatches={bound} is not possible; give at least 1, the "
        "number of microbatches that may be in flight at once."
    )


def test_nothing_to_do_gives_empty_orders() -> None:
    graph = TaskGraph({}, {}, num_devices=2)
    schedule = list_schedule(graph, name="x", priority=oldest_first, active_microbatches=1)
    assert schedule.orders == ((), ())
