"""What stands in a process for the gradient of a variable of another process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from opensmp import _private
from opensmp.compiler.trace.structure import Structure
from opensmp.errors import ElsewhereError

Gradient = Any
Tensor = Any


class KeptBy(NamedTuple):
    """In place of a tensor that another process of the replica keeps.

    Attributes:
        process: Its position in the replica.
        shape: Of the variable that it is the gradient of, or of some of its rows.
    """

    process: int
    shape: tuple[int, ...] | None = None


_OF_OTHERS = "_smp_of_others"


class Sparse(NamedTuple):
    """That a gradient consists of rows.

    Attributes:
        indices: Type of their indices.
    """

    indices: tf.DType


class _Note(NamedTuple):
    process: int
    shape: tuple[int, ...]
    sparse: Sparse | None


class Elsewhere(_private.NotedSlices):
    """Stands for a gradient that another process has: slices without rows, which take no memory.

    What is computed of it, such as `gradient / 2`, is elsewhere as well. TensorFlow's own
    functions take it for slices; what needs its value is an error.
    """

    def __init__(self, values: Any, indices: Any, dense_shape: Any, note: Any) -> None:
        super().__init__(values, indices, dense_shape, note)
        setattr(self.indices, _OF_OTHERS, True)  # what TensorFlow makes of it has them as well

    @classmethod
    def of(
        cls, gradient: Gradient, process: int, shape: tuple[int, ...] | None = None
    ) -> Elsewhere:
        """Stands for a gradient.

        Args:
            gradient: Tensor or `tf.IndexedSlices`, of which only shape and dtype are known here.
            process: The position of the process that has it, in its replica.
            shape: That of the whole gradient, if it does not know it itself.
        """
        sparse = None
        if isinstance(gradient, Elsewhere):
            sparse = gradient.sparse
        elif isinstance(gradient, tf.IndexedSlices):
            sparse = Sparse(gradient.indices.dtype)
        if shape is None or (sparse is None and gradient.shape.is_fully_defined()):
            shape = tuple(size or 1 for size in gradient.shape)
        return cls._of_note(_Note(process, shape, sparse), gradient.dtype)

    @classmethod
    def _of_note(cls, note: _Note, dtype: Any) -> Elsewhere:
        return cls(
            values=tf.zeros([0, *note.shape[1:]], dtype),
            indices=tf.zeros([0], tf.int32),
            dense_shape=tf.constant(note.shape, tf.int32),
            note=note,
        )

    @property
    def shape(self) -> tf.TensorShape:
        """The static shape, which TensorFlow forgets of slices that come out of a function."""
        note: _Note = self.note
        return tf.TensorShape(note.shape)

    @property
    def process(self) -> int:
        """The position of the process that has the gradient, in its replica."""
        note: _Note = self.note
        return note.process

    @property
    def sparse(self) -> Sparse | None:
        """That the gradient consists of rows; None: it is a tensor."""
        note: _Note = self.note
        return note.sparse

    def __tf_tensor__(self, dtype: Any = None, name: Any = None) -> Any:
        raise ElsewhereError(_not_here(f"rank {self.process} of the replica (smp.pp_rank)"))

    def _with(self, other: Any = 0.0) -> Elsewhere:
        shape = other.shape if hasattr(other, "shape") else np.shape(other)
        both = tf.broadcast_static_shape(self.shape, tf.TensorShape(shape))
        if both.rank is None or both == self.shape:
            return self
        note: _Note = self.note
        return self._of_note(note._replace(shape=tuple(size or 1 for size in both)), self.dtype)

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __pow__ = _with

    def __neg__(self) -> Elsewhere:
        return self

    def __abs__(self) -> Elsewhere:
        return self


def pack(parts: Structure, values: Sequence[Tensor | KeptBy]) -> Gradient:
    """The gradient whose tensors have these values.

    Args:
        parts: The tensors of a leaf, and how to put them together.
        values: What a process has of them.

    Returns:
        As the leaf; what stands for it if another process keeps it.
    """
    keeper = next((value for value in values if isinstance(value, KeptBy)), None)
    if keeper is None:
        return parts.pack(values)
    return Elsewhere.of(parts.template, keeper.process, keeper.shape)


def is_elsewhere(gradient: Gradient) -> bool:
    """Whether this stands for a gradient that another process has.

    What TensorFlow made of `Elsewhere`, such as a cast, is plain slices that have no rows.
    """
    return isinstance(gradient, tf.IndexedSlices) and gradient.values.shape[:1] == [0]


def _not_here(where: str) -> str:
    return (
        f"The value of a gradient is needed in a process that does not have it; {where} does. "
        "Expected: gradients that are computed with in a tf.function, together with the smp.step "
        "function that gives them, or in a train_step: values are sent there. smp.allreduce and "
        "smp.clip_by_global_norm, and the optimizer, take them as they are everywhere."
    )


def _refuse_without_rows(
    value: Any, dtype: Any = None, name: Any = None, as_ref: bool = False
) -> Any:
    """TensorFlow would take what it made of a gradient of another process for zeros."""
    if is_elsewhere(value) and hasattr(value.indices, _OF_OTHERS):
        raise ElsewhereError(_not_here("another rank"))
    return NotImplemented


tf.register_tensor_conversion_function(tf.IndexedSlices, _refuse_without_rows, priority=50)
