"""Predicted times of parts of a model, for schedules that weigh them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from opensmp.compiler.plan.plan import Plan
from opensmp.compiler.plan.recompute_levels import recomputed
from opensmp.compiler.plan.report.predicted_schedule import timed_stages


def segment_seconds(plan: Plan, operations: Iterable[str]) -> tuple[float, float] | None:
    """Returns the seconds of the forward and of the backward pass of some operations.

    A unit counts by the share of its operations that are among them. The transfers that the passes
    wait for are those of the stage to which most of the operations belong. None if the plan, as one
    from a file may, has no costs.
    """
    if not plan.has_costs:
        return None
    graph = plan.costs
    among = frozenset(operations)
    count = np.array([len(among.intersection(unit)) for unit in graph.operations])
    if not count.any():
        return 0.0, 0.0
    share = count / np.array([max(1, len(unit)) for unit in graph.operations])
    again = recomputed(graph, plan.settings, plan.assignment).seconds
    stages = timed_stages(plan)
    stage = int(np.bincount(stages.of_unit, count).argmax())
    forward = share @ graph.forward_seconds + stages.forward_transfers[stage]
    backward = share @ (graph.backward_seconds + again)
    if backward:
        backward += stages.backward_transfers[stage]
    return float(forward), float(backward)
