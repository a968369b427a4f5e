"""Derivatives in forward mode, which a split model does not have: refused, never left out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import tensorflow as tf

from opensmp import _private
from opensmp.compiler.trace.variables import tf_variable
from opensmp.errors import StepError

Tensor = Any


def refuse_forward_mode(accumulators: Sequence[Any], what: str, values: Iterable[Any]) -> None:
    """Raises an error if an accumulator would need to see how results are computed.

    Args:
        accumulators: `tf.autodiff.ForwardAccumulator`s that are active.
        what: What is called, at the beginning of a sentence.
        values: Nests of tensors and variables that its results are computed from.

    Raises:
        StepError: An accumulator has a derivative of one of them.
    """
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
    """What an accumulator has a derivative of, in words; None if there is nothing."""
    for value in values:
        for leaf in tf.nest.flatten(value, expand_composites=True):
            inner = tf_variable(leaf) if hasattr(leaf, "path") else leaf
            if isinstance(inner, tf.Variable):
                name = f"the variable '{getattr(leaf, 'path', leaf.name)}'"
            elif tf.is_tensor(inner):
                # In a graph a tensor from outside is known by what it is captured as.
                inner, name = tf.convert_to_tensor(inner), f"an input of shape {inner.shape}"
            else:
                continue
            if _private.is_accumulated(accumulators, inner):
                return name
    return None
