"""The predicted schedule of a plan: when each stage runs each microbatch."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from opensmp.compiler.plan.cost_model import seconds_to_move
from opensmp.compiler.plan.plan import Plan
from opensmp.compiler.plan.recompute_levels import recomputed
from opensmp.compiler.plan.settings import PlanSettings
from opensmp.compiler.plan.unit_graph import CoarseGraph
from opensmp.compiler.schedule.actions import Action, Schedule, TaskGraph
from opensmp.compiler.schedule.pipelines import build
from opensmp.compiler.schedule.simulate import Simulation, simulate
from opensmp.config.pipelines import PIPELINES


@dataclass(frozen=True)
class PredictedSchedule:
    """The schedule of a plan and its simulation.

    Attributes:
        graph: The actions with their predicted times in seconds. A transfer is part of the action
            that waits for it.
        schedule: Their order on each device.
        simulation: Start and end of each action.
    """

    graph: TaskGraph
    schedule: Schedule
    simulation: Simulation


def predict_schedule(plan: Plan) -> PredictedSchedule:
    """Predicts when each action of a step runs."""
    tasks, settings = _tasks(plan), plan.settings
    if settings.own is not None:
        # Its order is for the two halves of backward passes, as a step has them.
        from opensmp.compiler.simulation.plan_step import tasks_of

        tasks = tasks_of(plan)
    active: int | None = settings.microbatches_in_flight(plan.num_partitions)
    if PIPELINES[settings.pipeline].held is not None or settings.own is not None:
        active = settings.active_microbatches
    schedule = build(settings.scheduled, tasks, active)
    return PredictedSchedule(tasks, schedule, simulate(schedule, tasks))


def stages(graph: CoarseGraph, assignment: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns the stage of each unit, numbered in an order of execution.

    If tensors only go to higher partitions, there is one stage per used partition. A manual plan
    may return to a partition; then each visit is a separate stage.
    """
    backwards = any(
        assignment[unit] < assignment[tensor.producer]
        for tensor in graph.tensors
        for unit in tensor.consumers
    )
    phase = np.zeros(len(graph), dtype=np.int64)
    if backwards:
        # Units are in topological order, and so are the tensors by their producer.
        for tensor in sorted(graph.tensors, key=lambda tensor: tensor.producer):
            for unit in tensor.consumers:
                changes = assignment[unit] != assignment[tensor.producer]
                phase[unit] = max(phase[unit], phase[tensor.producer] + changes)
    keys = list(zip(phase.tolist(), assignment.tolist(), strict=True))
    number = {key: index for index, key in enumerate(sorted(set(keys)))}
    return np.array([number[key] for key in keys], dtype=np.int64)


class Stages(NamedTuple):
    """The stages of a plan with their predicted times; arrays have one entry per stage.

    Attributes:
        of_unit: Stage of each unit.
        partition: Partition of each stage.
        forward: Seconds of a forward pass, without transfers.
        backward: Seconds of a backward pass, without transfers.
        forward_transfers: Seconds of the transfers that a forward pass waits for.
        backward_transfers: Seconds of the transfers that a backward pass waits for.
        needs: Stages whose forward passes send something to that of each stage.
        returns: Stages whose backward passes send gradients to that of each stage.
    """

    of_unit: NDArray[np.int64]
    partition: NDArray[np.int64]
    forward: NDArray[np.float64]
    backward: NDArray[np.float64]
    forward_transfers: NDArray[np.float64]
    backward_transfers: NDArray[np.float64]
    needs: list[set[int]]
    returns: list[set[int]]


def timed_stages(plan: Plan) -> Stages:
    """Returns the stages of a plan with their predicted times."""
    return stages_of(plan.costs, plan.assignment, plan.settings)


def stages_of(graph: CoarseGraph, assignment: NDArray[np.int64], settings: PlanSettings) -> Stages:
    """Does the same for an assignment of units to partitions."""
    machine = settings.machine
    stage = stages(graph, assignment)
    num_stages = int(stage.max(initial=-1)) + 1
    partition = np.zeros(num_stages, dtype=np.int64)
    partition[stage] = assignment
    again = recomputed(graph, settings, assignment).seconds
    found = Stages(
        stage,
        partition,
        np.bincount(stage, graph.forward_seconds, num_stages).astype(np.float64),
        np.bincount(stage, graph.backward_seconds + again, num_stages).astype(np.float64),
        np.zeros(num_stages),
        np.zeros(num_stages),
        [set() for _ in range(num_stages)],
        [set() for _ in range(num_stages)],
    )
    forward, backward = found.forward_transfers, found.backward_transfers
    needs, returns = found.needs, found.returns
    for tensor in graph.tensors:
        home = int(stage[tensor.producer])
        for reader in sorted({int(stage[unit]) for unit in tensor.consumers} - {home}):
            needs[reader].add(home)
            moved = partition[reader] != partition[home]
            forward[reader] += moved * seconds_to_move(machine, tensor.forward_bytes)
            if tensor.backward_bytes:
                returns[home].add(reader)
                backward[home] += moved * seconds_to_move(machine, tensor.backward_bytes)
    for variable in graph.shared:
        home = int(stage[variable.units[0]])
        for reader in sorted({int(stage[unit]) for unit in variable.units} - {home}):
            if partition[reader] != partition[home]:
                forward[reader] += seconds_to_move(machine, variable.parameter_bytes)
                if variable.gradient_bytes:
                    backward[home] += seconds_to_move(machine, variable.gradient_bytes)
    return found


def _tasks(plan: Plan) -> TaskGraph:
    """Returns the actions of a step with predicted seconds, including transfers."""
    found = timed_stages(plan)
    trains = found.backward > 0
    seconds = np.stack(
        [
            found.forward + found.forward_transfers,
            found.backward + found.backward_transfers,
            np.zeros(len(trains)),
        ]
    )
    return passes_of(
        found.partition,
        found.needs,
        found.returns,
        seconds,
        trains,
        np.zeros_like(trains),
        plan.settings.microbatches,
        plan.num_partitions,
    )


def passes_of(
    partition: NDArray[np.int64],
    needs: Sequence[Collection[int]],
    returns: Sequence[Collection[int]],
    seconds: NDArray[np.float64],
    trains: NDArray[np.bool_],
    splits: NDArray[np.bool_],
    num_microbatches: int,
    num_partitions: int,
) -> TaskGraph:
    """Returns the passes of a step of stages; arrays and sequences have one entry for each stage.

    Args:
        partition: Partition of each stage.
        needs: Stages whose forward passes send something to that of each stage.
        returns: Stages whose backward passes send gradients to that of each stage.
        seconds: Time of the forward pass, the backward pass and the weight gradients, shape
            (3, stages).
        trains: Whether a stage has a backward pass.
        splits: Whether its weight gradients are a pass of their own.
        num_microbatches: Microbatches of a step.
        num_partitions: Number of partitions, of which some may have no stage.
    """
    count = len(partition)
    last = [s for s in range(count) if not any(s in needed for needed in needs)]
    device: dict[Action, int] = {}
    needed: dict[Action, frozenset[Action]] = {}
    durations: dict[Action, float] = {}

    def add(kind: str, s: int, m: int, before: set[Action]) -> None:
        action = Action(kind, s, m)
        device[action] = int(partition[s])
        durations[action] = float(seconds["FBW".index(kind), s])
        needed[action] = frozenset(before)

    for m in range(num_microbatches):
        for s in range(count):
            add("F", s, m, {Action("F", other, m) for other in needs[s]})
            if not trains[s]:
                continue
            # The loss needs all outputs.
            before = {Action("F", other, m) for other in [s, *last]}
            before |= {Action("B", other, m) for other in returns[s] if trains[other]}
            add("B", s, m, before)
            if splits[s]:
                add("W", s, m, {Action("B", s, m)})
    return TaskGraph(device, needed, durations, num_partitions)
