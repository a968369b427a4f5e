"""What comes after the pipeline of a step, and the step as a whole."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from opensmp.compiler.cluster.layout import Layout
from opensmp.compiler.plan.unit_graph import Machine
from opensmp.compiler.simulation.run import Run
from opensmp.compiler.simulation.step import (
    ARITHMETIC,
    IDLE,
    OFFLOAD,
    REDUCTION,
    SHARED,
    TRAFFIC,
    TRANSFERS,
    UPDATE,
    SimulatedStep,
)
from opensmp.compiler.simulation.timing import Timing

_UPDATE_TRAFFIC = 28 / 12
"""Bytes that Adam reads and writes for each byte of weights and slots: it reads weight, gradient
and two slots, and writes all but the gradient, each of 4 bytes."""


class Loads(NamedTuple):
    """What partitions have to do besides their passes; arrays with one entry for each.

    Attributes:
        weights: Bytes of the weights whose gradients replicas sum up.
        slots: Bytes of the optimizer's slots.
        last: Seconds of the backward pass of one microbatch.
        layers: Layers, which gradients are ready by.
        traffic: Of the seconds of the passes of a microbatch, those of memory and not arithmetic.
        shared: Of these seconds, those in which devices that share a partition exchange results.
        sending: Of these seconds, those in which a device only sends.
        offloaded: Bytes of a microbatch that go to the host and come back.
        memory: Peak memory in bytes.
        held: Most microbatches whose activations are held.
        offloaded_slots: Bytes of slots that lie in the memory of the host.
    """

    weights: NDArray[np.float64]
    slots: NDArray[np.float64]
    last: NDArray[np.float64]
    layers: NDArray[np.float64]
    traffic: NDArray[np.float64]
    shared: NDArray[np.float64]
    sending: NDArray[np.float64]
    offloaded: NDArray[np.float64]
    memory: NDArray[np.float64]
    held: NDArray[np.float64]
    offloaded_slots: NDArray[np.float64]


def finished(
    run: Run, layout: Layout, timing: Timing, machine: Machine, loads: Loads, batch: int
) -> SimulatedStep:
    """Adds to a pipeline what comes after it: sums of gradients and the update of weights."""
    reduction, update = after_pipeline(run, layout, machine, loads)
    there = layout.cluster.to_host.reached_bytes_per_second
    # There and back at once; what takes longer than the pipeline is waited for.
    needed = loads.offloaded * run.microbatches / there
    waits = np.maximum(0.0, needed - timing.end_seconds)
    ends = timing.end_seconds + waits + reduction + update
    slowest = int(ends.argmax())
    busy = float(timing.busy_seconds[slowest])
    parts = [
        run.microbatches * float(each[slowest])
        for each in (loads.traffic, loads.shared, loads.sending)
    ]
    return SimulatedStep(
        run=run,
        cluster=layout.cluster,
        seconds=float(ends[slowest]),
        bubble=timing.bubble,
        memory_bytes=tuple(int(size) for size in loads.memory),
        limit_bytes=machine.memory_bytes,
        parts={
            ARITHMETIC: busy - sum(parts),
            TRAFFIC: parts[0],
            SHARED: parts[1],
            TRANSFERS: parts[2],
            IDLE: max(0.0, float(timing.end_seconds[slowest]) - busy),
            REDUCTION: float(reduction[slowest]),
            UPDATE: float(update[slowest]),
            OFFLOAD: float(waits[slowest]),
        },
        held=int(np.ceil(loads.held.max())),
        active_microbatches=timing.active,
        examples=batch,
    )


def after_pipeline(
    run: Run, layout: Layout, machine: Machine, loads: Loads
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns the time of each partition to sum up gradients, and to update its weights."""
    reduction = np.array(
        [layout.replicas_of(p).all_reduce_seconds(loads.weights[p]) for p in range(run.partitions)]
    )
    if run.overlap_all_reduce:
        # The gradients of each layer are complete in its last backward pass.
        units = np.maximum(loads.layers, 1.0)
        reduction = np.maximum(reduction - loads.last * (1 - 1 / units), reduction / units)
    shards = run.replicas if run.shard_optimizer_state else 1
    moved = _UPDATE_TRAFFIC * (loads.weights + loads.slots) / shards
    there = layout.cluster.to_host.reached_bytes_per_second
    update = moved / machine.bytes_per_second + 2 * loads.offloaded_slots / shards / there
    return reduction, update
