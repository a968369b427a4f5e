from __future__ import annotations

from dataclasses import replace

import pytest

from opensmp.compiler.schedule.actions import Action, TaskGraph
from opensmp.compiler.schedule.methods.zb_h2 import zb_h2
from opensmp.compiler.schedule.methods.zb_v import passes, zb_v
from opensmp.compiler.schedule.regular.pipeline import RegularPipeline
from opensmp.compiler.schedule.simulate import simulate
from opensmp.compiler.schedule.validate import validate
from schedules import v_chain


@pytest.mark.parametrize("partitions", [1, 2, 3, 5])
def test_graph_of_equal_stages_has_the_order_of_the_arrays(partitions: int) -> None:
    pipeline = RegularPipeline(partitions, 7, 2, "v")
    schedule = zb_v(pipeline.graph(), 7)
    assert schedule.orders == pipeline.schedule("zb_v", passes).schedule().orders


def test_forward_passes_alone_are_in_the_same_order() -> None:
    graph = TaskGraph.chain(4, 5, backward=False, devices=(0, 1, 1, 0))
    whole = [[a for a in order if a.kind == "F"] for order in zb_v(v_chain(2, 5), 5).orders]
    schedule = zb_v(graph, 5)
    assert [list(order) for order in schedule.orders] == whole
    validate(schedule, graph)


def test_other_placement_is_scheduled_too() -> None:
    for devices in [(0, 1, 0, 1), (0, 0, 1, 1), (1, 0, 0, 1), (0, 0, 0, 1)]:
        graph = TaskGraph.chain(4, 6, split_backward=True, devices=devices)
        for schedule in (zb_v(graph, 6), zb_h2(graph, 6)):
            validate(schedule, graph)


def test_microbatches_that_need_each_other_are_scheduled_too() -> None:
    graph = v_chain(2, 4)
    last = Action("B", 0, 0)
    tied = {a: n | ({last} if a == Action("F", 0, 1) else set()) for a, n in graph.needs.items()}
    one_by_one = replace(graph, needs=tied)
    schedule = zb_v(one_by_one, 4)
    assert schedule.active_microbatches == 4
    simulation = simulate(schedule, one_by_one)
    assert simulation.start[Action("F", 0, 1)] >= simulation.end[last]


def test_recomputation_comes_before_the_backward_pass_that_reads_it() -> None:
    graph = v_chain(2, 3)
    device, needs = dict(graph.device), dict(graph.needs)
    for m in range(3):
        again, backward = Action("R", 2, m), Action("B", 2, m)
        device[again], needs[again] = 1, frozenset({Action("F", 2, m)})
        needs[backward] |= {again}
    with_recomputation = TaskGraph(device, needs, {}, 2)
    order = zb_v(with_recomputation, 3).orders[1]
    for m in range(3):
        assert order.index(Action("R", 2, m)) + 1 == order.index(Action("B", 2, m))


def test_nothing_to_schedule() -> None:
    assert zb_v(TaskGraph({}, {}, {}, 2), 1).orders == ((), ())
