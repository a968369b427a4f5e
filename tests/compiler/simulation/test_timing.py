from __future__ import annotations

import random

import numpy as np
import pytest

from opensmp.compiler.schedule.actions import TaskGraph
from opensmp.compiler.schedule.regular.orders import regular_order
from opensmp.compiler.schedule.regular.pipeline import RegularPipeline
from opensmp.compiler.schedule.regular.simulation import simulate_regular
from opensmp.compiler.schedule.simulate import simulate
from opensmp.compiler.simulation.run import Run
from opensmp.compiler.simulation.timing import MOST_OBJECTS, time_chain
from opensmp.config.pipelines import PIPELINES
from opensmp.errors import PlanError, ScheduleError


def timed(run: Run, forward=1.0, backward=1.0, weights=1.0, delay=0.0):
    count = run.num_segments
    seconds = np.repeat(np.array([[forward], [backward], [weights]]), count, 1)
    return time_chain(run, seconds, np.full((2, count), delay))


@pytest.mark.parametrize("pipeline", ["simple", "interleaved"])
@pytest.mark.parametrize(("partitions", "microbatches"), [(1, 3), (2, 2), (4, 16), (12, 30)])
def test_bubble_is_that_of_gpipe_and_1f1b(pipeline, partitions, microbatches):
    run = Run(
        partitions=partitions, microbatches=microbatches, pipeline=pipeline, split_backward=False
    )
    expected = (partitions - 1) / (microbatches + partitions - 1)
    assert timed(run).bubble == pytest.approx(expected)
    held = timed(run).held.tolist()
    least = 1 if pipeline == "interleaved" else microbatches
    assert held[0] == (min(partitions, microbatches) if pipeline == "interleaved" else microbatches)
    assert held[-1] == least
    halves = Run(partitions=partitions, microbatches=microbatches, pipeline=pipeline)
    expected = (partitions - 1) / (1.5 * microbatches + partitions - 1)
    assert timed(halves).bubble == pytest.approx(expected)


@pytest.mark.parametrize("name", sorted(set(PIPELINES) - {"auto"}))
def test_times_of_uneven_segments_are_those_of_the_objects(name):
    rng = random.Random(name)
    pieces = PIPELINES[name].pieces or 1
    schedule = regular_order(name, 4, 9, pieces, True, None)
    count = schedule.pipeline.num_segments
    seconds = np.array([[rng.uniform(0.5, 2) for _ in range(count)] for _ in range(3)])
    delays = np.array([[rng.uniform(0, 0.5) for _ in range(count)] for _ in range(2)])
    plain = schedule.pipeline.graph()
    durations = {a: float(seconds["FBW".index(a.kind), a.segment]) for a in plain.device}
    graph = TaskGraph(plain.device, plain.needs, durations, plain.num_devices)
    waits = {a: float(delays["FB".index(a.kind), a.segment]) for a in plain.device if a.kind != "W"}
    expected = simulate(schedule.schedule(), graph, waits)
    result = simulate_regular(schedule, delays, seconds)
    assert result.makespan_seconds == pytest.approx(expected.makespan_seconds, rel=1e-12)
    assert result.bubble == pytest.approx(expected.bubble)
    assert result.busy_seconds.tolist() == pytest.approx(list(expected.busy_seconds))
    assert tuple(result.live_activations) == expected.live_activations


def test_wrong_arrays_are_refused():
    schedule = regular_order("simple", 2, 2, 1, True, None)
    with pytest.raises(ScheduleError, match=r"shape \(2, 2\)"):
        simulate_regular(schedule, np.zeros((2, 3)))
    with pytest.raises(ScheduleError, match=r"shape \(3, 2\); received shape \(2, 2\)"):
        simulate_regular(schedule, 0.0, np.ones((2, 2)))
    graph = schedule.pipeline.graph()
    with pytest.raises(ScheduleError, match=r"transfer_seconds=-1.0 is not possible"):
        simulate(schedule.schedule(), graph, dict.fromkeys(graph.device, -1.0))


def test_schedules_of_objects_are_timed_too():
    chain = timed(Run(partitions=3, microbatches=6), delay=0.1)
    for run in (
        Run(partitions=3, microbatches=6, pipeline=in_order_of_1f1b),
        Run(partitions=3, microbatches=6, pipeline="auto"),
    ):
        other = timed(run, delay=0.1)
        assert other.end_seconds.max() <= chain.end_seconds.max() + 1e-9
    uneven = timed(Run(partitions=4, microbatches=9, pieces=2))  # 9 are no groups of 4
    assert uneven.held.shape == (8,)
    assert uneven.busy_seconds.tolist() == [54.0] * 4
    assert uneven.active == 6


def in_order_of_1f1b(graph: TaskGraph):
    pipeline = RegularPipeline(3, 6)
    made = regular_order("interleaved", 3, 6, 1, True, None)
    assert made.pipeline == pipeline
    return made.schedule()


def test_a_bound_on_microbatches_in_flight_is_kept_by_fixed_orders_too():
    free = timed(Run(partitions=4, microbatches=8, pipeline="zb_v"))
    bound = timed(Run(partitions=4, microbatches=8, pipeline="zb_v", active_microbatches=2))
    assert bound.in_flight == 2 < free.in_flight
    assert bound.end_seconds.max() > free.end_seconds.max()


def test_too_many_objects_are_refused():
    run = Run(partitions=64, microbatches=512, pipeline="auto")
    with pytest.raises(PlanError, match=f"98304 actions, more than the {MOST_OBJECTS}"):
        timed(run)


def test_device_that_starts_late_is_told():
    timing = timed(Run(partitions=3, microbatches=4), delay=0.5)
    assert timing.start_seconds.tolist() == [0.0, 1.5, 3.0]
