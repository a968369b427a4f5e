"""Where a small model goes that lies beside others on the same devices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from opensmp.plan.plan import Plan


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
