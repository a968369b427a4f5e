"""Rejects forward-mode derivatives, which a partitioned model does not support."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import tensorflow as tf

from opensmp import _private
from opensmp.compiler.trace.variables import tf_variable
from opensmp.errors import StepError


def refuse_forward_mode(accumulators: Sequence[Any], what: str, values: Iterable[Any]) -> None:
    """Raises StepError if an accumulator watches one of `values`."""
    watched = first_watched(accumulators, values)
    if watched is None:
        return
    raise StepError(
        f"{what} was called under a tf.autodiff.ForwardAccumulator that watches {watched}. "
        "Expected: no forward-mode derivative through a split model, whose derivatives are those "
        "of reverse mode, by a tf.GradientTape. Call the plain Keras model instead, "
        "`model.to_keras()`, under the accumulator; or take the product with a tangent by two "
        "tapes: of `inner.gradient(out, x, output_gradients=u)`, times the tangent and summed, the "
        "gradient with respect to `u`."
    )


def first_watched(accumulators: Sequence[Any], values: Iterable[Any]) -> str | None:
    """Describes the first value that an accumulator watches; None if there is none."""
    for value in values:
        for leaf in tf.nest.flatten(value, expand_composites=True):
            inner = tf_variable(leaf) if hasattr(leaf, "path") else leaf
            if isinstance(inner, tf.Variable):
                name = f"the variable '{getattr(leaf, 'path', leaf.name)}'"
            elif tf.is_tensor(inner):
                # In a graph, an outer tensor is identified by its capture.
                inner, name = tf.convert_to_tensor(inner), f"an input of shape {inner.shape}"
            else:
                continue
            if _private.is_accumulated(accumulators, inner):
                return name
    return None
