"""Gradients of weights that are products of two tensors that differ between microbatches."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import tensorflow as tf

from opensmp.base.types import Op, Tensor

_KEEP_ELEMENTS = ("Reshape", "Identity")


@dataclass(frozen=True, eq=False)
class Product:
    """A gradient that is a matrix product or another sum of products along one axis.

    Concatenating the factors of several microbatches along that axis yields the accumulated
    gradient in one product, so that no gradient of a single microbatch is ever in memory.

    Attributes:
        gradient: The gradient.
        factors: The two tensors that are multiplied.
        axes: For each factor, the axis that the product sums over.
        operations: The multiplication, then the operations that only reshape its result.
    """

    gradient: Tensor
    factors: tuple[Tensor, Tensor]
    axes: tuple[int, int]
    operations: tuple[Op, ...]

    @property
    def is_worth_joining(self) -> bool:
        """Whether concatenating the factors is cheaper than accumulating the products.

        Per microbatch, concatenation copies the factors, and accumulation writes the product and
        reads it again. The margin of two accounts for the memory that factors occupy until then.
        """
        return self._factors_are_smaller(times=2)

    @property
    def is_worth_bounding(self) -> bool:
        """Whether reading the factors is cheaper than reading the product."""
        return self._factors_are_smaller(times=1)

    def _factors_are_smaller(self, times: int) -> bool:
        shapes = [t.shape for t in (*self.factors, self.operations[0].outputs[0])]
        if not all(shape.is_fully_defined() for shape in shapes):
            return False
        left, right, product = (int(shape.num_elements()) for shape in shapes)
        return times * (left + right) <= product


def product_of(gradient: Tensor, stop: Collection[int]) -> Product | None:
    """Returns the gradient as a product; None if it is not one, or is sparse."""
    if isinstance(gradient, tf.IndexedSlices):
        return None
    tensor, reshapes = gradient, []
    while id(tensor) not in stop and tensor.op.type in _KEEP_ELEMENTS:
        reshapes.append(tensor.op)
        tensor = tensor.op.inputs[0]
    if id(tensor) in stop:
        return None
    axes = _summed_axes(tensor.op)
    if axes is None or tensor.op.inputs[0] is tensor.op.inputs[1]:
        return None
    operations = (tensor.op, *reversed(reshapes))
    return Product(gradient, tuple(tensor.op.inputs), axes, operations)


def _summed_axes(op: Op) -> tuple[int, int] | None:
    """Returns the axis of each factor that an operation sums over; None if it is not a product."""
    if op.type == "MatMul":
        left = 0 if op.get_attr("transpose_a") else 1
        right = 1 if op.get_attr("transpose_b") else 0
        return left, right
    if op.type == "Einsum" and len(op.inputs) == 2:
        return _summed_labels(op.get_attr("equation").decode())
    return None


def _summed_labels(equation: str) -> tuple[int, int] | None:
    inputs, _, output = equation.partition("->")
    if "." in equation or "," not in inputs:
        return None
    left, right = inputs.split(",")
    if any(_has_repeats(labels) for labels in (left, right)):
        return None
    summed = [label for label in left if label in right and label not in output]
    return (left.index(summed[0]), right.index(summed[0])) if summed else None


def _has_repeats(labels: Sequence[str]) -> bool:
    return len(set(labels)) < len(labels)
