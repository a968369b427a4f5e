"""The cost model of plans: time per stage, time per step, and peak memory per device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from opensmp.compiler.plan.recompute_levels import (
    Choice,
    Recomputed,
    choices,
    of_levels,
    recomputed,
    savings,
)
from opensmp.compiler.plan.settings import PlanSettings
from opensmp.compiler.plan.unit_graph import CoarseGraph, Machine
from opensmp.config.offload import offloads_optimizer
from opensmp.errors import PlanError

_MOST_LISTED = 5


@dataclass(frozen=True)
class Prediction:
    """The predicted costs of an assignment. Tuples have one entry per partition.

    Times and moved bytes are per microbatch, except for `step_seconds`.

    Attributes:
        stage_seconds: Time per microbatch: the sum of the next three.
        forward_seconds: Compute time of the forward pass.
        backward_seconds: Compute time of the backward pass.
        transfer_seconds: Time spent waiting for tensors of other partitions, forward and backward.
        peak_bytes: Peak memory of the partition's device.
        cut_bytes: Bytes that all partitions together send to each other.
        step_seconds: Sum of `stage_seconds` plus (microbatches - 1) times the largest.
        bubble: Idle share of all devices' time, 0 <= bubble < 1.
        balance: Largest of `stage_seconds` divided by their mean; 1 is perfect.
        num_units: Number of units in each partition.
        recompute: What `recompute="auto"` chooses for each partition.
    """

    stage_seconds: tuple[float, ...]
    forward_seconds: tuple[float, ...]
    backward_seconds: tuple[float, ...]
    transfer_seconds: tuple[float, ...]
    peak_bytes: tuple[int, ...]
    cut_bytes: int
    step_seconds: float
    bubble: float
    balance: float
    num_units: tuple[int, ...]
    recompute: tuple[Choice, ...] = ()

    @property
    def empty_partitions(self) -> tuple[int, ...]:
        """Partitions without units."""
        return tuple(p for p, count in enumerate(self.num_units) if not count)


def evaluate(
    graph: CoarseGraph,
    assignment: ArrayLike,
    num_partitions: int,
    settings: PlanSettings,
    *,
    monotone: bool = True,
    by_schedule: bool = False,
) -> Prediction:
    """Predicts time and memory of an assignment of units to partitions.

    The time of a stage is that of its units plus its transfers, which the receiver pays for. A
    partition that reads a tensor of another partition pays latency plus bytes over bandwidth, once
    regardless of how many of its units read it. The producing partition pays the same for each
    gradient that it receives from such a reader. A variable of several units belongs to the
    partition of the first of them; any other partition that reads it pays for its value, and the
    home partition for each gradient.

    The time of a step is the sum of the stages plus (microbatches - 1) times the slowest stage, as
    in Alpa (Zheng et al., "Automating Inter- and Intra-Operator Parallelism for Distributed Deep
    Learning", OSDI 2022, section 5).

    The memory of a partition is that of its variables and their state, plus, for each microbatch in
    flight, the residuals of its units and the tensors that it sends and receives. Residuals that
    are recomputed exist once, while a backward pass runs, which takes as much longer. Those that
    are offloaded count for the few microbatches that are in memory all the same. A partition
    holds one copy and one gradient of every shared variable that it reads.

    Args:
        graph: Units, their costs and the tensors between them.
        assignment: Integers of shape (len(graph),): the partition of each unit. Tensors may stay in
            a partition or go to a higher one.
        num_partitions: Number of partitions, >= 1; some may be empty.
        settings: Speed of the devices, and microbatches per step and in flight.
        by_schedule: Whether each partition counts with the microbatches that it holds in the
            schedule of equal stages, see `PlanSettings.microbatches_held`, or all with as many as
            are in flight, which none exceeds.
        monotone: False allows tensors to go back to lower partitions, as in manual plans; the time
            of a partition is then that of all its stages.

    Raises:
        PlanError: If the assignment does not match the `len(graph)` units or the partitions, or a
            tensor goes back to a lower partition although `monotone` is set.
    """
    placed = checked_assignment(graph, assignment, num_partitions, monotone)
    held = np.full(num_partitions, settings.microbatches_in_flight(num_partitions))
    if by_schedule:
        held = settings.microbatches_held(num_partitions)
    again = recomputed(graph, settings, placed)
    forward = np.bincount(placed, graph.forward_seconds, num_partitions)
    backward = np.bincount(placed, graph.backward_seconds + again.seconds, num_partitions)
    peak = np.zeros(num_partitions, dtype=np.int64)
    resident = settings.resident_of(held)
    away = np.array([offloads_optimizer(settings.offload, p) for p in range(num_partitions)])
    np.add.at(peak, placed, bytes_of_units(graph, resident[placed], again, away[placed]))
    transfer = np.zeros(num_partitions)
    cut_bytes = 0
    for link in links_of(graph, 1):
        home = int(placed[link.home])
        readers = sorted({int(placed[unit]) for unit in link.readers} - {home})
        if not readers:
            continue
        transfer[readers] += link.forward_seconds(settings.machine)
        transfer[home] += len(readers) * link.backward_seconds(settings.machine)
        times = held if link.ordered else np.ones_like(held)
        peak[readers] += times[readers] * link.received_bytes
        peak[home] += times[home] * link.sent_bytes
        cut_bytes += len(readers) * (link.forward_bytes + link.backward_bytes)
    chosen = choices(graph, placed, peak, resident.tolist(), settings)
    for partition, choice in enumerate(chosen):
        if choice.recomputed:
            saved = savings(graph, placed, num_partitions, choice.level)[partition]
            peak[partition] -= (choice.recomputed - 1) * saved
            added = of_levels(graph, [choice.level] * len(graph)).seconds
            share = choice.recomputed / resident[partition]
            backward[partition] += share * float(added[placed == partition].sum())
    stage = forward + backward + transfer
    total, slowest = float(stage.sum()), float(stage.max())
    step = total + (settings.microbatches - 1) * slowest
    busy = settings.microbatches * total
    return Prediction(
        stage_seconds=tuple(stage.tolist()),
        forward_seconds=tuple(forward.tolist()),
        backward_seconds=tuple(backward.tolist()),
        transfer_seconds=tuple(transfer.tolist()),
        peak_bytes=tuple(peak.tolist()),
        cut_bytes=cut_bytes,
        step_seconds=step,
        bubble=max(0.0, 1 - busy / (num_partitions * step)) if step else 0.0,
        balance=slowest * num_partitions / total if total else 1.0,
        num_units=tuple(np.bincount(placed, minlength=num_partitions).tolist()),
        recompute=chosen,
    )


class Link(NamedTuple):
    """A tensor, or a variable of several units: what other partitions that read it pay for.

    Attributes:
        home: Unit that produces it, or the first that reads the variable.
        readers: Units that read it.
        forward_bytes: Size of the value that each other partition receives.
        backward_bytes: Size of the gradient that it sends back; 0 if there is none.
        received_bytes: Memory that it takes in each other partition that reads it.
        sent_bytes: Memory that it takes at its home if any other partition reads it.
        ordered: Whether readers come after the home; false for variables.
    """

    home: int
    readers: tuple[int, ...]
    forward_bytes: int
    backward_bytes: int
    received_bytes: int
    sent_bytes: int
    ordered: bool

    def forward_seconds(self, machine: Machine) -> float:
        """Returns the time to receive the value."""
        return seconds_to_move(machine, self.forward_bytes)

    def backward_seconds(self, machine: Machine) -> float:
        """Returns the time to receive the gradient, 0 if there is none."""
        return seconds_to_move(machine, self.backward_bytes) if self.backward_bytes else 0.0


def links_of(graph: CoarseGraph, held: int) -> Iterator[Link]:
    """Yields the tensors and the shared variables, for `held` microbatches in flight."""
    for tensor in graph.tensors:
        producer, consumers, forward, backward, _ = tensor
        size = held * forward
        yield Link(producer, consumers, forward, backward, size, size, ordered=True)
    for variable in graph.shared:
        units, value, gradient, _ = variable
        yield Link(units[0], units, value, gradient, value + gradient, 0, ordered=False)


def bytes_of_units(
    graph: CoarseGraph,
    held: int | NDArray[np.int64],
    again: Recomputed,
    away: bool | NDArray[np.bool_] = False,
) -> NDArray[np.int64]:
    """Returns the peak memory of each unit, with residuals of `held` microbatches in memory.

    A shared variable counts for its home only. The optimizer's slots of units that are `away` are
    offloaded.
    """
    kept = graph.parameter_bytes + graph.state_bytes
    kept = kept - np.where(away, slots_of(graph.state_bytes), 0)
    kept = kept + held * again.kept_bytes + again.passing_bytes
    kept = kept.astype(np.int64)
    for variable in graph.shared:
        kept[variable.units[0]] += variable.parameter_bytes + variable.gradient_bytes
    return kept


def slots_of(state_bytes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns the bytes of the optimizer's slots: two thirds of the state, with Adam."""
    return state_bytes * 2 // 3


def seconds_to_move(machine: Machine, num_bytes: int) -> float:
    """Returns the time to receive `num_bytes` from another device: latency plus transfer."""
    return machine.transfer_seconds + num_bytes / machine.transfer_bytes_per_second


def checked_assignment(
    graph: CoarseGraph, assignment: ArrayLike, num_partitions: int, monotone: bool = True
) -> NDArray[np.int64]:
    """Returns the assignment as an int64 array if a pipeline can run it."""
    placed = np.asarray(assignment)
    if placed.size and not np.issubdtype(placed.dtype, np.integer):
        raise PlanError(
            f"Plan: partitions are integers; received an assignment of dtype {placed.dtype}."
        )
    if placed.shape != (len(graph),):
        raise PlanError(
            f"Plan: an assignment gives a partition to each of the {len(graph)} units, an array "
            f"of shape ({len(graph)},); received shape {placed.shape}."
        )
    outside = np.flatnonzero((placed < 0) | (placed >= num_partitions))
    if outside.size:
        faults = [f"unit {graph.names[u]!r} is in partition {placed[u]}" for u in outside]
        raise PlanError(
            f"Plan: partitions go from 0 to {num_partitions - 1}, but {_listed(faults)}."
        )
    faults = [
        f"tensor {tensor.name!r} of unit {graph.names[tensor.producer]!r} goes from partition "
        f"{placed[tensor.producer]} back to {placed[unit]}, to unit {graph.names[unit]!r}"
        for tensor in graph.tensors
        for unit in tensor.consumers
        if monotone and placed[unit] < placed[tensor.producer]
    ]
    if faults:
        raise PlanError(
            "Plan: tensors stay in a partition or go to a higher one, but "
            f"{_listed(faults)}. Raise the partition of the readers, or lower that of the makers."
        )
    return placed.astype(np.int64)


def _listed(faults: Sequence[str]) -> str:
    more = len(faults) - _MOST_LISTED
    return "; ".join(faults[:_MOST_LISTED]) + (f"; and {more} more" if more > 0 else "")
