"""Checks that a model's tensors are finite: selection of the tensors, and the check itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from opensmp.base.types import ConcreteFunction, Tensor
from opensmp.compiler.lowering.finite_cover import tensors_to_read
from opensmp.compiler.lowering.segments import Segment
from opensmp.compiler.trace.trace import TracedGraph

_MODERATE = 1e36
"""With norms below its root, sums and products of two tensors are far below the largest float32."""

_FEW = 4096
"""Tensors of fewer elements are concatenated, as an operation for each would take longer."""

_CHECKED = (tf.float16, tf.bfloat16, tf.float32, tf.float64, tf.complex64, tf.complex128)


class Activation(NamedTuple):
    """A tensor that a layer, or the caller of the model, produces, with its name in messages."""

    tensor: Tensor
    name: str


def is_checked(tensor: Tensor) -> bool:
    """Returns whether a tensor's dtype can hold NaN or infinity and can be checked."""
    return tensor.dtype in _CHECKED


def activations(traced: TracedGraph, segment: Segment) -> tuple[Activation, ...]:
    """Returns a segment's model inputs and its layers' outputs, in the order of computation.

    A tensor counts as the output of the innermost layer that computes it, if an operation outside
    of that layer reads it. Tensors internal to a layer are left out, since checking them would cost
    more and prevent TensorFlow from fusing operations.
    """
    number = {op: i for i, op in enumerate(traced.operations)}
    layers = layer_paths(traced)
    given = {id(t) for t in segment.inputs}
    found = [
        Activation(tensor, f"input {i} of model '{traced.name}'")
        for i, tensor in enumerate(traced.inputs)
        if id(tensor) in given and is_checked(tensor)
    ]
    results = {id(t) for t in traced.results}
    for op in sorted((op for op in segment.operations if op in number), key=number.__getitem__):
        layer = layers[number[op]]
        for tensor in filter(is_checked, op.outputs):
            readers = [number[reader] for reader in tensor.consumers() if reader in number]
            is_result = id(tensor) in results
            if is_result and op.type == "Identity" and not layer and op.inputs[0].op in number:
                before = op.inputs[0].op
                if layers[number[before]] and before in segment.operations:
                    continue  # already checked as its layer's output
            if is_result or any(layers[reader] != layer for reader in readers):
                found.append(Activation(tensor, activation_name(traced, layer)))
    return tuple(found)


def activation_name(traced: TracedGraph, layer: str) -> str:
    """Returns the description of the output of the layer with path `layer` (empty: the model)."""
    owner = f"layer '{layer}'" if layer else f"model '{traced.name}'"
    return f"the activation of {owner}"


def layer_paths(traced: TracedGraph) -> list[str]:
    """Returns for each operation the path of its innermost layer, such as "outer/inner".

    The path is empty for operations outside of all layers.
    """
    paths = [""] * len(traced.operations)
    names: list[str] = []
    for span in traced.spans:  # outer layers come first
        del names[span.depth :]
        names.append(span.layer.name)
        path = "/".join(names)
        paths[span.start : span.stop] = [path] * (span.stop - span.start)
    return paths


def finite_flags(tensors: Sequence[Tensor]) -> Tensor:
    """Returns for each tensor whether it is finite, as a bool tensor of shape `[len(tensors)]`.

    Reads as little as possible: if the norms of `tensors_to_read` are moderate, all are finite.
    Otherwise, and for few tensors, each is read, see `_flags_of_each`.
    """
    if not tensors:
        return tf.zeros([0], tf.bool)
    read = tensors_to_read(tensors)
    if len(tensors) < 3 and len(read) == len(tensors):
        return _flags_of_each(tensors)
    # Not tf.cond, whose branches TensorFlow makes part of the graph: a function with such branches
    # cannot run in a single thread.
    specs = [tf.TensorSpec(t.shape, t.dtype) for t in tensors]
    (flags,) = tf.raw_ops.StatelessIf(
        cond=_sum_of_squares(read) < _MODERATE,
        input=list(tensors),
        Tout=[tf.bool],
        then_branch=_function(lambda *given: tf.ones([len(given)], tf.bool), specs),
        else_branch=_function(lambda *given: _flags_of_each(given), specs),
        output_shapes=[[len(tensors)]],
    )
    return flags


def _function(body: Callable[..., Tensor], specs: Sequence[tf.TensorSpec]) -> ConcreteFunction:
    return tf.function(body, autograph=False).get_concrete_function(*specs)


def _sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """Returns half the sum of the squares of all elements, in float32; nan or inf if one is."""
    squares: list[Tensor] = []
    few: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.dtype.is_complex:
            squares.append(tf.cast(tf.abs(tf.reduce_sum(tensor)), tf.float32))
        elif (tensor.shape.num_elements() or _FEW) < _FEW:
            few.setdefault(tensor.dtype, []).append(tf.reshape(tensor, [-1]))
        else:
            squares.append(_square(tensor))
    squares += [_square(tf.concat(each, 0)) for each in few.values()]
    return tf.add_n(squares)


def _square(tensor: Tensor) -> Tensor:
    if tensor.dtype in (tf.float16, tf.bfloat16):
        tensor = tf.cast(tensor, tf.float32)
    return tf.cast(tf.nn.l2_loss(tensor), tf.float32)


def _flags_of_each(tensors: Sequence[Tensor]) -> Tensor:
    """Returns the flags of `finite_flags` by the sum of each tensor's elements.

    A tensor counts as finite if the sum of its elements is. That reads the tensor once and
    allocates no tensor of its size; half precision is summed in float32. Finite elements whose sum
    overflows (from about 1e30 in float32) count as not finite.
    """
    by_dtype: dict[Any, list[int]] = {}
    sums: list[Tensor] = []
    for tensor in tensors:
        if tensor.dtype in (tf.float16, tf.bfloat16):
            tensor = tf.cast(tensor, tf.float32)
        if tensor.dtype.is_complex:
            total = tf.reduce_sum(tensor)
            total = tf.math.real(total) + tf.math.imag(total)
        else:
            total = tf.reduce_sum(tensor)
        by_dtype.setdefault(total.dtype, []).append(len(sums))
        sums.append(total)
    parts = [tf.math.is_finite(tf.stack([sums[i] for i in places])) for places in by_dtype.values()]
    if len(parts) == 1:
        return parts[0]
    order = [i for places in by_dtype.values() for i in places]
    back = sorted(range(len(order)), key=order.__getitem__)
    return tf.gather(tf.concat(parts, 0), back)
