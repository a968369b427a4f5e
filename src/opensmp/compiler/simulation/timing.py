"""When the passes of a step run: by arrays where the schedule allows it, otherwise by objects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from opensmp.compiler.schedule.actions import Action, Schedule, TaskGraph
from opensmp.compiler.schedule.pipelines import build
from opensmp.compiler.schedule.regular.orders import held_activations, is_regular, regular_order
from opensmp.compiler.schedule.regular.pipeline import RegularPipeline
from opensmp.compiler.schedule.regular.simulation import simulate_regular
from opensmp.compiler.schedule.simulate import simulate
from opensmp.compiler.simulation.run import Run
from opensmp.config.pipelines import most_in_flight, pipeline_name, row_of
from opensmp.errors import PlanError

MOST_OBJECTS = 60_000
"""Actions of a step up to which a schedule that is no array is made, which takes some seconds."""


class Timing(NamedTuple):
    """The pipeline of a step in time, without what comes after it.

    Attributes:
        start_seconds: When each device begins, float64.
        end_seconds: When each device has ended, float64.
        busy_seconds: Busy time of each device, float64.
        bubble: Idle share of all devices' time until the last one has ended.
        held: Most microbatches that each segment holds, when its device holds most.
        in_flight: Most microbatches in flight.
        active: `active_microbatches` that gives this schedule, None if it does not need one.
    """

    start_seconds: NDArray[np.float64]
    end_seconds: NDArray[np.float64]
    busy_seconds: NDArray[np.float64]
    bubble: float
    held: NDArray[np.int64]
    in_flight: int
    active: int | None


def time_chain(
    run: Run, seconds: NDArray[np.float64], delays: NDArray[np.float64], far: bool = False
) -> Timing:
    """Returns the pipeline of a chain of segments.

    Args:
        run: How it is run.
        seconds: Time of the forward pass, the backward pass and the weight gradients of each
            segment, shape (3, segments).
        delays: Time of the transfers that the forward and the backward pass of each segment wait
            for, shape (2, segments).
        far: Whether the partitions are on several machines; then this library has more microbatches
            in flight, to hide transfers.

    Raises:
        PlanError: If the schedule can only be made of objects, and would need too many.
    """
    row = row_of(run.pipeline)
    is_split = run.split_backward or row.defers_weights
    if not is_split:
        seconds = np.stack([seconds[0], seconds[1] + seconds[2], np.zeros_like(seconds[2])])
    name = run.pipeline if isinstance(run.pipeline, str) else ""
    few = run.active_microbatches is not None and run.active_microbatches < run.microbatches
    fixed = row.held is not None or (name == "interleaved" and run.pieces > 1)
    if not is_regular(name, run.pieces, run.partitions, run.microbatches) or (few and fixed):
        return _of_objects(run, seconds, delays, is_split, far)
    schedule = regular_order(
        name, run.partitions, run.microbatches, run.pieces, is_split, active_in(run, far)
    )
    result = simulate_regular(schedule, delays, seconds)
    home = schedule.pipeline.device_of_segment
    ends = np.zeros(run.partitions)
    np.maximum.at(ends, home, result.end.max(axis=(0, 2)))
    starts = np.full(run.partitions, np.inf)
    np.minimum.at(starts, home, result.end[0].min(axis=1) - seconds[0])
    held = np.zeros(run.num_segments, dtype=np.int64)
    held[schedule.segments_of_pieces] = held_activations(schedule)
    return Timing(
        starts,
        ends,
        result.busy_seconds,
        result.bubble,
        held,
        result.peak_in_flight,
        result.peak_in_flight if _asks_for_active(run) else None,
    )


def active_in(run: Run, far: bool) -> int | None:
    """The `active_microbatches` with which this library runs it; None for what the schedule needs.

    `far` says whether the partitions are on several machines.
    """
    if run.active_microbatches is None and far and _asks_for_active(run):
        return min(most_in_flight(run.partitions), run.microbatches)
    return run.active_microbatches


def _asks_for_active(run: Run) -> bool:
    row = row_of(run.pipeline)
    return row.held is None and not row.holds_all


def _of_objects(
    run: Run,
    seconds: NDArray[np.float64],
    delays: NDArray[np.float64],
    is_split: bool,
    far: bool,
) -> Timing:
    pipeline = RegularPipeline(
        run.partitions,
        run.microbatches,
        run.pieces,
        row_of(run.pipeline).placement,
        (1.0, 1.0, float(is_split)),
    )
    if pipeline.num_actions > MOST_OBJECTS:
        raise PlanError(
            f"Simulation: the schedule {pipeline_name(run.pipeline)!r} with {run.partitions} "
            f"partitions of {run.pieces} pieces and {run.microbatches} microbatches has "
            f"{pipeline.num_actions} actions, more than the {MOST_OBJECTS} up to which it is made; "
            "simulate fewer microbatches or another schedule."
        )
    plain = pipeline.graph()
    durations = {
        action: float(seconds["FBW".index(action.kind), action.segment]) for action in plain.device
    }
    graph = TaskGraph(plain.device, plain.needs, durations, plain.num_devices)
    waits = {
        action: float(delays["FB".index(action.kind), action.segment])
        for action in plain.device
        if action.kind != "W"
    }
    return time_graph(run, graph, waits, run.num_segments, far)


def time_graph(
    run: Run,
    graph: TaskGraph,
    waits: Mapping[Action, float],
    num_segments: int,
    far: bool = False,
) -> Timing:
    """Returns the pipeline of any task graph; `waits` are the transfers that actions wait for."""
    schedule = build(run.pipeline, graph, run.active_microbatches, hides_latency=far)
    result = simulate(schedule, graph, waits)
    starts, ends = np.full(graph.num_devices, np.inf), np.zeros(graph.num_devices)
    for action, end in result.end.items():
        device = graph.device[action]
        starts[device] = min(starts[device], result.start[action])
        ends[device] = max(ends[device], end)
    return Timing(
        starts,
        ends,
        np.array(result.busy_seconds),
        result.bubble,
        _held(schedule, num_segments),
        result.peak_in_flight,
        schedule.active_microbatches,
    )


def _held(schedule: Schedule, num_segments: int) -> NDArray[np.int64]:
    """Returns the most microbatches of each segment when its device holds most in all."""
    held = np.zeros(num_segments, dtype=np.int64)
    for order in schedule.orders:
        most = 0
        for now in _counts(order):
            total = sum(now.values())
            if total > most:
                most = total
                for segment, count in now.items():
                    held[segment] = count
    return held


def _counts(order: Sequence[Action]) -> list[dict[int, int]]:
    """Returns how many forward results of each segment there are after each forward pass."""
    last = {(action.segment, action.microbatch): i for i, action in enumerate(order)}
    now: dict[int, int] = {}
    found = []
    for i, action in enumerate(order):
        if action.kind == "F":
            now[action.segment] = now.get(action.segment, 0) + 1
            found.append(dict(now))
        if last[action.segment, action.microbatch] == i:
            now[action.segment] = now.get(action.segment, 0) - 1
    return found
