from __future__ import annotations

import pytest

from opensmp.compiler.schedule.actions import Action, Schedule, TaskGraph
from opensmp.compiler.schedule.grid import grid
from opensmp.compiler.schedule.methods.interleaved import interleaved
from opensmp.compiler.schedule.methods.simple import simple
from opensmp.compiler.schedule.validate import validate
from opensmp.errors import ScheduleError


def picture(text: str) -> str:
    return "\n".join(line.strip() for line in text.strip().splitlines())


def with_seconds(graph: TaskGraph, **seconds_of_kind: float) -> TaskGraph:
    seconds = {action: seconds_of_kind[action.kind] for action in graph.device}
    return TaskGraph(graph.device, graph.needs, seconds, graph.num_devices)


def test_simple_on_four_devices() -> None:
    graph = with_seconds(TaskGraph.chain(num_partitions=4, num_microbatches=4), F=1.0, B=1.0)
    assert grid(simple(graph), graph) == picture("""
        device 0 | F0 F1 F2 F3 .. .. .. .. .. .. B0 B1 B2 B3
        device 1 | .. F0 F1 F2 F3 .. .. .. .. B0 B1 B2 B3 ..
        device 2 | .. .. F0 F1 F2 F3 .. .. B0 B1 B2 B3 .. ..
        device 3 | .. .. .. F0 F1 F2 F3 B0 B1 B2 B3 .. .. ..
        simple: makespan 14 s, bubble 42.9 %, one column 1 s
    """)


def test_interleaved_on_two_devices() -> None:
    graph = TaskGraph.chain(num_partitions=2, num_microbatches=4)
    assert grid(interleaved(graph, active_microbatches=2), graph) == picture("""
        device 0 | F0 F1 .. .. B0--- F2 B1--- F3 B2--- .. B3---
        device 1 | .. F0 B0--- F1 B1--- F2 B2--- F3 B3--- .. ..
        interleaved: makespan 15 s, bubble 20.0 %, one column 1 s
    """)


def test_segment_is_shown_when_a_device_has_several() -> None:
    chain = TaskGraph.chain(num_partitions=3, num_microbatches=2, backward=False)
    graph = TaskGraph({a: a.segment % 2 for a in chain.device}, chain.needs)
    assert grid(simple(graph), graph) == picture("""
        device 0 | 0F0 0F1 2F0 2F1
        device 1 | ... 1F0 1F1 ...
        simple: makespan 4 s, bubble 25.0 %, one column 1 s
    """)


def test_columns_stay_aligned_with_two_digit_microbatches_and_devices() -> None:
    graph = TaskGraph.chain(num_partitions=11, num_microbatches=11, backward=False)
    rows = grid(simple(graph), graph).splitlines()
    assert rows[0].startswith("device  0 | F0  F1  F2 ")
    assert rows[10].startswith("device 10 | ... ... ")
    assert rows[10].endswith(" F9  F10")
    assert {row.index(" F5") + 1 - 4 * device for device, row in enumerate(rows[:11])} == {32}


def test_second_call_is_shown() -> None:
    device = dict.fromkeys(map(Action.parse, ("0F0", "0B0", "0B0.1")), 0)
    graph = TaskGraph(device, {})
    schedule = Schedule("mine", (tuple(device),))
    assert grid(schedule, graph) == picture("""
        device 0 | F0   B0------- B0.1-----
        mine: makespan 5 s, bubble 0.0 %, one column 1 s
    """)


def test_unit_is_the_shortest_action() -> None:
    graph = with_seconds(TaskGraph.chain(num_partitions=2, num_microbatches=2), F=0.5, B=0.75)
    assert grid(simple(graph), graph) == picture("""
        device 0 | F0 F1 .. .. .. B0 B1---
        device 1 | .. F0 F1 B0--- B1 .. ..
        simple: makespan 3.75 s, bubble 33.3 %, one column 0.5 s
    """)


def test_actions_too_short_to_draw_are_counted() -> None:
    chain = TaskGraph.chain(num_partitions=2, num_microbatches=2, backward=False)
    graph = TaskGraph(chain.device, chain.needs, {a: 0.0 for a in chain.device if a.segment})
    assert grid(simple(graph), graph) == picture("""
        device 0 | F0 F1
        device 1 | .. ..
        simple: makespan 2 s, bubble 50.0 %, one column 1 s, 2 shorter actions not drawn
    """)


def test_long_schedule_gets_a_coarser_unit() -> None:
    graph = TaskGraph.chain(num_partitions=1, num_microbatches=100)
    rows = grid(simple(graph), graph, max_columns=10).splitlines()
    assert len(rows[0]) == len("device 0 | ") + 10 * len("F00 ") - 1
    assert rows[1] == (
        "simple: makespan 300 s, bubble 0.0 %, one column 30 s, "
        f"{200 - rows[0].count('F') - rows[0].count('B')} shorter actions not drawn"
    )


def test_without_a_graph_rows_are_the_bare_orders() -> None:
    graph = TaskGraph.chain(num_partitions=2, num_microbatches=2)
    assert grid(simple(graph)) == picture("""
        device 0 | F0 F1 B0 B1
        device 1 | F0 F1 B0 B1
        simple: one column per action
    """)


def test_device_without_work_has_an_empty_row() -> None:
    graph = TaskGraph({Action.parse("0F0"): 0}, {}, num_devices=2)
    schedule = simple(graph)
    validate(schedule, graph)
    assert grid(schedule, graph) == picture("""
        device 0 | F0
        device 1 | ..
        simple: makespan 1 s, bubble 50.0 %, one column 1 s
    """)
    assert grid(schedule).splitlines()[1] == "device 1 |"


def test_nothing_to_do_draws_empty_rows() -> None:
    graph = TaskGraph({}, {}, num_devices=1)
    assert grid(simple(graph), graph) == (
        "device 0 |\nsimple: makespan 0 s, bubble 0.0 %, one column 1 s"
    )


def test_schedule_that_does_not_fit_is_refused() -> None:
    graph = TaskGraph.chain(num_partitions=1, num_microbatches=1)
    with pytest.raises(ScheduleError, match="0B0 is in no order"):
        grid(Schedule("mine", ((Action.parse("0F0"),),)), graph)
