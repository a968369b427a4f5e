"""The predicted schedule of a plan: when each stage runs each microbatch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from opensmp.compiler.plan.cost_model import seconds_to_move
from opensmp.compiler.plan.plan import Plan
from opensmp.compiler.plan.recompute_levels import recomputed
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
    tasks = _tasks(plan)
    active: int | None = plan.settings.microbatches_in_flight(plan.num_partitions)
    if PIPELINES[plan.settings.pipeline].held is not None:
        active = plan.settings.active_microbatches
    schedule = build(plan.settings.pipeline, tasks, active)
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


def _tasks(plan: Plan) -> TaskGraph:
    """Returns the actions of a step with predicted seconds, including transfers."""
    graph, machine = plan.costs, plan.settings.machine
    stage = stages(graph, plan.assignment)
    num_stages = int(stage.max(initial=-1)) + 1
    partition = np.zeros(num_stages, dtype=np.int64)
    partition[stage] = plan.assignment
    forward = np.bincount(stage, graph.forward_seconds, num_stages)
    again = recomputed(graph, plan.settings, plan.assignment).seconds
    backward = np.bincount(stage, graph.backward_seconds + again, num_stages)
    trains = backward > 0
    needs: list[set[int]] = [set() for _ in range(num_stages)]
    returns: list[set[int]] = [set() for _ in range(num_stages)]  # stages that send gradients back
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
    last = [s for s in range(num_stages) if not any(s in needed for needed in needs)]
    device: dict[Action, int] = {}
    needed: dict[Action, frozenset[Action]] = {}
    seconds: dict[Action, float] = {}
    for m in range(plan.settings.microbatches):
        for s in range(num_stages):
            action = Action("F", s, m)
            device[action] = int(partition[s])
            seconds[action] = float(forward[s])
            needed[action] = frozenset(Action("F", other, m) for other in needs[s])
            if trains[s]:
                action = Action("B", s, m)
                device[action] = int(partition[s])
                seconds[action] = float(backward[s])
                # The loss needs all outputs.
                before = {Action("F", other, m) for other in [s, *last]}
                before |= {Action("B", other, m) for other in returns[s] if trains[other]}
                needed[action] = frozenset(before)
    return TaskGraph(device, needed, seconds, plan.num_partitions)
