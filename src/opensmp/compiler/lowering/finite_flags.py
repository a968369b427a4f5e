"""Whether the numbers that a model computes are finite: what is looked at, and how."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from opensmp.compiler.lowering.segments import Segment
from opensmp.compiler.trace.trace import TracedGraph

Op = Any
Tensor = Any

_CHECKED = (tf.float16, tf.bfloat16, tf.float32, tf.float64, tf.complex64, tf.complex128)


class Activation(NamedTuple):
    """A tensor that a layer, or the caller of the model, gives.

    Attributes:
        tensor: It.
        name: What it is, for messages.
    """

    tensor: Tensor
    name: str


def is_checked(tensor: Tensor) -> bool:
    """Whether a tensor may hold nan or infinity, and its dtype can be looked at."""
    return tensor.dtype in _CHECKED


def activations(traced: TracedGraph, segment: Segment) -> tuple[Activation, ...]:
    """What a segment gets from the caller and what its layers give, in the order of computation.

    A tensor is given by the innermost layer that makes it, if an operation outside of that layer
    reads it. What a layer keeps to itself is left out: to look at everything would cost more, and
    keep TensorFlow from fusing operations.
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
                    continue  # it is looked at where its layer gives it
            if is_result or any(layers[reader] != layer for reader in readers):
                found.append(Activation(tensor, activation_name(traced, layer)))
    return tuple(found)


def activation_name(traced: TracedGraph, layer: str) -> str:
    """What the result of a layer is called.

    Args:
        traced: The traced model.
        layer: Path of the layer; empty for the model.
    """
    owner = f"layer '{layer}'" if layer else f"model '{traced.name}'"
    return f"the activation of {owner}"


def layer_paths(traced: TracedGraph) -> list[str]:
    """For each operation the path of the innermost layer that made it; empty for the model.

    The path is the name of the layer behind those of the layers around it.
    """
    paths = [""] * len(traced.operations)
    names: list[str] = []
    for span in traced.spans:  # those outside come first
        del names[span.depth :]
        names.append(span.layer.name)
        path = "/".join(names)
        paths[span.start : span.stop] = [path] * (span.stop - span.start)
    return paths


def finite_flags(tensors: Sequence[Tensor]) -> Tensor:
    """Of each tensor whether it is finite, one after the other: shape `[len(tensors)]`, bool.

    It is taken to be if the sum of its elements is. That reads the tensor once and makes nothing
    of its size; the sum of half precision is made in float32. Finite elements whose sum
    overflows, from 1e30 or so in float32, count as not finite.
    """
    if not tensors:
        return tf.zeros([0], tf.bool)
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
