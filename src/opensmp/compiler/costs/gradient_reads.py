"""Which tensors of an operation its gradient reads, for the kinds of gradients that there are."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from opensmp.compiler.costs.work import Call

Indices = tuple[int, ...]
Reads = Callable[[Call, Sequence[int]], tuple[Indices, Indices]]
"""Returns the indices of the inputs and outputs that are read, for the inputs whose gradients are
needed."""


def nothing(call: Call, wanted: Sequence[int]) -> tuple[Indices, Indices]:
    """No tensor, as for a sum."""
    return (), ()


def all_inputs(call: Call, wanted: Sequence[int]) -> tuple[Indices, Indices]:
    """All inputs; also if the forward pass runs again in the backward pass."""
    return tuple(range(len(call.inputs))), ()


def all_outputs(call: Call, wanted: Sequence[int]) -> tuple[Indices, Indices]:
    """All outputs, as for an exponential."""
    return (), tuple(range(len(call.outputs)))


def everything(call: Call, wanted: Sequence[int]) -> tuple[Indices, Indices]:
    """All inputs and outputs."""
    return tuple(range(len(call.inputs))), tuple(range(len(call.outputs)))


def only(inputs: Indices = (), outputs: Indices = ()) -> Reads:
    """The given inputs and outputs."""
    return lambda call, wanted: (inputs, outputs)


def other_operands(call: Call, wanted: Sequence[int]) -> tuple[Indices, Indices]:
    """The other operands of a product."""
    operands = [i for i, array in enumerate(call.inputs) if array.differentiable]
    return tuple(i for i in operands if any(w != i for w in wanted)), ()


def divisor(call: Call, wanted: Sequence[int]) -> tuple[Indices, Indices]:
    """The divisor, and the dividend for the gradient of the divisor."""
    return ((0, 1) if 1 in wanted else (1,)), ()


def power(call: Call, wanted: Sequence[int]) -> tuple[Indices, Indices]:
    """Base and exponent, and the result for the gradient of the exponent."""
    return (0, 1), ((0,) if 1 in wanted else ())


def batch_norm_values(call: Call, wanted: Sequence[int]) -> tuple[Indices, Indices]:
    """The input, the scale, and the statistics: those of the batch, or the given ones."""
    if call.attribute("is_training"):
        return (0, 1), tuple(o for o in range(len(call.outputs)) if o >= 3)
    return (0, 1, 3, 4), ()
