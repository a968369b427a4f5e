"""Outputs of a model that other outputs are computed from, such as activations for Grad-CAM."""

from __future__ import annotations

from typing import Any

from opensmp.base.types import Op, Tensor
from opensmp.compiler.trace.differentiable import is_differentiable
from opensmp.compiler.trace.shared_ops import replicated
from opensmp.compiler.trace.trace import TracedGraph


def taps(traced: TracedGraph) -> dict[int, Tensor]:
    """Maps ids of outputs to the inner tensors that further outputs are computed from.

    A gradient of the latter with respect to the former must pass through the very tensor that the
    caller has, so a segment has to end there. The output is an identity; both are differentiable.
    """
    ends = {tensor.op for tensor in traced.results}
    left_out = replicated(traced) | traced.sources
    found: dict[int, Tensor] = {}
    for output in traced.outputs:
        if output.op.type != "Identity":
            continue
        inside = output.op.inputs[0]
        is_active = inside.op not in left_out and is_differentiable(inside)
        if is_active and any(_leads_out(op, ends) for op in _readers(inside, ends)):
            found[id(output)] = inside
    return found


def cuts(traced: TracedGraph) -> frozenset[tuple[Op, Op]]:
    """Returns pairs (producer, reader) of the tensors of `taps`, which need separate segments."""
    ends = {tensor.op for tensor in traced.results}
    return frozenset(
        (tensor.op, reader) for tensor in taps(traced).values() for reader in _readers(tensor, ends)
    )


def _readers(tensor: Tensor, ends: set[Any]) -> list[Any]:
    """Returns the consumers of a tensor, except those that only return it."""
    return [op for op in tensor.consumers() if not (op in ends and op.type == "Identity")]


def _leads_out(op: Any, ends: set[Any]) -> bool:
    """Returns whether a gradient of a result can flow to an operation."""
    stack, seen = [op], {op}
    while stack:
        reached = stack.pop()
        bearing = [tensor for tensor in reached.outputs if is_differentiable(tensor)]
        if bearing and reached in ends:
            return True
        for tensor in bearing:
            more = [consumer for consumer in tensor.consumers() if consumer not in seen]
            seen.update(more)
            stack.extend(more)
    return False
