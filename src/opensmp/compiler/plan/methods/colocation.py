"""Placement of small models that share devices with other models."""

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
    """Plans a single layer into one partition: the least loaded one."""
    kept = [homes[id(v.variable)] for v in traced.variables if id(v.variable) in homes]
    place = kept[0] if kept else min(range(len(loads)), key=lambda p: (loads[p], p))
    partition_of = {op.name: place for op in traced.operations if op not in traced.sources}
    costs = costs_later(traced, settings)
    return make_plan(
        traced, len(loads), partition_of, settings=settings, source="auto", make_graph=costs
    )


def beside(plan: Plan, loads: Sequence[float]) -> Plan:
    """Moves a plan that leaves partitions empty to the least loaded consecutive partitions.

    The partitions keep their order. A plan without a choice is returned unchanged.
    """
    used = [p for p in range(plan.num_partitions) if p not in plan.empty]
    if not plan.empty or not used:
        return plan
    begins = range(plan.num_partitions - len(used) + 1)
    begin = min(begins, key=lambda b: (max(loads[b : b + len(used)]), b))
    moved = {old: begin + index for index, old in enumerate(used)}
    return replace(plan, partition_of={op: moved[p] for op, p in plan.partition_of.items()})
