"""Gradients of one segment, built beside its forward operations in the same graph."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from opensmp import _private
from opensmp.base.types import Op, Tensor
from opensmp.compiler.lowering.extraction import needed
from opensmp.compiler.lowering.segments import Segment
from opensmp.compiler.lowering.sparse_gradients import SameRows, marked
from opensmp.compiler.recomputation.shorter_reads import shorten_reads
from opensmp.compiler.trace.differentiable import is_differentiable
from opensmp.compiler.trace.trace import TracedGraph


@dataclass(frozen=True, eq=False)
class SegmentGradient:
    """Symbolic gradients of some outputs of a segment.

    Attributes:
        outputs: The outputs that are differentiated.
        upstream: A placeholder for the upstream gradient of each output.
        wrt: Inputs and variables of the segment.
        gradients: For each of `wrt`, a tensor, `tf.IndexedSlices`, or None if no path connects it
            with the outputs.
    """

    outputs: tuple[Tensor, ...]
    upstream: tuple[Tensor, ...]
    wrt: tuple[Tensor, ...]
    gradients: tuple[Any, ...]

    @property
    def flat(self) -> tuple[Tensor, ...]:
        """The gradients' tensors; sparse ones as values, indices and dense shape."""
        return tuple(t for gradient in self.gradients for t in components(gradient))

    def pack(self, tensors: Iterable[Tensor]) -> list[Any]:
        """Packs tensors in the order of `flat` into the structure of `gradients`."""
        waiting = iter(tensors)
        packed: list[Any] = []
        for gradient in self.gradients:
            parts = [next(waiting) for _ in components(gradient)]
            if isinstance(gradient, SameRows):
                shape = parts[2] if len(parts) > 2 else None
                packed.append(SameRows(parts[0], parts[1], shape, gradient.note))
            elif isinstance(gradient, tf.IndexedSlices):
                packed.append(tf.IndexedSlices(*parts))
            else:
                packed.append(parts[0] if parts else None)
        return packed


def components(gradient: Any) -> list[Tensor]:
    """Returns the tensors of a gradient: none, one, or those of `tf.IndexedSlices`."""
    if gradient is None:
        return []
    if isinstance(gradient, tf.IndexedSlices):
        parts = [gradient.values, gradient.indices]
        return parts if gradient.dense_shape is None else [*parts, gradient.dense_shape]
    return [gradient]


def reached_from(traced: TracedGraph, leaves: Collection[Tensor]) -> frozenset[Op]:
    """Returns the forward operations through which a gradient can flow back to `leaves`."""
    sources = {tensor.op for tensor in leaves}
    reached: set[Op] = set(sources)
    for op in traced.operations:
        if op not in reached and any(t.op in reached and is_differentiable(t) for t in op.inputs):
            reached.add(op)
    return frozenset(reached)


def differentiate(
    traced: TracedGraph,
    segment: Segment,
    outputs: Sequence[Tensor],
    wrt: Sequence[Tensor],
    feeds: Sequence[Tensor] = (),
    dense: bool = False,
) -> SegmentGradient:
    """Adds the gradients of `outputs` with respect to `wrt` to the graph.

    Only the segment itself is differentiated: its inputs count as constants.
    """
    with traced.graph.as_default():
        upstream = []
        for tensor in outputs:
            placeholder = tf.compat.v1.placeholder(
                tensor.dtype, tensor.shape, name=f"upstream_{segment.index}"
            )
            _private.copy_handle_data(tensor, placeholder)
            upstream.append(placeholder)
        gradients: list[Any] = [None] * len(wrt)
        if outputs and wrt:
            gradients = tf.gradients(
                list(outputs),
                list(wrt),
                grad_ys=upstream,
                stop_gradients=[
                    *segment.inputs,
                    *segment.variables,
                    *segment.captures,
                    *feeds,
                ],
                name=f"gradients_{segment.index}",
            )
        if dense:
            gradients = [None if g is None else tf.convert_to_tensor(g) for g in gradients]
        gradients = [marked(traced, gradient) for gradient in gradients]
    found = SegmentGradient(tuple(outputs), tuple(upstream), tuple(wrt), tuple(gradients))
    if not dense:  # dense gradients may be differentiated again, through all that they read
        boundary = _boundary(segment, found)
        operations = needed([t.op for t in found.flat], boundary, lambda op: False)
        shorten_reads(traced.graph, operations, set(traced.operations))
    return found


def residuals(
    traced: TracedGraph, segment: Segment, gradient: SegmentGradient
) -> tuple[Tensor, ...]:
    """Returns the forward tensors that the backward pass needs and does not recompute.

    These are the tensors that depend on activations or on state such as random seeds. Tensors that
    depend on weights alone (such as a kernel cast to half precision) are recomputed, and so are the
    outputs of the operations in `repeated`. If only the gradients need a shape or another integer
    of an activation, that integer is kept instead of the activation.
    """
    boundary = _boundary(segment, gradient)
    again = repeated(segment, gradient)
    forward = set(segment.operations)
    kept = active_operations(traced, segment)
    waits = {t.op for t in gradient.upstream}
    backward = needed([t.op for t in gradient.flat], boundary, lambda op: False)
    small: set[Op] = set()
    for op in backward:
        if op in forward:
            continue
        if any(t.op in waits for t in op.inputs):
            waits.add(op)
        elif (
            op.inputs
            and all(t.dtype.is_integer for t in op.outputs)
            and all(t.op in kept or t.op in small or id(t) in boundary for t in op.inputs)
        ):
            small.add(op)
    found: dict[int, Tensor] = {}
    seen: set[Op] = set()
    stack = [t for t in gradient.flat if id(t) not in boundary]
    while stack:
        tensor = stack.pop()
        if id(tensor) in boundary:
            continue
        taken = tensor.op in kept and tensor.op in forward and tensor.op not in again
        if taken or tensor.op in small:
            found[id(tensor)] = tensor
        elif tensor.op not in seen:
            seen.add(tensor.op)
            stack.extend(tensor.op.inputs)
    return tuple(found.values())


# TensorFlow's oneDNN kernels for these gradients need the workspace of the forward operation and
# are selected only if it is in the same function. The fallback kernels are slower by up to ten
# times the forward operation, and may break ties differently.
_NEEDS_FORWARD = {"MaxPoolGrad": "MaxPool", "MaxPool3DGrad": "MaxPool3D", "LRNGrad": "LRN"}


def repeated(segment: Segment, gradient: SegmentGradient) -> frozenset[Op]:
    """Returns the forward operations that the backward pass runs again beside their gradients."""
    forward = set(segment.operations)
    boundary = _boundary(segment, gradient)
    backward = needed([t.op for t in gradient.flat], boundary, lambda op: False)
    return frozenset(
        t.op
        for op in backward
        if op.type in _NEEDS_FORWARD and op not in forward
        for t in op.inputs
        if t.op.type == _NEEDS_FORWARD[op.type] and t.op in forward
    )


def active_operations(traced: TracedGraph, segment: Segment) -> frozenset[Op]:
    """Returns the segment's forward operations that depend on activations or state."""
    state = {id(variable) for variable, _ in traced.updates}
    roots = {t.op for t in segment.inputs}
    roots |= {v.placeholder.op for v in traced.variables if id(v.variable) in state}
    members = set(segment.operations)
    kept: set[Op] = set()
    for op in _with_replicated(segment):
        if (op in members and _private.is_stateful(op)) or any(
            t.op in roots or t.op in kept for t in op.inputs
        ):
            kept.add(op)
    return frozenset(kept)


def _with_replicated(segment: Segment) -> list[Op]:
    stop = {id(t) for t in (*segment.inputs, *segment.variables, *segment.captures)}
    return needed(segment.operations, stop, lambda op: False)


def _boundary(segment: Segment, gradient: SegmentGradient) -> frozenset[int]:
    tensors = (*segment.inputs, *segment.variables, *segment.captures, *gradient.upstream)
    return frozenset(id(t) for t in tensors)
