"""Selection of tensors to read so that others are known to be finite without being read.

Two facts spare most of the reading. A sum or product with a value that is not finite is not finite
either (inf * 0 and inf - inf are nan), so a tensor need not be read if such operations lead from it
to another one that is checked. And no element of a matrix product is larger than the product of the
norms of its factors, which are often much smaller than their product, the gradient of a kernel.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from opensmp.base.types import Op, Tensor
from opensmp.compiler.lowering.matmul_gradients import product_of

_RESHAPES = frozenset(
    {"ExpandDims", "Identity", "PreventGradient", "Reshape", "Squeeze", "StopGradient"}
)

# Operations whose result is not finite if any element of any of their floating inputs is not. Left
# out: those that drop elements (Slice, Relu of -inf, Select, strided convolutions), and those that
# may map infinity to a number (Tanh, Rsqrt, Exp, Softmax, a divisor).
_SPREADING = _RESHAPES | {
    "Add",
    "AddN",
    "AddV2",
    "BatchMatMulV2",
    "BiasAdd",
    "BiasAddGrad",
    "ConcatV2",
    "MatMul",
    "Mean",
    "Mul",
    "Neg",
    "Pack",
    "Square",
    "SquaredDifference",
    "Sub",
    "Sum",
    "Transpose",
}

# Dtypes that hold the largest product that two tensors below the limit of `finite_flags` can have.
_WIDE = (tf.float32, tf.float64, tf.bfloat16)


def tensors_to_read(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Returns tensors such that all of `tensors` are finite if the norms of these are moderate."""
    last = {id(_source(t)): t for t in _not_spreading(tensors)}
    chosen: dict[int, Tensor] = {}
    sums: list[Tensor] = []
    for tensor in last.values():
        source = _source(tensor)
        product = product_of(tensor, ()) if tensor.dtype in _WIDE else None
        if source.op.type in ("BiasAddGrad", "Sum"):
            sums.append(source)
        elif product is not None and product.is_worth_bounding:
            chosen |= {id(_source(factor)): _source(factor) for factor in product.factors}
        else:
            chosen[id(source)] = source
    for tensor in sums:  # no element is larger than the norm times the root of the number of terms
        if id(_source(tensor.op.inputs[0])) not in chosen or tensor.dtype not in _WIDE:
            chosen[id(tensor)] = tensor
    return list(chosen.values())


def _not_spreading(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors that no path of spreading operations leads from to another of them."""
    if not tensors:
        return []
    checked = {id(t) for t in tensors}
    seen_later: set[int] = set()  # ids of tensors from which a path leads to a checked one
    for op in reversed(tensors[0].graph.get_operations()):
        if _spreads(op) and (id(op.outputs[0]) in checked or id(op.outputs[0]) in seen_later):
            seen_later.update(id(t) for t in op.inputs if t.dtype.is_floating)
    return [t for t in tensors if id(t) not in seen_later]


def _spreads(op: Op) -> bool:
    if op.type == "Einsum":
        equation = op.get_attr("equation").decode()
        operands = equation.partition("->")[0].split(",")
        return "." not in equation and all(len(set(each)) == len(each) for each in operands)
    if op.type == "Cast":
        return bool(op.outputs[0].dtype.is_floating and op.inputs[0].dtype.is_floating)
    if op.type in ("Mul", "MatMul", "BatchMatMulV2") and any(map(_is_zero, op.inputs)):
        return False  # TensorFlow replaces a product with constant zeros by zeros
    if op.type == "Sub" and _source(op.inputs[0]) is _source(op.inputs[1]):
        return False
    return op.type in _SPREADING


def _is_zero(tensor: Tensor) -> bool:
    source = _source(tensor)
    return source.op.type == "Const" and not np.any(tf.get_static_value(source))


def _source(tensor: Tensor) -> Tensor:
    """The tensor of which this one has all elements, in another shape."""
    while tensor.op.type in _RESHAPES:
        tensor = tensor.op.inputs[0]
    return tensor
