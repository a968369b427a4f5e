"""What stands in a process for the gradient of a variable of another process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from opensmp import _private
from opensmp.graph.structure import Structure

Gradient = Any
Tensor = Any


class KeptBy(NamedTuple):
    """In place of a tensor that another process of the replica keeps: its position there."""

    process: int


class Elsewhere(_private.NotedSlices):
    """Stands for a gradient that another process has: slices without rows, which take no memory.

    What is computed of it, such as `gradient / 2`, is elsewhere as well. TensorFlow's own
    functions take it for slices, of which all rows of the gradient are zero.
    """

    @classmethod
    def of(cls, gradient: Gradient, process: int, shape: Any = None) -> Elsewhere:
        """Stands for a gradient.

        Args:
            gradient: Tensor or `tf.IndexedSlices`, of which only shape and dtype are known here.
            process: The position of the process that has it, in its replica.
            shape: Its shape, where it is known from the variable; that of a sparse gradient or
                of a second derivative may not be known.
        """
        known = gradient.shape if shape is None else shape
        return cls._shaped([size or 1 for size in known], gradient.dtype, process)

    @classmethod
    def _shaped(cls, shape: list[int], dtype: Any, process: int) -> Elsewhere:
        return cls(
            values=tf.zeros([0, *shape[1:]], dtype),
            indices=tf.zeros([0], tf.int32),
            dense_shape=tf.constant(shape, tf.int32),
            note=process,
        )

    @property
    def process(self) -> int:
        """The position of the process that has the gradient, in its replica."""
        process: int = self.note
        return process

    def _with(self, other: Any = 0.0) -> Elsewhere:
        shape = other.shape if hasattr(other, "shape") else np.shape(other)
        both = tf.broadcast_static_shape(self.shape, tf.TensorShape(shape))
        if both.rank is None or both == self.shape:
            return self
        return self._shaped([size or 1 for size in both], self.dtype, self.process)

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __pow__ = _with

    def __neg__(self) -> Elsewhere:
        return self

    def __abs__(self) -> Elsewhere:
        return self


def pack(parts: Structure, values: Sequence[Tensor | KeptBy], shape: Any = None) -> Gradient:
    """The gradient whose tensors have these values.

    Args:
        parts: The tensors of a leaf, and how to put them together.
        values: What a process has of them.
        shape: Of the variable, where it is known.

    Returns:
        As the leaf; what stands for it if another process keeps it.
    """
    keeper = next((value for value in values if isinstance(value, KeptBy)), None)
    if keeper is None:
        return parts.pack(values)
    return Elsewhere.of(parts.template, keeper.process, shape)


def is_elsewhere(gradient: Gradient) -> bool:
    """Whether this stands for a gradient that another process has.

    What TensorFlow made of `Elsewhere`, such as a cast, is plain slices that have no rows.
    """
    return isinstance(gradient, tf.IndexedSlices) and gradient.values.shape[:1] == [0]
