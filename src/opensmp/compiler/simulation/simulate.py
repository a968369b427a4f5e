"""Simulates a step of a model on a cluster."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from opensmp.base.divisors import nearest_divisors
from opensmp.base.message_text import shown
from opensmp.compiler.cluster.cluster import Cluster
from opensmp.compiler.cluster.layout import Layout
from opensmp.compiler.cluster.machine import MATMUL_SHARE
from opensmp.compiler.plan.unit_graph import Machine
from opensmp.compiler.schedule.regular.pipeline import RegularPipeline
from opensmp.compiler.simulation.finish import Loads, finished
from opensmp.compiler.simulation.run import Run
from opensmp.compiler.simulation.segments import Segments, segments_of
from opensmp.compiler.simulation.step import SimulatedStep
from opensmp.compiler.simulation.timing import Timing, time_chain
from opensmp.compiler.simulation.transformer import Transformer
from opensmp.config.device import DEVICES
from opensmp.config.offload import LEVELS as OFFLOADS
from opensmp.config.offload import MOST_RESIDENT, offloads_optimizer, offloads_residuals
from opensmp.config.pipelines import row_of
from opensmp.config.recompute import FULL, LEVELS, SELECTIVE
from opensmp.errors import PlanError


def simulate_transformer(
    model: Transformer, cluster: Cluster, run: Run, batch: int
) -> SimulatedStep:
    """Simulates a step of a Transformer.

    The time is linear in the passes of a step: some microseconds for each microbatch and pass,
    however many partitions there are.

    Args:
        model: The model.
        cluster: The devices; their `device` must be given.
        run: How it is run.
        batch: Examples of a step, of all replicas.

    Raises:
        PlanError: If the batch does not divide, the cluster is too small, or nothing is known of
            its devices.

    Example:
        >>> cluster = Cluster(2, 8, "a100")
        >>> run = Run(partitions=8, replicas=2, microbatches=16)
        >>> step = simulate_transformer(Transformer(24, 2048, 16, 1024, 51200), cluster, run, 64)
        >>> step.fits, round(step.bubble, 3)
        (True, 0.242)
    """
    examples = examples_of(run, batch)
    layout = layout_of(cluster, run)
    if run.num_segments > model.layers + 2:
        raise PlanError(
            f"Simulation: {run.partitions} partitions of {run.pieces} pieces are more than the "
            f"{model.layers} layers of the model, with its embedding and output layer; simulate "
            "fewer."
        )
    for name, levels in (("recompute", LEVELS), ("offload", OFFLOADS)):
        if getattr(run, name) not in levels:
            raise PlanError(
                f"Simulation: {name}={shown(getattr(run, name))} is for the layers and partitions "
                f"of a plan; a Transformer of equal layers has one of "
                f"{', '.join(map(repr, levels))}."
            )
    machine = machine_for(cluster, model.precision)
    segments = segments_of(model, run.num_segments, examples, machine, layout.sharers)
    timing = time_of(run, segments, layout)
    peak = peak_flops(cluster, model.precision)
    share = None
    memory = memory_of(run, segments, timing.held)
    loads = loads_of(run, segments, layout, timing, memory)
    step = finished(run, layout, timing, machine, loads, batch)
    if peak is not None:
        devices = run.partitions * run.replicas * run.tensor_parallel
        share = batch * model.step_flops / (devices * peak * step.seconds)
    return replace(step, flops_share=share, assumed=lines_of(cluster, machine, model.precision))


def examples_of(run: Run, batch: int) -> int:
    """Returns the examples of a microbatch; raises `PlanError` if they are no whole number."""
    parts = run.replicas * run.microbatches
    if batch < 1 or batch % parts:
        near = nearest_divisors(batch // run.replicas, run.microbatches, 2) if batch >= 1 else ()
        numbers = f"{' or '.join(map(str, near))} microbatches, or " if near else ""
        raise PlanError(
            f"Simulation: a batch of {batch} cannot be divided into {run.replicas} replicas x "
            f"{run.microbatches} microbatches of equal size; choose {numbers}a batch of "
            f"{-(-max(batch, 1) // parts) * parts}."
        )
    return batch // parts


def layout_of(cluster: Cluster, run: Run) -> Layout:
    """Returns the places of the partitions of a run."""
    return Layout(
        cluster, run.partitions, run.replicas, run.tensor_parallel, run.placement_strategy
    )


def machine_for(cluster: Cluster, precision: str) -> Machine:
    """Returns the numbers of one device; raises `PlanError` if its speed is not given."""
    given = cluster.device
    known = isinstance(given, str) or {"flops", "bandwidth"} <= dict(given or ()).keys()
    if not known:
        raise PlanError(
            "Simulation: it is not known how fast the devices are. Give the cluster a device, such "
            'as device="h100" (--device h100), or a dict with "memory", "flops" and "bandwidth".'
        )
    return cluster.machine(precision=precision)


def peak_flops(cluster: Cluster, precision: str) -> float | None:
    """Returns the peak of a device, None if its speed is only known as that of products."""
    return DEVICES[cluster.device].flops_of(precision) if isinstance(cluster.device, str) else None


def lines_of(cluster: Cluster, machine: Machine, precision: str) -> tuple[str, ...]:
    """Returns what is assumed of devices and links."""
    device = cluster.device
    speed = f"products at {machine.flops_per_second / 1e12:.4g} TFLOP/s in {precision}"
    if isinstance(device, str):
        peak = DEVICES[device].flops_of(precision) / 1e12
        speed += f", {MATMUL_SHARE:g} of {peak:.4g}"
    return (
        speed,
        f"memory at {machine.bytes_per_second / 1e9:.4g} GB/s",
        f"within machines {cluster.inner}",
        f"between machines {cluster.outer}",
        "two slots of the optimizer for each weight, as Adam has",
    )


def home_of(run: Run) -> NDArray[np.int64]:
    """Returns the partition of each segment."""
    placement = row_of(run.pipeline).placement
    return RegularPipeline(run.partitions, 1, run.pieces, placement).device_of_segment


def time_of(run: Run, segments: Segments, layout: Layout) -> Timing:
    """Returns the pipeline of a step."""
    seconds, delays = seconds_of(run, segments), delays_of(run, segments, layout)
    if run.blocking_transfers:
        seconds = seconds + sending_of(delays)
        delays = np.zeros_like(delays)
    return time_chain(run, seconds, delays, run.split_backward and layout.is_on_several_machines)


def sending_of(delays: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns how long the passes of each segment send, shape (3, segments)."""
    sending = np.zeros((3, delays.shape[1]))
    sending[0, :-1] = delays[0, 1:]
    sending[1, 1:] = delays[1, :-1]
    return sending


def seconds_of(run: Run, segments: Segments) -> NDArray[np.float64]:
    """Returns the times of the three kinds of passes, shape (3, segments)."""
    backward = segments.backward
    if run.recompute == FULL:
        backward = backward + segments.forward
    elif run.recompute == SELECTIVE:
        backward = backward + segments.selective_seconds
    return np.stack([segments.forward, backward, segments.weights])


def delays_of(run: Run, segments: Segments, layout: Layout) -> NDArray[np.float64]:
    """Returns the transfers that passes wait for, shape (2, segments)."""
    home = home_of(run).tolist()
    delays = np.zeros((2, len(home)))
    for segment in range(1, len(home)):
        link = layout.link(home[segment - 1], home[segment])
        if link is not None:
            delays[0, segment] = delays[1, segment - 1] = link.seconds(
                float(segments.sent_bytes[segment - 1])
            )
    return delays


def memory_of(run: Run, segments: Segments, held: NDArray[np.int64]) -> NDArray[np.float64]:
    """Returns the peak memory of each partition's device.

    Weights with their state, what microbatches keep, and once what a backward pass recomputes.
    """
    home = home_of(run)
    kept, whole = kept_of(run, segments), segments.kept_bytes
    resident = np.minimum(held, MOST_RESIDENT) if offloads_residuals(run.offload, 0) else held
    slots = segments.slot_bytes / (run.replicas if run.shard_optimizer_state else 1)
    slots = slots * (not offloads_optimizer(run.offload, 0))
    bytes_ = segments.parameter_bytes + segments.state_bytes + slots + resident * kept
    found = np.bincount(home, bytes_, run.partitions).astype(np.float64)
    passing = np.zeros(run.partitions)
    np.maximum.at(passing, home, whole - kept)
    return found + passing


def kept_of(run: Run, segments: Segments) -> NDArray[np.float64]:
    """Returns what a segment keeps of a microbatch."""
    if run.recompute == FULL:
        return np.minimum(segments.full_bytes, segments.kept_bytes)
    if run.recompute == SELECTIVE:
        return np.minimum(segments.selective_bytes, segments.kept_bytes)
    return segments.kept_bytes


def loads_of(
    run: Run, segments: Segments, layout: Layout, timing: Timing, memory: NDArray[np.float64]
) -> Loads:
    """Returns what the partitions of a chain have to do besides their passes."""
    home = home_of(run)

    def of_partition(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.bincount(home, values, run.partitions).astype(np.float64)

    passes = 2 + (run.recompute in (SELECTIVE, FULL))
    sending = np.zeros(len(segments))
    if run.blocking_transfers:
        sending = sending_of(delays_of(run, segments, layout)).sum(axis=0)
    moved = np.zeros(len(segments))
    if offloads_residuals(run.offload, 0):
        moved = np.where(timing.held > MOST_RESIDENT, kept_of(run, segments), 0.0)
    return Loads(
        weights=of_partition(segments.parameter_bytes),
        slots=of_partition(segments.slot_bytes),
        offloaded_slots=of_partition(segments.slot_bytes * offloads_optimizer(run.offload, 0)),
        last=of_partition(seconds_of(run, segments)[1:].sum(axis=0)),
        layers=of_partition(segments.layers),
        traffic=passes * of_partition(segments.traffic),
        shared=(2 + (run.recompute == FULL)) * of_partition(segments.shared),
        sending=of_partition(sending),
        offloaded=of_partition(moved),
        memory=memory,
        held=of_partition(timing.held.astype(np.float64)) / run.pieces,
    )
