"""Derives the placement of variables from a plan."""

from __future__ import annotations

from collections.abc import Mapping

from opensmp.base.types import Op
from opensmp.compiler.plan.plan import Plan
from opensmp.compiler.trace.trace import TracedGraph


def variable_homes(traced: TracedGraph, plan: Plan, known: Mapping[int, int]) -> dict[int, int]:
    """Returns variable id to partition: `known`, else the partition of its first use."""
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
