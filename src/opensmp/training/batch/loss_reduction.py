"""Determines whether and how a batch's loss is a sum over its microbatches."""

from __future__ import annotations

from typing import Any, Literal

import keras
import tensorflow as tf

from opensmp import _private

Kind = Literal["mean", "sum"]

ROW_BY_ROW = (
    keras.losses.BinaryCrossentropy,
    keras.losses.BinaryFocalCrossentropy,
    keras.losses.CategoricalCrossentropy,
    keras.losses.CategoricalFocalCrossentropy,
    keras.losses.CategoricalHinge,
    keras.losses.CosineSimilarity,
    keras.losses.Hinge,
    keras.losses.Huber,
    keras.losses.KLDivergence,
    keras.losses.LogCosh,
    keras.losses.MeanAbsoluteError,
    keras.losses.MeanAbsolutePercentageError,
    keras.losses.MeanSquaredError,
    keras.losses.MeanSquaredLogarithmicError,
    keras.losses.Poisson,
    keras.losses.SparseCategoricalCrossentropy,
    keras.losses.SquaredHinge,
)
"""Losses that treat each example separately; others may combine the examples of a batch."""

_REDUCTIONS: dict[Any, Kind] = {"sum_over_batch_size": "mean", "mean": "mean", "sum": "sum"}


def kind_of(loss: Any) -> Kind | None:
    """How the Keras loss of a batch follows from those of its microbatches.

    `"mean"`: as their mean, weighted by the number of examples. `"sum"`: as their sum. None:
    neither, or unknown.
    """
    if type(loss) not in ROW_BY_ROW:
        return None
    config = loss.get_config()
    if config.get("axis", -1) != -1 or config.get("ignore_class") is not None:
        return None
    return _REDUCTIONS.get(loss.reduction)


def given_kind(given: Any) -> Kind | None:
    """Like `kind_of`, for `compile`'s `loss` argument: one loss or a nest, as names or objects."""
    kinds = {_kind_of_leaf(leaf) for leaf in tf.nest.flatten(given) if leaf is not None}
    return kinds.pop() if len(kinds) == 1 else None


def _kind_of_leaf(leaf: Any) -> Kind | None:
    if isinstance(leaf, str):
        if leaf in ("crossentropy", "ce"):
            return "mean"
        try:
            leaf = keras.losses.get(leaf)
        except ValueError:  # Keras reports the error
            return None
    if isinstance(leaf, keras.losses.Loss):
        return kind_of(leaf)
    return "mean" if any(leaf is kind().fn for kind in ROW_BY_ROW) else None


def outputs_allow_it(outputs: Any) -> bool:
    """Whether outputs have an axis in addition to the batch axis, and no mask.

    With a mask, the loss is the mean over the unmasked entries of the whole batch.
    """
    return all(
        isinstance(leaf, tf.Tensor)
        and leaf.shape.rank is not None
        and leaf.shape.rank >= 2
        and _private.get_mask(leaf) is None
        for leaf in tf.nest.flatten(outputs)
        if leaf is not None
    )
