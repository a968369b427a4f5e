"""Where a small model goes that lies beside others on the same devices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from opensmp.compiler.plan.methods.build import costs_later, make_plan
from opensmp.compiler.plan.plan import Plan
from opensmp.compiler.plan.settings import PlanSettings
from opensmp.compiler.trace.trace import TracedGraph


def in_one_place(
    traced: TracedGraph,
    loads: Sequence[float],
    homes: Mapping[int, int],
    settings: PlanSettings,
) -> Plan:
    """A plan that has a single layer in one partition: the one that has least to hold.

    Args:
        traced: The traced layer.
        loads: What each partition holds of other models.
        homes: Id to partition of variables that lie somewhere already; it goes to the first.
        settings: What the costs are for.
    """
    kept = [homes[id(v.variable)] for v in traced.variables if id(v.variable) in homes]
    place = kept[0] if kept else min(range(len(loads)), key=lambda p: (loads[p], p))
    partition_of = {op.name: place for op in traced.operations if op not in traced.sources}
    costs = costs_later(traced, settings)
    return make_plan(
        traced, len(loads), partition_of, settings=settings, source="auto", make_graph=costs
    )


def beside(plan: Plan, loads: Sequence[float]) -> Plan:
    """A plan that leaves partitions empty, moved to the partitions that have least to hold.

    Args:
        plan: A plan.
        loads: What each partition holds of other models.

    Returns:
        The plan with other numbers of partitions, in the same order; where there is nothing to
        choose, the plan itself.
    """
    used = [p for p in range(plan.num_partitions) if p not in plan.empty]
    if not plan.empty or not used:
        return plan
    begins = range(plan.num_partitions - len(used) + 1)
    begin = min(begins, key=lambda b: (max(loads[b : b + len(used)]), b))
    moved = {old: begin + index for index, old in enumerate(used)}
    return replace(plan, partition_of={op: moved[p] for op, p in plan.partition_of.items()})
