"""Which tensors the gradient of an operation reads, and its cost, by operation type."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from opensmp.compiler.costs.families import FAMILIES, UNKNOWN
from opensmp.compiler.costs.gradient_reads import everything
from opensmp.compiler.costs.work import Call, Work


def reads(call: Call, wanted: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the indices of the inputs and outputs that an operation's gradient reads.

    For an unknown type these are all inputs and outputs.
    """
    if not wanted:
        return (), ()
    return (FAMILIES.get(call.type, UNKNOWN).reads or everything)(call, wanted)


def backward(call: Call, wanted: Sequence[int], forward: Work, *, sparse: bool = False) -> Work:
    """Returns the work of computing the gradients of an operation's inputs."""
    if not wanted:
        return Work()
    num_wanted = len(wanted)
    family = FAMILIES.get(call.type, UNKNOWN)
    if family.contraction:
        return replace(forward * num_wanted, launches=num_wanted)
    if family.alias:
        return Work(launches=num_wanted)
    if family.sparse and sparse:
        return Work(0.0, 2 * call.written, 2)
    if family.normalizes:
        x = call.inputs[0]
        return Work(8.0 * x.elements, 5 * x.nbytes, 1)
    result = forward if family.runs_again else Work()
    for i in wanted:
        result = result + _elementwise(call, i)
    return result


def _elementwise(call: Call, i: int) -> Work:
    """Work of one input's gradient, as elementwise passes over the larger of input and result."""
    family = FAMILIES.get(call.type, UNKNOWN)
    x, y = call.inputs[i], max(call.outputs, key=lambda array: array.elements)
    large = max(x, y, key=lambda array: array.elements)
    passes = family.passes if isinstance(family.passes, int) else family.passes[i]
    result = Work(float(passes * large.elements), 3 * passes * large.nbytes, passes)
    if x.elements < y.elements and not family.reshapes:  # it was broadcast
        result = result + Work(float(y.elements), y.nbytes + x.nbytes, 2)
    return result
