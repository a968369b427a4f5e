"""Determines which operations are replicated into every segment to avoid transfers."""

from __future__ import annotations

from opensmp import _private
from opensmp.base.types import Op, Tensor
from opensmp.compiler.trace.trace import TracedGraph

_MAX_REPLICATED_ELEMENTS = 1024


def replicated(traced: TracedGraph) -> frozenset[Op]:
    """Returns the small operations on constants and integer state (shapes, seeds).

    They are copied into every segment that reads them, so they belong to no partition, and their
    cost is negligible. They depend on constants only, or also on integer variables that the model
    updates and produce integer tensors of at most 1,024 elements.
    """
    state = {id(variable) for variable, _ in traced.updates}
    shareable = {
        v.placeholder.op
        for v in traced.variables
        if id(v.variable) in state and v.placeholder.dtype.is_integer
    }
    constant: set[Op] = set()
    counting: set[Op] = set()
    for op in traced.operations:
        if op in traced.sources or _private.is_stateful(op) or op.control_inputs:
            continue
        producers = {tensor.op for tensor in op.inputs}
        if producers <= constant:
            constant.add(op)
        elif producers <= constant | counting | shareable and all(map(_is_small, op.outputs)):
            counting.add(op)
    return frozenset(constant | counting)


def _is_small(tensor: Tensor) -> bool:
    size = tensor.shape.num_elements()
    return tensor.dtype.is_integer and size is not None and size <= _MAX_REPLICATED_ELEMENTS
