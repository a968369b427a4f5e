"""Counts what a lowered model keeps for the backward pass, by type of operation."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from opensmp.base.types import Tensor
from opensmp.compiler.costs.families import ALIASES
from opensmp.compiler.recomputation.choice import size_of

if TYPE_CHECKING:
    from opensmp.compiler.lowering.passes import Backward
    from opensmp.compiler.lowering.program import Program
    from opensmp.compiler.lowering.segments import Segment

INPUT = "(input)"
"""The type under which the inputs of segments are counted: they come from elsewhere."""


class Kept(NamedTuple):
    """A piece of memory that is kept.

    Attributes:
        owner: The tensor whose memory it is.
        read: The tensors in this memory that the backward pass reads.
    """

    owner: Tensor
    read: tuple[Tensor, ...]


def kept_bytes(program: Program, partition: int | None = None) -> dict[str, int]:
    """Returns the bytes that one microbatch keeps from its forward to its backward pass.

    Variables do not count, nor do tensors that share their memory with a counted one. Unknown
    dimensions count as in the cost model.

    Args:
        program: A lowered model with gradients.
        partition: Count this partition only; None counts all.

    Returns:
        Maps the type of the operation that made the tensors to their bytes, the largest first;
        inputs of segments are `INPUT`.

    Example:
        ```python
        sum(kept_bytes(program).values())
        ```
    """
    found: dict[str, int] = {}
    for segment in program.segments:
        if partition not in (None, segment.partition):
            continue
        inputs = {id(t) for t in segment.inputs}
        for tensor, _ in kept_tensors(program, segment):
            kind = INPUT if id(tensor) in inputs else tensor.op.type
            found[kind] = found.get(kind, 0) + size_of(tensor)
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def kept_tensors(program: Program, segment: Segment) -> list[Kept]:
    """Returns what the backward pass of a segment reads of its forward pass, without variables."""
    backward = program.backward(segment, segment.outputs)
    inputs = {id(t) for t in segment.inputs}
    leaves = {id(t) for t in (*segment.variables, *segment.captures)}
    found: dict[int, tuple[Tensor, dict[int, Tensor]]] = {}
    half: Backward | None = backward
    again = backward.recompute if backward is not None else None
    made_later = {id(t) for t in again.fetches} if again is not None else set()
    feeds = again.feeds if again is not None else ()
    while half is not None:
        skipped = leaves | made_later | {id(t) for t in half.gradient.upstream}
        for tensor in (*feeds, *half.feeds):
            if id(tensor) in skipped:
                continue
            root = tensor
            while id(root) not in inputs and root.op.type in ALIASES and root.op.inputs:
                root = root.op.inputs[root.value_index if root.op.type == "IdentityN" else 0]
            if id(root) not in leaves:
                found.setdefault(id(root), (root, {}))[1][id(tensor)] = tensor
        made_later |= {id(t) for t in half.handed}
        feeds = ()
        half = half.weights
    return [Kept(root, tuple(read.values())) for root, read in found.values()]
