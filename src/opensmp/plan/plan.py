"""The plan: which operation of a traced graph runs in which partition."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from opensmp.graph import TracedGraph

Op = Any


@dataclass(frozen=True, eq=False)
class Plan:
    """An assignment of every operation of one traced graph to a partition.

    Attributes:
        model: Name of the model.
        num_partitions: Number of partitions; some may be empty.
        partition_of: Operation name to partition, for every operation that is not
            an input, a variable or a capture.
    """

    model: str
    num_partitions: int
    partition_of: Mapping[str, int]

    def partition(self, op: Op) -> int:
        """The partition that `op` runs in."""
        return self.partition_of[op.name]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of operations in each partition."""
        counts = Counter(self.partition_of.values())
        return tuple(counts[i] for i in range(self.num_partitions))

    def __str__(self) -> str:
        sizes = ", ".join(f"{i}: {n} operations" for i, n in enumerate(self.sizes))
        return f"Plan of {self.model} over {self.num_partitions} partitions ({sizes})"


def layer_partitions(traced: TracedGraph, plan: Plan) -> dict[tuple[int, int], int]:
    """Where each call of each layer went: (id of layer, call index) to partition.

    A layer that is cut counts for the partition of its first operation.
    """
    result: dict[tuple[int, int], int] = {}
    for span in traced.spans:
        for op in traced.operations[span.start : span.stop]:
            if op not in traced.sources:
                result.setdefault((id(span.layer), span.call_index), plan.partition(op))
                break
    return result


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
