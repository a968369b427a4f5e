from __future__ import annotations

import random
from dataclasses import replace

import pytest

from opensmp.compiler.schedule.actions import Action, TaskGraph
from opensmp.compiler.schedule.interleaving import seconds_with_transfers
from opensmp.compiler.schedule.methods.auto import _held, auto, longest_way_first
from opensmp.compiler.schedule.pipelines import build
from opensmp.compiler.schedule.simulate import simulate
from opensmp.compiler.schedule.validate import validate
from opensmp.config.pipelines import PIPELINES, most_in_flight
from schedules import v_chain


def uneven(graph: TaskGraph, seed: int) -> TaskGraph:
    """The same graph with segments of unequal times."""
    rng = random.Random(seed)
    factor = {a.segment: rng.choice([0.5, 1.0, 1.5, 3.0]) for a in sorted(graph.device)}
    return replace(graph, seconds={a: s * factor[a.segment] for a, s in graph.seconds.items()})


GRAPHS = {
    "chain": TaskGraph.chain(3, 7, split_backward=True),
    "whole backward passes": TaskGraph.chain(4, 6),
    "V": v_chain(3, 8),
    "two pieces": TaskGraph.chain(6, 6, split_backward=True, devices=(0, 1, 2, 0, 1, 2)),
    "one device": TaskGraph.chain(1, 4),
    "forward": TaskGraph.chain(3, 5, backward=False),
}


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("seed", [None, *range(6)])
@pytest.mark.parametrize("limit", [None, 2, 4])
def test_no_schedule_that_fits_the_memory_is_faster(
    name: str, seed: int | None, limit: int | None
) -> None:
    graph = GRAPHS[name] if seed is None else uneven(GRAPHS[name], seed)
    schedule = build("auto", graph, limit)
    assert schedule.name == "auto"
    allowed = most_in_flight(graph.num_devices) if limit is None else limit
    assert _held(graph, schedule) <= allowed
    seconds = seconds_with_transfers(graph, schedule)
    for other in PIPELINES:
        if other != "auto":
            fixed = build(other, graph, limit)
            if _held(graph, fixed) <= allowed:
                assert seconds <= seconds_with_transfers(graph, fixed), other


def test_is_faster_than_every_other_one_where_partitions_are_unequal() -> None:
    found = 0
    for seed in range(12):
        graph = uneven(TaskGraph.chain(4, 8, split_backward=True), seed)
        seconds = seconds_with_transfers(graph, build("auto", graph))
        others = [
            seconds_with_transfers(graph, s)
            for s in (build(name, graph) for name in PIPELINES if name != "auto")
            if _held(graph, s) <= 6
        ]
        assert seconds <= min(others)
        found += seconds < min(others)
    assert found > 0


def test_longest_way_counts_transfers_and_the_rest_of_the_step() -> None:
    graph = TaskGraph.chain(2, 2)
    rank = longest_way_first(graph)
    first = sorted(graph.device, key=rank)
    assert first[:2] == [Action("F", 0, 0), Action("F", 0, 1)]
    assert first[-2:] == [Action("B", 0, 0), Action("B", 0, 1)]


def test_microbatches_that_need_each_other() -> None:
    graph = TaskGraph.chain(2, 5)
    last = Action("F", 1, 4)
    needs = {
        a: n | ({last} if a.kind == "B" and a.segment == 1 else set())
        for a, n in graph.needs.items()
    }
    tied = replace(graph, needs=needs)
    schedule = build("auto", tied, 2)
    validate(schedule, tied)
    assert simulate(schedule, tied).peak_in_flight == 5


def test_nothing_to_schedule() -> None:
    assert auto(TaskGraph({}, {}, {}, 2), 3).orders == ((), ())
