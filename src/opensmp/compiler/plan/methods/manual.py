"""Manual plans: operations are placed by `smp.partition`."""

from __future__ import annotations

from opensmp import _private
from opensmp.compiler.plan.methods.build import costs_later, make_plan
from opensmp.compiler.plan.plan import Plan
from opensmp.compiler.plan.settings import PlanSettings
from opensmp.compiler.trace.trace import TracedGraph


def manual_plan(
    traced: TracedGraph,
    num_partitions: int,
    default_partition: int,
    settings: PlanSettings | None = None,
) -> Plan:
    """Makes a plan from the tags of `smp.partition`, and the default partition for all else."""
    partition_of = {}
    for op in traced.operations:
        if op not in traced.sources:
            tag = _private.tag_of(op)
            partition_of[op.name] = default_partition if tag is None else tag
    settings = settings or PlanSettings()
    return make_plan(
        traced,
        num_partitions,
        partition_of,
        settings=settings,
        source="manual",
        make_graph=costs_later(traced, settings),
    )
