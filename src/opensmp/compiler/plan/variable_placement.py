"""What follows from a plan: where variables live."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opensmp.compiler.plan.plan import Plan
from opensmp.compiler.trace.trace import TracedGraph

Op = Any


def variable_homes(traced: TracedGraph, plan: Plan, known: Mapping[int, int]) -> dict[int, int]:
    """The partition of each variable that the graph reads: where it is first used.

    Args:
        traced: The traced model.
        plan: Its plan.
        known: Homes given by earlier plans of the model; they stay.

    Returns:
        Id of variable to partition, `known` included.
    """
    first_use: dict[Op, int] = {}
    for op in traced.operations:
        if op not in traced.sources:
            for tensor in op.inputs:
                first_use.setdefault(tensor.op, plan.partition(op))
    homes = dict(known)
    for leaf in traced.variables:
        if leaf.placeholder.op in first_use:
            homes.setdefault(id(leaf.variable), first_use[leaf.placeholder.op])
    return homes
