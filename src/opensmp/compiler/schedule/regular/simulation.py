"""Validates and simulates schedules of regular pipelines, all devices at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from opensmp.compiler.schedule.regular.passes import BACKWARD, FORWARD
from opensmp.compiler.schedule.regular.pipeline import RegularPipeline, RegularSchedule
from opensmp.compiler.schedule.simulate import peak
from opensmp.compiler.schedule.validate import validate
from opensmp.errors import ScheduleError

_MOST_OBJECTS = 200_000  # actions up to which faults are named one by one


@dataclass(frozen=True, eq=False)
class RegularSimulation:
    """The result of a simulation, as `opensmp.compiler.schedule.simulate.Simulation` has it.

    Attributes:
        end: End of each action, shape (kinds, segments, microbatches), float64 seconds. Weight
            gradients that are no passes of their own have -1.
        makespan_seconds: End of the last action; the first starts at 0.
        busy_seconds: Busy time of each device, shape (devices,).
        bubble: Idle share of all devices' time, 0 <= bubble <= 1.
        live_activations: Maximum number of forward results that each device holds at once, shape
            (devices,).
        peak_in_flight: Maximum number of microbatches that are in flight at once.
    """

    end: NDArray[np.float64]
    makespan_seconds: float
    busy_seconds: NDArray[np.float64]
    bubble: float
    live_activations: NDArray[np.int64]
    peak_in_flight: int


def simulate_regular(
    schedule: RegularSchedule,
    transfer_seconds: ArrayLike = 0.0,
    seconds: NDArray[np.float64] | None = None,
) -> RegularSimulation:
    """Validates a schedule and runs it with blocking semantics, as `simulate` does.

    Args:
        schedule: The schedule.
        transfer_seconds: Delay between an action and a dependent on another device, >= 0: one
            number, or an array of shape (2, segments) for what the forward and the backward pass of
            each segment wait for.
        seconds: Time of the forward pass, the backward pass and the weight gradients of each
            segment, shape (3, segments); None for the equal times of the pipeline.

    Raises:
        ScheduleError: If the schedule is invalid, or `transfer_seconds` is negative.

    Example:
        >>> from opensmp.compiler.schedule.methods.zb_h2 import passes
        >>> pipeline = RegularPipeline(num_devices=4, num_microbatches=8)
        >>> simulate_regular(pipeline.schedule("zb_h2", passes)).makespan_seconds
        27.0
    """
    pipeline = schedule.pipeline
    delays = np.asarray(transfer_seconds, dtype=np.float64)
    if delays.shape not in ((), (2, pipeline.num_segments)) or not (delays >= 0).all():
        raise ScheduleError(
            f"simulate_regular: transfer_seconds={transfer_seconds!r} is not possible; give a "
            f"number >= 0, or an array of such of shape (2, {pipeline.num_segments})."
        )
    delays = np.broadcast_to(delays, (2, pipeline.num_segments))
    if seconds is None:
        seconds = np.repeat(np.array(pipeline.seconds)[:, np.newaxis], pipeline.num_segments, 1)
    elif seconds.shape != (3, pipeline.num_segments) or not (seconds >= 0).all():
        raise ScheduleError(
            f"simulate_regular: seconds must be numbers >= 0 of shape (3, {pipeline.num_segments})"
            f"; received shape {seconds.shape}."
        )
    end = _ends(schedule, delays, seconds)
    if end is None:
        raise _faults(schedule)
    shape = 3, pipeline.num_segments, pipeline.num_microbatches
    end = end.reshape(shape)
    duration = seconds[:, :, np.newaxis]
    makespan = float(end.max())
    each = (seconds if pipeline.is_split else seconds[:2]).sum(axis=0) * pipeline.num_microbatches
    busy = np.zeros(pipeline.num_devices)
    np.add.at(busy, pipeline.device_of_segment, each)
    available = pipeline.num_devices * makespan
    start = end[FORWARD] - duration[FORWARD]
    last_use = end.max(axis=0)
    last_use[:-1] = np.maximum(last_use[:-1], end[FORWARD, 1:])
    live = [
        peak(start[own].ravel(), last_use[own].ravel())
        for own in (pipeline.device_of_segment == d for d in range(pipeline.num_devices))
    ]
    return RegularSimulation(
        end=end,
        makespan_seconds=makespan,
        busy_seconds=busy,
        bubble=max(0.0, available - float(busy.sum())) / available if available else 0.0,
        live_activations=np.array(live, dtype=np.int64),
        peak_in_flight=peak(start[0], end.max(axis=(0, 1))),
    )


def _ends(
    schedule: RegularSchedule, delays: NDArray[np.float64], seconds: NDArray[np.float64]
) -> NDArray[np.float64] | None:
    """The end of each action by its number; None if the schedule is invalid.

    In each round every device runs its next pass if what that needs has run.
    """
    pipeline = schedule.pipeline
    if not _is_complete(schedule):
        return None
    number = _numbers(schedule)
    size = 3 * pipeline.num_segments * pipeline.num_microbatches
    same, across, late = _needs(pipeline, number)
    waits = _waits(number, late, delays, pipeline) if delays.any() else None
    duration = seconds.ravel()
    end = np.full(size + 1, -1.0)
    end[size] = 0.0  # where `same` or `across` is nothing
    lengths = np.array([len(passes) for passes in schedule.passes])
    head = np.cumsum(lengths) - lengths
    stop = head + lengths
    now = np.zeros(pipeline.num_devices)
    running = np.flatnonzero(head < stop)
    while len(running):
        heads = head[running]
        first, second = end[same[heads]], end[across[heads]]
        can = np.flatnonzero((first >= 0) & (second >= 0))
        if not len(can):
            return None
        heads, devices, first, second = heads[can], running[can], first[can], second[can]
        if waits is not None:
            second += waits[heads]
        actions = number[heads]
        begin = np.maximum(np.maximum(first, second), now[devices])
        now[devices] = end[actions] = begin + duration[actions // pipeline.num_microbatches]
        head[devices] += 1
        if (head[devices] == stop[devices]).any():
            running = np.flatnonzero(head < stop)
    return end[:size]


def _is_complete(schedule: RegularSchedule) -> bool:
    """Whether each device has all its passes, each once."""
    pipeline = schedule.pipeline
    limits = np.array([3 if pipeline.is_split else 2, pipeline.pieces, pipeline.num_microbatches])
    each = int(limits.prod())
    return len(schedule.passes) == pipeline.num_devices and all(
        passes.shape == (each, 3)
        and bool((passes >= 0).all() and (passes < limits).all())
        and bool((np.bincount(np.ravel_multi_index(tuple(passes.T), tuple(limits))) == 1).all())
        for passes in schedule.passes
    )


def _numbers(schedule: RegularSchedule) -> NDArray[np.int32]:
    """Numbers of all passes, device after device."""
    numbers = schedule.pipeline.numbers
    return np.concatenate(
        [numbers(device, passes).astype(np.int32) for device, passes in enumerate(schedule.passes)]
    )


def _needs(
    pipeline: RegularPipeline, number: NDArray[np.int32]
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.bool_]]:
    """What each action needs of its own segment and of another one, and if that must be sent."""
    segments, microbatches = pipeline.num_segments, pipeline.num_microbatches
    block = segments * microbatches
    nothing = 3 * block
    kind, segment = number // block, number % block // microbatches
    same = np.where(kind == FORWARD, nothing, number - block)
    step = np.where(kind == FORWARD, -1, 1)
    is_end = (segment == np.where(kind == FORWARD, 0, segments - 1)) | (kind > BACKWARD)
    across = np.where(is_end, nothing, number + step * microbatches)
    home = pipeline.device_of_segment
    late = ~is_end & (home[segment] != home[np.clip(segment + step, 0, segments - 1)])
    return same.astype(np.int32), across.astype(np.int32), late


def _waits(
    number: NDArray[np.int32],
    late: NDArray[np.bool_],
    delays: NDArray[np.float64],
    pipeline: RegularPipeline,
) -> NDArray[np.float64]:
    """The delay of what each action needs of another device."""
    row = number // pipeline.num_microbatches
    padded = np.append(delays, np.zeros((1, pipeline.num_segments)), axis=0)
    return np.where(late, padded.ravel()[row], 0.0)


def _faults(schedule: RegularSchedule) -> ScheduleError:
    """The error that names the faults, one by one if the schedule is small enough to list them."""
    pipeline = schedule.pipeline
    if pipeline.num_actions <= _MOST_OBJECTS:
        try:
            validate(schedule.schedule(), pipeline.graph())
        except ScheduleError as error:
            return error
    what = "its devices wait for each other for ever"
    if not _is_complete(schedule):
        what = "a device has not each of its passes exactly once"
    return ScheduleError(
        f"Schedule {schedule.name!r} does not fit its pipeline of {pipeline.num_devices} devices "
        f"and {pipeline.num_microbatches} microbatches: {what}; make it for fewer devices and "
        "microbatches to see which passes are at fault."
    )
