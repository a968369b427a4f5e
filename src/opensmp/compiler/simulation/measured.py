"""A plan with the measured times of its passes, and what other settings would give with these."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from opensmp.compiler.plan.partitioner.partitioner import partition_units
from opensmp.compiler.plan.plan import Plan
from opensmp.compiler.plan.report.predicted_schedule import stages
from opensmp.compiler.schedule.actions import Action
from opensmp.compiler.simulation.step import SimulatedStep
from opensmp.config.pipelines import PIPELINES
from opensmp.config.recompute import NONE
from opensmp.errors import PlanError

_MOST_PASSES = 6_000
"""Up to this number a schedule is made in some seconds, also one that is searched for."""


def with_measured_seconds(
    plan: Plan, timed: Iterable[tuple[Action, int, float]], transfer_seconds: float | None = None
) -> tuple[Plan | None, str]:
    """Returns a plan whose stages take as long as was measured.

    Of the passes of a stage of one kind the median counts, so that one that was interrupted does
    not matter. Within a stage the units keep their proportions.

    Args:
        plan: A plan with costs.
        timed: The actions of a step, each with its partition and its seconds.
        transfer_seconds: What a hand-over between partitions took; the plan's latency counts if it
            is less, or not known.

    Returns:
        The plan, or None and why there is none.
    """
    if plan.settings.recompute != NONE:
        return None, "activations are recomputed, the time of which is part of backward passes"
    graph, placed = plan.costs, plan.assignment
    stage = stages(graph, placed)
    count = int(stage.max(initial=-1)) + 1
    home = np.zeros(count, dtype=np.int64)
    home[stage] = placed
    passes: dict[tuple[int, str], list[float]] = {}
    microbatches: set[int] = set()
    for action, partition, duration in timed:
        if action.segment >= count or home[action.segment] != partition:
            return None, "the segments of the step are not those of this plan"
        microbatches.add(action.microbatch)
        passes.setdefault((action.segment, action.kind), []).append(duration)
    if len({segment for segment, _ in passes}) != count:
        return None, "the segments of the step are not those of this plan"
    seconds = np.zeros((2, count))
    for (segment, kind), found in passes.items():
        # A pass for weights may be that of several microbatches.
        share = len(found) / len(microbatches)
        seconds[int(kind != "F"), segment] += share * statistics.median(found)
    machine = plan.settings.machine
    if transfer_seconds is not None:
        latency = min(machine.transfer_seconds, transfer_seconds)
        machine = replace(machine, transfer_seconds=latency)
    return (
        replace(
            plan,
            settings=replace(plan.settings, machine=machine),
            graph=replace(
                graph,
                forward_seconds=_scaled(graph.forward_seconds, stage, seconds[0]),
                backward_seconds=_scaled(graph.backward_seconds, stage, seconds[1]),
            ),
            make_graph=None,
        ),
        "",
    )


def _scaled(
    seconds: NDArray[np.float64], stage: NDArray[np.int64], wanted: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Scales the seconds of units so that the sum of each stage is as wanted."""
    count = len(wanted)
    sums = np.bincount(stage, seconds, count)
    units = np.bincount(stage, minlength=count)
    factor = np.divide(wanted, sums, out=np.zeros(count), where=sums > 0)
    share = np.divide(wanted, units, out=np.zeros(count), where=(sums == 0) & (units > 0))
    return np.asarray(seconds * factor[stage] + share[stage])


class Alternative(NamedTuple):
    """Other settings and the simulated step with them; microbatches have the same size."""

    settings: Mapping[str, int | str]
    step: SimulatedStep

    @property
    def seconds_per_microbatch(self) -> float:
        """Time of a step for each of its microbatches."""
        return self.step.seconds / self.step.run.microbatches


def alternatives(plan: Plan, replicas: int = 1) -> list[Alternative]:
    """Simulates the same plan with other numbers of microbatches and other schedules.

    The first has the settings of the plan. Those of which the simulation would take too long, and
    schedules that need other pieces of the model, are left out.
    """
    settings = plan.settings
    num_stages = int(stages(plan.costs, plan.assignment).max(initial=-1)) + 1
    now = settings.microbatches
    wanted: list[dict[str, Any]] = [{}]
    wanted += [{"microbatches": now * factor} for factor in (2, 4)]
    if settings.pieces_per_partition == 1 and settings.own is None and now > 1:
        wanted += [
            {"pipeline": name}
            for name, row in PIPELINES.items()
            # With one piece for each partition, breadth_first is simple.
            if name not in (settings.pipeline, "breadth_first") and row.pieces in (None, 1)
        ]
    found = []
    for each in wanted:
        count = each.get("microbatches", now)
        if each and 3 * num_stages * count > _MOST_PASSES:
            continue
        try:
            found.append(Alternative(each, plan.simulate(replicas=replicas, **each)))
        except PlanError:
            if not each:
                raise
    return found


def recut(plan: Plan) -> tuple[float, float] | None:
    """Returns the seconds of the slowest partition for a microbatch, now and if cut by these times.

    None where this cannot be told: with several pieces for each partition, or if no plan fits.
    """
    if plan.settings.pieces_per_partition != 1 or plan.num_partitions == 1:
        return None
    try:
        other = partition_units(
            plan.costs, plan.num_partitions, replace(plan.settings, optimize="speed")
        )
    except PlanError:
        return None
    return max(plan.prediction.stage_seconds), max(plan.predict(other).stage_seconds)
