"""Gradients that lie in several processes: their norm, clipping by it, whether all are finite."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from opensmp.compiler.lowering.sparse_gradients import scaled
from opensmp.distributed.collectives.reduce import sum_over
from opensmp.distributed.collectives.scalars import scalar

Gradient = Any
Tensor = Any


class Own(NamedTuple):
    """The gradients that this process has, of all those of a replica.

    Attributes:
        gradients: They, each a tensor or `tf.IndexedSlices`.
        positions: The place of each among all.
        num_all: How many there are in all processes together.
        others_are_double: Whether one of another process is of double precision: all processes
            get the same norm.
    """

    gradients: Sequence[Gradient]
    positions: Sequence[int]
    num_all: int
    others_are_double: bool = False


def global_norm(own: Own, ranks: Sequence[int]) -> Tensor:
    """The square root of the sum of all squares of all gradients of a replica.

    Every process contributes the sum of squares of each gradient it has, and which ones these
    are: a gradient that several processes have counts once. The sums are added in the order of
    the gradients, as in one process, so that the result is the same number.

    Args:
        own: The gradients of this process; the squares of `tf.IndexedSlices` are those of
            their rows.
        ranks: The processes of the replica; all of them call it.

    Returns:
        A float32, or a float64 if any process has a gradient of double precision.
    """
    squares = [tf.zeros([], tf.float64)] * own.num_all
    copies = [0.0] * own.num_all
    for position, gradient in zip(own.positions, own.gradients, strict=True):
        values = gradient.values if isinstance(gradient, tf.IndexedSlices) else gradient
        # Half precision would overflow; the squares of complex numbers are those of both parts.
        if values.dtype.is_complex:
            values = tf.abs(values)
        values = tf.cast(values, tf.float64 if values.dtype == tf.float64 else tf.float32)
        squares[position] = tf.cast(tf.reduce_sum(tf.square(values)), tf.float64)
        copies[position] = 1.0
    packed = tf.stack([*squares, *map(tf.constant, map(tf.float64.as_numpy_dtype, copies))])
    (total,) = sum_over([packed], ranks, name="smp.clip_by_global_norm")
    sums, counts = tf.split(total, [own.num_all, own.num_all])
    return tf.sqrt(_in_order(tf.math.divide_no_nan(sums, counts), _dtype(own)))


def clip(own: Own, clip_norm: Any, norm: Tensor) -> list[Gradient]:
    """Scales gradients so that their norm is at most `clip_norm`; infinite norms give NaN."""
    # A number of Python's would be rounded to float32 by the cast.
    is_number = isinstance(clip_norm, (int, float))
    limit = scalar(clip_norm, norm.dtype) if is_number else tf.cast(clip_norm, norm.dtype)
    scale = limit * tf.minimum(1.0 / norm, 1.0 / limit)
    scale += norm - norm  # nothing, or NaN
    return [scaled(gradient, scale) for gradient in own.gradients]


def clipping(
    ranks: Sequence[int],
) -> Callable[[list[Gradient], list[int], int, Any], list[Gradient]] | None:
    """What clips for optimizers with `global_clipnorm`; None if one process has all gradients."""
    if len(ranks) == 1:
        return None

    def clip_own(
        gradients: list[Gradient], places: list[int], num_all: int, clip_norm: Any
    ) -> list[Gradient]:
        own = Own(gradients, places, num_all)
        return clip(own, clip_norm, global_norm(own, ranks))

    return clip_own


def agreement_on_finite(ranks: Sequence[int]) -> Callable[[Tensor], Tensor] | None:
    """What tells whether the gradients of all processes of a replica are finite.

    None if one process has them all. Processes without any gradients call it as well.
    """
    if len(ranks) == 1:
        return None

    def agree(finite: Tensor) -> Tensor:
        not_finite = tf.cast(tf.logical_not(finite), tf.float32)
        (count,) = sum_over([not_finite], ranks, name="the finite check of LossScaleOptimizer")
        return tf.equal(count, 0.0)

    return agree


def _in_order(sums: Tensor, dtype: Any) -> Tensor:
    return tf.reduce_sum(tf.cast(sums, dtype))


def _dtype(own: Own) -> Any:
    found = own.others_are_double or any(map(is_double, own.gradients))
    return tf.float64 if found else tf.float32


def is_double(gradient: Gradient) -> bool:
    """Whether a gradient, of this process or of another, has 64 bits for each real number."""
    return tf.as_dtype(gradient.dtype) in (tf.float64, tf.complex128)
