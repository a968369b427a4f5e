"""The step of an assignment by simulating its schedule, with backward passes in two halves."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from opensmp.compiler.plan.report.predicted_schedule import passes_of, stages_of
from opensmp.compiler.plan.settings import PlanSettings
from opensmp.compiler.plan.unit_graph import CoarseGraph
from opensmp.compiler.schedule.actions import TaskGraph
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
    half = found.backward / 2
    seconds = np.stack(
        [found.forward + found.forward_transfers, half + found.backward_transfers, half]
    )
    trains = found.backward > 0
    return passes_of(
        found.partition,
        found.needs,
        found.returns,
        seconds,
        trains,
        trains,
        settings.microbatches,
        num_partitions,
    )
