"""Inputs that an operation uses: no branch of a conditional may use some of them."""

from __future__ import annotations

from typing import Any

from opensmp import _private
from opensmp.base.types import Op, Tensor
from opensmp.compiler.lowering.extraction import needed

_BRANCHES = {"If": ("then_branch", "else_branch"), "Case": ("branches",)}
_BRANCHES |= {f"Stateless{name}": attributes for name, attributes in _BRANCHES.items()}


def used_inputs(op: Op) -> list[Tensor]:
    """The inputs that an operation of a function graph may use."""
    inputs = list(op.inputs)
    if op.type not in _BRANCHES:
        return inputs
    graphs = [g for name in _BRANCHES[op.type] for g in _private.function_graphs(op, name)]
    if any(graph is None for graph in graphs):
        return inputs
    used = {0, *(position + 1 for graph in graphs for position in _used_positions(graph))}
    return [tensor for position, tensor in enumerate(inputs) if position in used]


def _used_positions(graph: Any) -> set[int]:
    """Positions of a function's inputs that its results and side effects depend on."""
    roots = [tensor.op for tensor in graph.outputs] + list(graph.control_outputs)
    live = needed(roots, frozenset(), lambda op: True)
    read = {id(tensor) for op in live for tensor in used_inputs(op)}
    read |= {id(tensor) for tensor in graph.outputs}
    return {position for position, tensor in enumerate(graph.inputs) if id(tensor) in read}
