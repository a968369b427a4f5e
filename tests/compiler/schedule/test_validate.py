from __future__ import annotations

import pytest

from opensmp.compiler.schedule.actions import Action, Schedule, TaskGraph
from opensmp.compiler.schedule.methods.interleaved import interleaved
from opensmp.compiler.schedule.methods.simple import simple
from opensmp.compiler.schedule.validate import validate
from opensmp.errors import ScheduleError

CHAIN = TaskGraph.chain(num_partitions=2, num_microbatches=2)
GOOD_0 = "0F0 0F1 0B0 0B1"
GOOD_1 = "1F0 1F1 1B0 1B1"


def written(*orders: str, releases: tuple[str, ...] = ()) -> Schedule:
    """A schedule from texts; a release is written "before after"."""
    pairs = [tuple(Action.parse(word) for word in pair.split()) for pair in releases]
    return Schedule(
        "mine",
        tuple(tuple(Action.parse(word) for word in order.split()) for order in orders),
        releases=tuple((before, after) for before, after in pairs),
    )


def faults(schedule: Schedule, graph: TaskGraph = CHAIN) -> list[str]:
    with pytest.raises(ScheduleError) as error:
        validate(schedule, graph)
    head, *lines = str(error.value).splitlines()
    number = "1 fault" if len(lines) == 1 else f"{len(lines)} faults"
    assert head == f"Schedule 'mine' does not fit its task graph; {number}:"
    return [line.removeprefix("- ") for line in lines]


def test_good_schedules_pass() -> None:
    validate(written(GOOD_0, GOOD_1), CHAIN)
    validate(simple(CHAIN), CHAIN)
    validate(interleaved(CHAIN, 1), CHAIN)


def test_missing_action_is_named_with_its_device() -> None:
    assert faults(written("0F0 0F1 0B0", GOOD_1)) == [
        "missing: 0B1 is in no order; add it to that of device 0."
    ]


def test_doubled_action_is_named_with_its_places() -> None:
    assert faults(written("0F0 0F1 0B0 0F0 0B1", GOOD_1)) == [
        "doubled: 0F0 is there 2 times, on device 0 at position 0 and device 0 at position 3; "
        "keep one."
    ]


def test_action_on_another_device_is_named_with_its_own() -> None:
    assert faults(written("0F0 0F1 0B0 0B1 1B1", "1F0 1F1 1B0")) == [
        "device: 1B1 is in the order of device 0, but belongs to device 1; move it there."
    ]


def test_unknown_action_is_named() -> None:
    assert faults(written(GOOD_0 + " 0W0", GOOD_1)) == [
        "unknown: 0W0 is not in the task graph; take it out."
    ]


def test_number_of_orders_must_be_that_of_the_devices() -> None:
    assert faults(written(GOOD_0, GOOD_1, "")) == [
        "devices: there are 3 orders for 2 devices; give one per device, an empty one where a "
        "device has no work."
    ]


def test_action_before_its_dependency_on_the_same_device_is_named() -> None:
    graph = TaskGraph.chain(num_partitions=1, num_microbatches=2)
    assert faults(written("0B1 0F0 0F1 0B0"), graph) == [
        "order: device 0 runs 0B1 before 0F1, which it needs; put 0F1 first."
    ]


def test_orders_that_deadlock_are_named_with_who_waits_for_whom() -> None:
    assert faults(written("0F0 0B0 0F1 0B1", "1F0 1F1 1B0 1B1")) == [
        "deadlock: device 0 waits at 0B0 for 1B0, which device 1 runs after 1F1; "
        "device 1 waits at 1F1 for 0F1, which device 0 runs after 0B0; "
        "change one of these orders."
    ]


def test_device_outside_the_cycle_is_not_blamed_for_a_deadlock() -> None:
    graph = TaskGraph.chain(num_partitions=3, num_microbatches=2, backward=False)
    orders = ("0F0 0F1", "1F1 1F0", "2F0 2F1")
    validate(written(*orders[:1], "1F0 1F1", orders[2]), graph)
    # Orders across forwards only: one device may swap its microbatches without harm.
    validate(written(*orders), graph)
    needs = dict(graph.needs)
    needs[Action.parse("0F1")] |= {Action.parse("1F0")}
    assert faults(written(*orders), TaskGraph(graph.device, needs)) == [
        "deadlock: device 0 waits at 0F1 for 1F0, which device 1 runs after 1F1; "
        "device 1 waits at 1F1 for 0F1; change one of these orders."
    ]


def test_two_deadlocks_are_both_named() -> None:
    a, b, c, d = (Action("F", s, m) for s, m in ((0, 0), (0, 1), (1, 0), (1, 1)))
    e, f, g, h = (Action("F", s, m) for s, m in ((2, 0), (2, 1), (3, 0), (3, 1)))
    device = {action: action.segment for action in (a, b, c, d, e, f, g, h)}
    needs = {a: {d}, c: {b}, e: {h}, g: {f}}
    graph = TaskGraph(device, {k: frozenset(v) for k, v in needs.items()})
    assert faults(Schedule("mine", ((a, b), (c, d), (e, f), (g, h))), graph) == [
        "deadlock: device 0 waits at 0F0 for 1F1, which device 1 runs after 1F0; "
        "device 1 waits at 1F0 for 0F1, which device 0 runs after 0F0; "
        "change one of these orders.",
        "deadlock: device 2 waits at 2F0 for 3F1, which device 3 runs after 3F0; "
        "device 3 waits at 3F0 for 2F1, which device 2 runs after 2F0; "
        "change one of these orders.",
    ]


def test_release_counts_as_a_dependency() -> None:
    assert faults(written(GOOD_0, GOOD_1, releases=("1B0 0F1",))) == [
        "deadlock: device 0 waits at 0F1 for 1B0, which device 1 runs after 1F1; "
        "device 1 waits at 1F1 for 0F1; change one of these orders."
    ]


def test_release_of_an_unknown_action_is_named() -> None:
    assert faults(written(GOOD_0, GOOD_1, releases=("1B7 0F1",))) == [
        "unknown: 1B7 is not in the task graph; take it out."
    ]


def test_all_faults_are_listed_at_once() -> None:
    found = faults(written("0B0 0F0 1F0 0F0", "1B0 1F1 1F0 1B1 0W0"))
    assert [fault.split(":")[0] for fault in found] == [
        "missing",
        "missing",
        "unknown",
        "doubled",
        "doubled",
        "device",
        "order",
        "order",
    ]
    assert "missing: 0F1 is in no order; add it to that of device 0." in found
    assert "missing: 0B1 is in no order; add it to that of device 0." in found


def test_empty_schedule_misses_everything() -> None:
    assert len(faults(written("", ""))) == 8
