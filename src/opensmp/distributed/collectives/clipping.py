"""Global norm, clipping and finiteness of gradients that are split over processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from opensmp.base.types import Gradient, Tensor
from opensmp.compiler.lowering.sparse_gradients import scaled
from opensmp.distributed.collectives.reduce import all_reduce
from opensmp.distributed.collectives.scalars import scalar


class Own(NamedTuple):
    """The gradients that this process holds, of all those of a replica.

    Attributes:
        gradients: Each a tensor or `tf.IndexedSlices`.
        positions: Index of each among all gradients.
        num_all: Number of gradients of all processes together.
        others_are_double: Whether another process has a gradient of double precision, which decides
            the dtype of the norm in all processes.
    """

    gradients: Sequence[Gradient]
    positions: Sequence[int]
    num_all: int
    others_are_double: bool = False


def global_norm(own: Own, ranks: Sequence[int]) -> Tensor:
    """The square root of the sum of squares of all gradients of a replica.

    Each process contributes the sum of squares of each gradient that it holds. A gradient held by
    several processes counts once. The sums are added in the order of the gradients, as in one
    process, so that the result is the same.

    Returns:
        A float32, or a float64 if any process has a gradient of double precision.
    """
    squares = [tf.zeros([], tf.float64)] * own.num_all
    copies = [0.0] * own.num_all
    for position, gradient in zip(own.positions, own.gradients, strict=True):
        values = gradient.values if isinstance(gradient, tf.IndexedSlices) else gradient
        # Half precision would overflow; a complex number contributes the squares of both parts.
        if values.dtype.is_complex:
            values = tf.abs(values)
        values = tf.cast(values, tf.float64 if values.dtype == tf.float64 else tf.float32)
        squares[position] = tf.cast(tf.reduce_sum(tf.square(values)), tf.float64)
        copies[position] = 1.0
    packed = tf.stack([*squares, *map(tf.constant, map(tf.float64.as_numpy_dtype, copies))])
    (total,) = all_reduce([packed], ranks, name="smp.clip_by_global_norm")
    sums, counts = tf.split(total, [own.num_all, own.num_all])
    found = own.others_are_double or any(map(is_double, own.gradients))
    in_order = tf.cast(tf.math.divide_no_nan(sums, counts), tf.float64 if found else tf.float32)
    return tf.sqrt(tf.reduce_sum(in_order))


def clip(own: Own, clip_norm: Any, norm: Tensor) -> list[Gradient]:
    """Scales gradients so that their norm is at most `clip_norm`; infinite norms give NaN."""
    # The cast would round a Python number to float32 first.
    is_number = isinstance(clip_norm, (int, float))
    limit = scalar(clip_norm, norm.dtype) if is_number else tf.cast(clip_norm, norm.dtype)
    scale = limit * tf.minimum(1.0 / norm, 1.0 / limit)
    scale += norm - norm  # adds 0, or NaN if the norm is not finite
    return [scaled(gradient, scale) for gradient in own.gradients]


def clipping(
    ranks: Sequence[int],
) -> Callable[[list[Gradient], list[int], int, Any], list[Gradient]] | None:
    """Clip function for optimizers with `global_clipnorm`; None if there is only one process."""
    if len(ranks) == 1:
        return None

    def clip_own(
        gradients: list[Gradient], places: list[int], num_all: int, clip_norm: Any
    ) -> list[Gradient]:
        own = Own(gradients, places, num_all)
        return clip(own, clip_norm, global_norm(own, ranks))

    return clip_own


def agreement_on_finite(ranks: Sequence[int]) -> Callable[[Tensor], Tensor] | None:
    """Function that tells whether the gradients of all processes of a replica are finite.

    None if there is only one process. Processes without gradients call the function as well.
    """
    if len(ranks) == 1:
        return None

    def agree(finite: Tensor) -> Tensor:
        not_finite = tf.cast(tf.logical_not(finite), tf.float32)
        (count,) = all_reduce([not_finite], ranks, name="the finite check of LossScaleOptimizer")
        return tf.equal(count, 0.0)

    return agree


def is_double(gradient: Gradient) -> bool:
    """Whether a gradient, of this process or of another, has 64 bits per real number."""
    return tf.as_dtype(gradient.dtype) in (tf.float64, tf.complex128)
