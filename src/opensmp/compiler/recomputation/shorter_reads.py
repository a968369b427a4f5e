"""Lets gradients read shapes and weights instead of activations where that is all they need.

TensorFlow's gradient functions read a whole tensor where its shape would do, and weights as results
of the loop that has passed them on. Between a forward and a backward pass that are functions of
their own, such a tensor would have to be kept.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import tensorflow as tf

from opensmp import _private
from opensmp.base.types import Op, Tensor
from opensmp.compiler.trace.control_flow import LOOPS

# The input of which an operation reads the shape only, see the kernels of TensorFlow.
_SHAPE_ONLY = {
    "ZerosLike": 0,
    "OnesLike": 0,
    "ResizeBilinearGrad": 1,
    "ResizeBicubicGrad": 1,
}
_SHAPES = frozenset({"Shape", "ShapeN"})


def shorten_reads(graph: Any, operations: Iterable[Op], forward: Collection[Op]) -> None:
    """Replaces inputs of gradient operations, so that fewer tensors have to be kept.

    - The shape of a tensor, if it is known now, becomes a constant.
    - A tensor of which only the shape is read becomes zeros of that shape.
    - What a loop passes on unchanged is read where the loop has it from.

    No value that is read changes.

    Args:
        graph: The graph of the operations.
        operations: The gradient operations; those in `forward` are left out.
        forward: The operations of the traced model.
    """
    with graph.as_default(), tf.control_dependencies(None):
        for op in operations:
            if op in forward:
                continue
            for index, tensor in enumerate(tuple(op.inputs)):
                if (shorter := _shorter(op, index, tensor, forward)) is not None:
                    _private.replace_input(op, index, shorter)


def _shorter(op: Op, index: int, tensor: Tensor, forward: Collection[Op]) -> Tensor | None:
    """Returns what an operation may read instead of one of its inputs; None if nothing is less."""
    if tensor.op.type in _SHAPES and tensor.op not in forward:
        shape = tensor.op.inputs[tensor.value_index].shape
        return tf.constant(shape.as_list(), tensor.dtype) if shape.is_fully_defined() else None
    if tensor.op not in forward:
        return None
    source = _before_loops(tensor)
    if _SHAPE_ONLY.get(op.type) == index:
        return _zeros(source)
    return source if source is not tensor and tensor.dtype != tf.variant else None


def _before_loops(tensor: Tensor) -> Tensor:
    """Returns the tensor that loops have passed on unchanged as this one."""
    while tensor.op.type in LOOPS:
        (body,) = _private.function_graphs(tensor.op, "body")
        index = tensor.value_index
        if body is None or len(body.inputs) != len(tensor.op.inputs):
            return tensor
        result = body.outputs[index]
        while result.op.type == "Identity":
            result = result.op.inputs[0]
        if result is not body.inputs[index]:
            return tensor
        tensor = tensor.op.inputs[index]
    return tensor


def _zeros(tensor: Tensor) -> Tensor | None:
    """Returns zeros in the shape of a tensor; None if more than its shape must be known."""
    if tensor.dtype == tf.variant:
        if tensor.op.type != "TensorListFromTensor":
            return None
        elements = tensor.op.inputs[0]
        if not elements.shape.is_fully_defined():
            return None
        return tf.raw_ops.TensorListFromTensor(
            tensor=tf.zeros(elements.shape, elements.dtype),
            element_shape=tf.constant(elements.shape[1:].as_list(), tf.int32),
        )
    if tensor.dtype in (tf.string, tf.resource):
        return None
    static = tensor.shape.is_fully_defined()
    return tf.zeros(tensor.shape if static else tf.shape(tensor), tensor.dtype)
