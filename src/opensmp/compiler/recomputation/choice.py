"""Chooses the tensors that a forward pass keeps if the backward pass may run parts of it again.

To recompute what the backward pass reads, some tensors must be kept from which it can be computed.
The cheapest such set is a minimum cut of the forward graph, with the bytes of each tensor as its
capacity: between the operations that must not run again and the tensors that are read. Inputs and
variables of the segment are available anyway. For compilers this is known from `torch.compile`
(He, "Min-cut optimal recomputation", 2022), for pipelines selective recomputation is from
Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models", 2022.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import tensorflow as tf

from opensmp import _private
from opensmp.base.types import Op, Tensor
from opensmp.compiler.costs.families import ALIASES
from opensmp.compiler.costs.graph_costs import UNKNOWN_SIZE, Costs, graph_costs
from opensmp.compiler.plan.plan import Plan
from opensmp.compiler.recomputation.minimum_cut import UNLIMITED, cheapest_cut
from opensmp.compiler.recomputation.policy import Policy
from opensmp.compiler.trace.control_flow import LOOPS
from opensmp.compiler.trace.layer_calls import MODEL, operation_labels
from opensmp.compiler.trace.trace import TracedGraph
from opensmp.config.recompute import NONE, SELECTIVE

CHEAP_FLOPS = 256
"""An operation with more FLOPs per element of its result is not run again selectively.

So the scores of attention with heads of up to 128 features are, and dense layers and convolutions
with more inputs are not.
"""

SMALL_SHARE = 64
"""A tensor that is smaller than the largest one by this factor is kept, if in doubt."""

_LISTS_BYTES = 1 << 40  # of tensors of unknown size, such as those that a loop collects


class Recomputation:
    """What the backward passes of a traced model may run again.

    Args:
        traced: The traced model, before gradients are added to its graph.
        plan: Its plan.
        policy: The levels of recomputation.

    Attributes:
        labels: The labels of all layer calls.
    """

    def __init__(self, traced: TracedGraph, plan: Plan, policy: Policy) -> None:
        self.labels, label_of = operation_labels(traced)
        levels: dict[tuple[int, str], str] = {}
        self._level: dict[Op, str] = {}
        for op in traced.operations:
            if op in traced.sources:
                continue
            key = plan.partition(op), label_of.get(op.name, MODEL)
            if key not in levels:
                levels[key] = policy.level(*key)
            self._level[op] = levels[key]
        costs = graph_costs(traced, required=()) if SELECTIVE in levels.values() else None
        self._heavy = _heavy(costs) if costs is not None else frozenset()

    def is_any(self, operations: Sequence[Op]) -> bool:
        """Returns whether one of the operations may be recomputed at all."""
        return any(self._level.get(op, NONE) != NONE for op in operations)

    def is_fixed(self, op: Op) -> bool:
        """Returns whether an operation must not run again: its results are kept if they are read.

        That holds for operations with state, such as random numbers that no seed determines, and
        for those that read resources, which may have changed in between.
        """
        level = self._level.get(op, NONE)
        if level == NONE or has_state(op):
            return True
        return level == SELECTIVE and op in self._heavy

    def kept(
        self, read: Sequence[Tensor], active: Collection[Op], again: Collection[Op] = ()
    ) -> tuple[Tensor, ...]:
        """Returns the tensors to keep, from which the rest is recomputed.

        Args:
            read: The tensors that the backward pass reads.
            active: The segment's operations that depend on its inputs or on state; results of other
                operations are available in the backward pass.
            again: Operations that the backward pass runs again in any case.
        """
        largest = max((size_of(t) for t in read if not _is_list(t)), default=0)
        certain = {
            t.ref()
            for t in read
            if self._level.get(t.op) == SELECTIVE and SMALL_SHARE * size_of(t) <= largest
        }

        def is_free(op: Op) -> bool:  # keeping what shares the memory of an input saves nothing
            return op in again or (op.type in ALIASES and bool(op.inputs))

        cut, _ = cheapest_cut(
            [t.ref() for t in read if t.ref() not in certain],
            lambda ref: op if (op := ref.deref().op) in active else None,
            lambda op: [t.ref() for t in op.inputs],
            lambda op: self.is_fixed(op) and not is_free(op),
            lambda ref: UNLIMITED if is_free(ref.deref().op) else max(1, size_of(ref.deref())),
        )
        small = [t.ref() for t in read if t.ref() in certain]
        return tuple(ref.deref() for ref in dict.fromkeys([*cut, *small]))


def has_state(op: Op) -> bool:
    """Returns whether running an operation a second time could give another result."""
    return _private.is_stateful(op) or any(t.dtype == tf.resource for t in op.inputs)


def size_of(tensor: Tensor) -> int:
    """Returns the bytes of a tensor; unknown dimensions count as in the cost model."""
    if _is_list(tensor):
        return _LISTS_BYTES
    if tensor.shape.rank is None or tensor.dtype in (tf.string, tf.resource):
        return UNKNOWN_SIZE
    return math.prod(size or UNKNOWN_SIZE for size in tensor.shape) * int(tensor.dtype.size)


def _is_list(tensor: Tensor) -> bool:
    return bool(tensor.dtype == tf.variant)


def _heavy(costs: Costs) -> frozenset[Op]:
    """Returns the operations that are not cheap to run again, see `CHEAP_FLOPS`."""
    operations = costs.wiring.operations
    return frozenset(op for i, op in enumerate(operations) if is_heavy(costs, i))


def is_heavy(costs: Costs, index: int) -> bool:
    """Returns whether an operation is not run again selectively, see `CHEAP_FLOPS`."""
    elements = sum(array.elements for array in costs.wiring.arrays[index])
    is_loop = costs.wiring.types[index] in LOOPS
    return is_loop or costs.forward[index].flops > CHEAP_FLOPS * max(1, elements)
