from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path

import pytest

from opensmp.compiler.schedule import pipelines as package
from opensmp.compiler.schedule.actions import Action, Schedule, TaskGraph
from opensmp.compiler.schedule.interleaving import (
    hidden_transfer_seconds,
    seconds_with_transfers,
)
from opensmp.compiler.schedule.methods.interleaved import interleaved
from opensmp.compiler.schedule.methods.simple import simple
from opensmp.compiler.schedule.pipelines import BUILDERS, build
from opensmp.compiler.schedule.simulate import simulate
from opensmp.config.pipelines import PIPELINES
from opensmp.errors import ScheduleError


def test_pipelines_are_built_by_name() -> None:
    graph = TaskGraph.chain(num_partitions=2, num_microbatches=4)
    assert tuple(BUILDERS) == tuple(PIPELINES)
    assert build("simple", graph, active_microbatches=2) == simple(graph)
    assert build("interleaved", graph, active_microbatches=2) == interleaved(graph, 2)


def test_unknown_pipeline_is_refused_with_the_nearest_name() -> None:
    graph = TaskGraph.chain(num_partitions=1, num_microbatches=1)
    with pytest.raises(ScheduleError) as error:
        build("interleave", graph, active_microbatches=1)
    assert str(error.value) == (
        "Schedule: pipeline='interleave' is not known; choose one of "
        f"{', '.join(map(repr, PIPELINES))}; did you mean 'interleaved'?"
    )
    with pytest.raises(ScheduleError, match=r"choose one of .*, 'zero_bubble', .*'\.$"):
        build("gpipe", graph, active_microbatches=1)


def test_built_schedule_is_validated(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = TaskGraph.chain(num_partitions=1, num_microbatches=1)
    monkeypatch.setattr(
        package, "BUILDERS", {"empty": lambda graph, bound: Schedule("empty", ((),))}
    )
    with pytest.raises(ScheduleError, match="missing: 0B0 is in no order"):
        build("empty", graph, active_microbatches=1)


def test_schedules_know_nothing_of_tensorflow() -> None:
    for path in Path(package.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in getattr(node, "names", []) if hasattr(alias, "name")]
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert not {name.split(".")[0] for name in names} & {"tensorflow", "keras"}, path


def test_every_module_with_a_schedule_has_a_row() -> None:
    written = {
        path.stem
        for path in (Path(package.__file__).parent / "methods").glob("*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name == path.stem
        if node.returns is not None and ast.unparse(node.returns) == "Schedule"
    }
    assert written == PIPELINES.keys()


def test_row_without_a_module_is_told() -> None:
    with pytest.raises(ImportError, match=r"has a row 'gpipe'\. Expected: the module .*gpipe, and"):
        package._builder("gpipe")


@pytest.mark.parametrize("partitions", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("microbatches", [1, 2, 4, 16])
def test_few_microbatches_are_in_flight_by_default(partitions: int, microbatches: int) -> None:
    graph = TaskGraph.chain(partitions, microbatches, split_backward=True)
    few = build("interleaved", graph)
    widest = build("interleaved", graph, partitions + 2)
    assert few.active_microbatches == min(partitions, microbatches)
    held = simulate(few, graph).live_activations
    assert held[0] == min(partitions, microbatches)
    assert held[-1] == 1
    assert simulate(few, graph).makespan_seconds <= simulate(widest, graph).makespan_seconds


@pytest.mark.parametrize("name", ["interleaved", "zero_bubble"])
@pytest.mark.parametrize("partitions", [2, 3, 5])
def test_no_fewer_in_flight_than_the_time_of_a_step_needs(name: str, partitions: int) -> None:
    graph = TaskGraph.chain(partitions, 12, split_backward=True)
    few = build(name, graph)
    assert few.active_microbatches is not None
    assert few.active_microbatches <= partitions + 2
    limit = 1.01 * seconds_with_transfers(graph, build(name, graph, partitions + 2))
    assert seconds_with_transfers(graph, few) <= limit
    fewer = build(name, graph, few.active_microbatches - 1)
    assert seconds_with_transfers(graph, fewer) > limit


def test_uneven_partitions_get_as_many_as_keep_the_slowest_busy() -> None:
    graph = TaskGraph.chain(3, 12, split_backward=True)
    uneven = {a: s * (10 if graph.device[a] == 0 else 1) for a, s in graph.seconds.items()}
    slow = replace(graph, seconds=uneven)
    few = build("interleaved", slow)
    assert few.active_microbatches == 2
    assert simulate(few, slow).makespan_seconds <= 1.01 * (
        simulate(build("interleaved", slow, 5), slow).makespan_seconds
    )


def test_microbatches_that_need_each_other_are_in_flight_together() -> None:
    graph = TaskGraph.chain(2, 3)
    last = Action("F", 1, 2)
    needs = {
        a: n | ({last} if a.kind == "B" and a.segment == 1 else set())
        for a, n in graph.needs.items()
    }
    schedule = build("interleaved", replace(graph, needs=needs))
    assert schedule.active_microbatches == 3


def test_all_microbatches_are_in_flight_where_the_schedule_holds_them() -> None:
    graph = TaskGraph.chain(2, 9)
    assert build("simple", graph) == simple(graph)


def test_nothing_to_schedule() -> None:
    graph = TaskGraph({}, {}, {}, 2)
    assert build("interleaved", graph).orders == ((), ())


@pytest.mark.parametrize("name", ["interleaved", "zero_bubble"])
def test_large_graphs_are_searched_in_few_steps_for_what_small_ones_try_out(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = TaskGraph.chain(6, 24, split_backward=True)
    thorough = build(name, graph)
    monkeypatch.setattr(package, "MOST_ACTIONS_TO_SEARCH", 0)
    assert build(name, graph) == thorough


@pytest.mark.parametrize("first", range(3, 10))
@pytest.mark.parametrize("guess", [1, 4, 8, 20])
def test_the_first_number_that_is_right_is_found(first: int, guess: int) -> None:
    tried = []

    def is_right(number: int) -> bool:
        tried.append(number)
        return number >= first

    assert package._first(is_right, 3, 9, guess) == first
    assert len(tried) == len(set(tried)) <= 5


def _of_pieces(name: str, devices: int, microbatches: int) -> TaskGraph:
    """A chain with as many segments on each device as a schedule is for."""
    homes = [*range(devices)]
    homes += reversed(homes) if PIPELINES[name].placement == "v" else []
    return TaskGraph.chain(len(homes), microbatches, split_backward=True, devices=homes)


@pytest.mark.parametrize("devices", [2, 4])
@pytest.mark.parametrize("name", sorted(PIPELINES))
def test_latency_is_waited_for_a_few_times_and_not_for_each_microbatch(
    name: str, devices: int
) -> None:
    graph = _of_pieces(name, devices, microbatches=32)
    schedule = build(name, graph, 16, hides_latency=True)
    near, far = (simulate(schedule, graph, t).makespan_seconds for t in (0.0, 4.0))
    ways = (devices - 1) * (2 if PIPELINES[name].placement == "v" else 1)
    assert far - near <= 4 * 4.0 * 2 * ways
    if not PIPELINES[name].holds_all:
        assert simulate(schedule, graph).peak_in_flight <= 16
    # Weight gradients are not deferred for a bubble that latency fills anyway.
    assert near <= 1.04 * simulate(build(name, graph, 16), graph).makespan_seconds
    assert schedule.graph is graph


def test_the_order_hides_as_much_latency_as_its_microbatches_in_flight_can() -> None:
    graph = TaskGraph.chain(num_partitions=2, num_microbatches=64)
    for active in range(2, 14):
        transfer = hidden_transfer_seconds(graph, active)
        assert transfer == pytest.approx(
            (3 * active - 6) / 2
        )  # F and B take 3, a way two transfers
        schedule = build("interleaved", graph, active, hides_latency=True)
        assert schedule.active_microbatches == active
        hidden, more = (
            simulate(schedule, graph, t).makespan_seconds for t in (transfer, transfer + 1)
        )
        near = simulate(schedule, graph).makespan_seconds
        assert hidden <= near + 4 * transfer  # the first and the last ones have nothing to hide
        assert more > hidden + 0.9 * 2 * 64 / active - 4


def test_nothing_is_hidden_where_nothing_travels_or_nothing_may_be_in_flight() -> None:
    alone = TaskGraph.chain(num_partitions=1, num_microbatches=4)
    assert hidden_transfer_seconds(alone, 4) == 0
    assert build("interleaved", alone, 2, hides_latency=True) == build("interleaved", alone, 2)
    two = TaskGraph.chain(num_partitions=2, num_microbatches=4)
    assert hidden_transfer_seconds(two, 1) == 0
    assert build("interleaved", two, 1, hides_latency=True) == build("interleaved", two, 1)


@pytest.mark.parametrize("name", ["zb_h2", "zb_v", "v_min", "simple"])
def test_schedules_with_an_order_of_their_own_keep_it(name: str) -> None:
    graph = _of_pieces(name, 2, microbatches=8)
    assert build(name, graph, hides_latency=True) == build(name, graph)
