"""Predicted times of parts of a model, for schedules that weigh them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from opensmp.compiler.plan.plan import Plan
from opensmp.compiler.plan.recompute_levels import recomputed


def segment_seconds(plan: Plan, operations: Iterable[str]) -> tuple[float, float] | None:
    """Returns the seconds of the forward and of the backward pass of some operations.

    A unit counts by the share of its operations that are among them. None if the plan, as one from
    a file may, has no costs.
    """
    if not plan.has_costs:
        return None
    graph = plan.costs
    among = frozenset(operations)
    share = np.array(
        [len(among.intersection(unit)) / max(1, len(unit)) for unit in graph.operations]
    )
    again = recomputed(graph, plan.settings, plan.assignment).seconds
    return float(share @ graph.forward_seconds), float(share @ (graph.backward_seconds + again))
