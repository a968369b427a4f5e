"""Sums of sparse gradients over microbatches, by row if all microbatches have the same rows.

The gradient of a token embedding has a row per token of the batch, so concatenating the gradients
of all microbatches gives the gradient of the batch. A position embedding does not depend on the
batch: each microbatch has the same rows, and the batch has them once. Optimizers such as Adam
square each row, so duplicate rows would change the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from opensmp import _private
from opensmp.base.types import Tensor
from opensmp.compiler.lowering.extraction import needed
from opensmp.compiler.trace.trace import TracedGraph

_OF_THE_SHAPE = ("Shape", "ShapeN", "Size", "Rank")


class SameRows(_private.NotedSlices):
    """`tf.IndexedSlices` with equal indices in all microbatches; `note` identifies the indices."""

    def with_values(self, values: Tensor) -> SameRows:
        """Returns the same rows with other values of the same shape."""
        return SameRows(values, self.indices, self.dense_shape, self.note)


def marked(traced: TracedGraph, gradient: Any) -> Any:
    """Returns a gradient as `SameRows` if its indices do not depend on the batch, else as is."""
    if not isinstance(gradient, tf.IndexedSlices) or _depends(traced, gradient.indices):
        return gradient
    note = f"{traced.name}/{gradient.indices.name}"
    return SameRows(gradient.values, gradient.indices, gradient.dense_shape, note)


def with_values(slices: tf.IndexedSlices, values: Tensor) -> tf.IndexedSlices:
    """Returns the same rows with other values, preserving the kind of slices."""
    if isinstance(slices, SameRows):
        return slices.with_values(values)
    return tf.IndexedSlices(values, slices.indices, slices.dense_shape)


def scaled(gradient: Any, factor: Any) -> Any:
    """Multiplies a gradient, dense or sparse, by a scalar tensor of any floating-point type."""
    if isinstance(gradient, tf.IndexedSlices):
        return with_values(gradient, scaled(gradient.values, factor))
    return gradient * tf.cast(factor, gradient.dtype)


def sum_of_slices(terms: Sequence[tf.IndexedSlices]) -> tf.IndexedSlices:
    """Sums at least one sparse gradient: by row if all have equal rows, else by concatenation."""
    first = terms[0]
    if len(terms) == 1:
        return first
    notes = {each.note if isinstance(each, SameRows) else None for each in terms}
    if None in notes or len(notes) > 1:
        return side_by_side(terms)
    assert isinstance(first, SameRows)
    if all(each.values.shape == first.values.shape for each in terms) and (
        first.values.shape.is_fully_defined()
    ):
        return first.with_values(tf.add_n([each.values for each in terms]))
    # The number of rows depends on the shape of the batch, which may differ by one between
    # microbatches.
    counts = tf.stack([tf.shape(each.indices)[0] for each in terms])

    def added() -> tuple[Tensor, Tensor]:
        return tf.add_n([each.values for each in terms]), first.indices

    def beside() -> tuple[Tensor, Tensor]:
        both = side_by_side(terms)
        return both.values, both.indices

    values, indices = tf.cond(tf.reduce_all(counts == counts[0]), added, beside)
    return tf.IndexedSlices(values, indices, first.dense_shape)


def side_by_side(terms: Sequence[tf.IndexedSlices]) -> tf.IndexedSlices:
    """Sums sparse gradients by concatenation, which may leave duplicate rows."""
    return tf.IndexedSlices(
        tf.concat([each.values for each in terms], 0),
        tf.concat([each.indices for each in terms], 0),
        terms[0].dense_shape,
    )


def _depends(traced: TracedGraph, indices: Tensor) -> bool:
    """Returns whether indices depend on the batch's values, on randomness or on changing state."""
    changing = {id(variable) for variable, _ in traced.updates}
    sources = {tensor.op for tensor in traced.inputs}
    sources |= {v.placeholder.op for v in traced.variables if id(v.variable) in changing}
    stop = {id(t) for t in (*traced.inputs, *(v.placeholder for v in traced.variables))}
    stop |= {id(inner) for _, inner in traced.captures}
    known = stop | {
        id(t)
        for op in traced.graph.get_operations()
        if op.type in _OF_THE_SHAPE
        for t in op.outputs
    }
    if id(indices) in known:
        return indices.op in sources
    operations = needed([indices.op], known, lambda op: False)
    placeholders = traced.sources
    return any(
        _private.is_stateful(op)
        or (op.type == "Placeholder" and op not in placeholders)  # an upstream gradient
        or any(t.op in sources and id(t) in stop for t in op.inputs)
        for op in operations
    )
