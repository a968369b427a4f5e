"""The step of an assignment by simulating its schedule, with backward passes in two halves."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from opensmp.compiler.plan.report.predicted_schedule import stages_of
from opensmp.compiler.plan.settings import PlanSettings
from opensmp.compiler.plan.unit_graph import CoarseGraph
from opensmp.compiler.schedule.actions import Action, TaskGraph
from opensmp.compiler.schedule.pipelines import build
from opensmp.compiler.schedule.simulate import Simulation, simulate
from opensmp.config.pipelines import PIPELINES


def simulate_step(
    graph: CoarseGraph,
    assignment: NDArray[np.int64],
    num_partitions: int,
    settings: PlanSettings,
) -> Simulation:
    """Simulates a step as it is run: with weight gradients apart from gradients of inputs.

    Both halves of a backward pass count as equally long, as where a step is built.
    """
    tasks = _tasks(graph, assignment, num_partitions, settings)
    active: int | None = settings.microbatches_in_flight(num_partitions)
    if PIPELINES[settings.pipeline].held is not None:
        active = settings.active_microbatches
    return simulate(build(settings.pipeline, tasks, active), tasks)


def _tasks(
    graph: CoarseGraph,
    assignment: NDArray[np.int64],
    num_partitions: int,
    settings: PlanSettings,
) -> TaskGraph:
    found = stages_of(graph, assignment, settings)
    count = len(found.partition)
    trains = found.backward > 0
    last = [s for s in range(count) if not any(s in needed for needed in found.needs)]
    device: dict[Action, int] = {}
    needs: dict[Action, frozenset[Action]] = {}
    seconds: dict[Action, float] = {}

    def add(action: Action, time: float, before: set[Action]) -> None:
        device[action] = int(found.partition[action.segment])
        seconds[action] = time
        needs[action] = frozenset(before)

    for m in range(settings.microbatches):
        for s in range(count):
            forward = float(found.forward[s] + found.forward_transfers[s])
            add(Action("F", s, m), forward, {Action("F", other, m) for other in found.needs[s]})
            if trains[s]:
                # The loss needs all outputs.
                before = {Action("F", other, m) for other in [s, *last]}
                before |= {Action("B", other, m) for other in found.returns[s] if trains[other]}
                half = float(found.backward[s]) / 2
                add(Action("B", s, m), half + float(found.backward_transfers[s]), before)
                add(Action("W", s, m), half, {Action("B", s, m)})
    return TaskGraph(device, needs, seconds, num_partitions)
