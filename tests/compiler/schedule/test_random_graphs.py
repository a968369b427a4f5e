from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opensmp.compiler.schedule.actions import Action, Schedule, TaskGraph
from opensmp.compiler.schedule.grid import grid
from opensmp.compiler.schedule.methods.interleaved import interleaved
from opensmp.compiler.schedule.methods.simple import simple
from opensmp.compiler.schedule.pipelines import build
from opensmp.compiler.schedule.simulate import simulate
from opensmp.compiler.schedule.validate import validate
from opensmp.config.pipelines import PIPELINES
from opensmp.errors import ScheduleError

DURATIONS = st.one_of(st.sampled_from([0.0, 0.1, 0.5, 1.0, 2.0, 3.0]), st.floats(0, 100))


@st.composite
def task_graphs(draw: st.DrawFn) -> TaskGraph:
    """Any acyclic dependencies over any actions, kinds, devices and durations."""
    actions = draw(
        st.lists(
            st.builds(
                Action,
                kind=st.sampled_from("FFBBWR"),
                segment=st.integers(0, 4),
                microbatch=st.integers(0, 5),
                call=st.integers(0, 1),
            ),
            unique=True,
            max_size=30,
        )
    )
    num_devices = draw(st.integers(1, 5))
    # Edges from earlier to later actions of a list in any order: acyclic, else arbitrary.
    needs = {
        action: frozenset(draw(st.lists(st.sampled_from(actions[:index]), max_size=3)))
        for index, action in enumerate(actions)
        if index
    }
    device = {action: draw(st.integers(0, num_devices - 1)) for action in actions}
    seconds = {action: draw(DURATIONS) for action in actions}
    return TaskGraph(device, needs, seconds, num_devices)


@st.composite
def pipelines(draw: st.DrawFn) -> TaskGraph:
    """Chains of segments over any devices, some frozen, some microbatches tied by user code."""
    num_segments, num_microbatches = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    chain = TaskGraph.chain(num_segments, num_microbatches, backward=draw(st.booleans()))
    first_trained = draw(st.integers(0, num_segments - 1))
    actions = [a for a in chain.device if a.kind == "F" or a.segment >= first_trained]
    devices = draw(st.lists(st.integers(0, 3), min_size=num_segments, max_size=num_segments))
    needs = {a: set(chain.needs[a]) for a in actions}
    order = [a for a in chain.topological_order if a in needs]
    for _ in range(draw(st.integers(0, 3))):
        first, second = sorted(draw(st.tuples(*[st.integers(0, len(order) - 1)] * 2)))
        if first != second:
            needs[order[second]].add(order[first])
    seconds = draw(st.lists(st.sampled_from([0.5, 1.0, 3.0]), min_size=5, max_size=5))
    return TaskGraph(
        {a: devices[a.segment] for a in actions},
        {a: frozenset(n) for a, n in needs.items()},
        {a: seconds[a.segment] for a in actions},
        num_devices=4,
    )


GRAPHS = st.one_of(task_graphs(), pipelines())


@settings(deadline=None)
@given(GRAPHS, st.sampled_from(sorted(PIPELINES)), st.integers(1, 7), st.booleans())
def test_every_schedule_of_every_graph_is_valid(
    graph: TaskGraph, name: str, bound: int, far: bool
) -> None:
    schedule = build(name, graph, bound, hides_latency=far)
    simulation = simulate(schedule, graph)
    assert len(simulation.end) == len(graph.device)
    assert 0 <= simulation.bubble <= 1
    for action in graph.device:
        assert all(simulation.end[n] <= simulation.start[action] for n in graph.needs[action])
    assert len(grid(schedule, graph).splitlines()) == graph.num_devices + 1


@settings(deadline=None)
@given(GRAPHS, st.integers(1, 7), st.data())
def test_bound_is_kept_however_long_the_actions_really_take(
    graph: TaskGraph, bound: int, data: st.DataObject
) -> None:
    schedule = interleaved(graph, bound)
    assert schedule.active_microbatches is not None
    assert schedule.active_microbatches >= bound
    real = {action: data.draw(DURATIONS) for action in graph.device}
    for seconds in (graph.seconds, real):
        actual = TaskGraph(graph.device, graph.needs, seconds, graph.num_devices)
        simulation = simulate(schedule, actual)
        assert simulation.peak_in_flight <= schedule.active_microbatches
        for device, live in enumerate(simulation.live_activations):
            segments = {a.segment for a, d in graph.device.items() if d == device}
            assert live <= len({(a.segment, a.microbatch) for a in graph.device})
            if not _ties_between_microbatches(graph):
                assert live <= schedule.active_microbatches * len(segments)


@settings(deadline=None)
@given(GRAPHS, st.integers(1, 7))
def test_bound_is_raised_only_for_dependencies_between_microbatches(
    graph: TaskGraph, bound: int
) -> None:
    schedule = interleaved(graph, bound)
    if not _ties_between_microbatches(graph):
        assert schedule.active_microbatches == bound


@settings(deadline=None)
@given(GRAPHS)
def test_simple_runs_every_forward_that_can_before_the_first_backward(graph: TaskGraph) -> None:
    after_backward: set[Action] = set()
    for action in graph.topological_order:
        if any(n.kind != "F" or n in after_backward for n in graph.needs[action]):
            after_backward.add(action)
    for order in simple(graph).orders:
        free = [action.kind == "F" and action not in after_backward for action in order]
        assert free == sorted(free, reverse=True)


@settings(deadline=None)
@given(GRAPHS, st.sampled_from(sorted(PIPELINES)), st.integers(1, 7), st.randoms())
def test_schedule_does_not_depend_on_the_order_in_which_the_graph_was_written(
    graph: TaskGraph, name: str, bound: int, shuffler: random.Random
) -> None:
    actions = list(graph.device)
    shuffler.shuffle(actions)
    shuffled = TaskGraph(
        {action: graph.device[action] for action in actions},
        {action: graph.needs[action] for action in reversed(actions)},
        graph.seconds,
        graph.num_devices,
    )
    assert build(name, shuffled, bound) == build(name, graph, bound)


@settings(deadline=None)
@given(GRAPHS, st.randoms())
def test_orders_pass_validation_exactly_when_they_can_run(
    graph: TaskGraph, shuffler: random.Random
) -> None:
    orders = [[a for a in graph.device if graph.device[a] == d] for d in range(graph.num_devices)]
    for order in orders:
        shuffler.shuffle(order)
    schedule = Schedule("shuffled", tuple(tuple(order) for order in orders))
    if _can_run(graph, orders):
        validate(schedule, graph)
    else:
        with pytest.raises(ScheduleError, match=r"- (order|deadlock): device \d"):
            validate(schedule, graph)


def _can_run(graph: TaskGraph, orders: list[list[Action]]) -> bool:
    done: set[Action] = set()
    queues = [list(order) for order in orders]
    while any(queues):
        runnable = [q for q in queues if q and graph.needs[q[0]] <= done]
        if not runnable:
            return False
        done.add(runnable[0].pop(0))
    return True


def _ties_between_microbatches(graph: TaskGraph) -> bool:
    return any(
        needed.microbatch != action.microbatch
        for action in graph.device
        for needed in graph.needs[action]
    )
