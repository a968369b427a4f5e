"""Placeholder for a gradient owned by another process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from opensmp import _private
from opensmp.base.types import Gradient, Tensor
from opensmp.compiler.trace.structure import Structure
from opensmp.errors import ElsewhereError


class OwnedBy(NamedTuple):
    """Replaces a tensor that another process of the replica owns.

    Attributes:
        process: Position of the owner in the replica.
        shape: Shape of the variable whose gradient, or rows of a gradient, the tensor is.
    """

    process: int
    shape: tuple[int, ...] | None = None


_OF_OTHERS = "_smp_of_others"


class Sparse(NamedTuple):
    """Marks a gradient as sparse (`tf.IndexedSlices`), with indices of this dtype."""

    indices: tf.DType


class Note(NamedTuple):
    """What a placeholder knows; see `RemoteGradient`."""

    process: int
    shape: tuple[int, ...]
    sparse: Sparse | None


class RemoteGradient(_private.NotedSlices):
    """Placeholder for another process's gradient: slices without rows, which take no memory.

    Arithmetic on it, such as `gradient / 2`, returns a `RemoteGradient`. TensorFlow's functions
    treat it as `tf.IndexedSlices`; an operation that needs its value raises an error.
    """

    def __init__(self, values: Any, indices: Any, dense_shape: Any, note: Any) -> None:
        super().__init__(values, indices, dense_shape, note)
        setattr(self.indices, _OF_OTHERS, True)  # kept on slices that TensorFlow derives

    @classmethod
    def of(
        cls, gradient: Gradient, process: int, shape: tuple[int, ...] | None = None
    ) -> RemoteGradient:
        """Creates the placeholder of a gradient, of which only shape and dtype are used."""
        return cls.of_note(_note_of(gradient, process, shape), gradient.dtype)

    @classmethod
    def of_note(cls, note: Note, dtype: Any) -> RemoteGradient:
        """Creates a placeholder of this dtype."""
        return cls(
            values=tf.zeros([0, *note.shape[1:]], dtype),
            indices=tf.zeros([0], tf.int32),
            dense_shape=tf.constant(note.shape, tf.int32),
            note=note,
        )

    @property
    def shape(self) -> tf.TensorShape:
        """The static shape, which slices returned by a function otherwise lose."""
        note: Note = self.note
        return tf.TensorShape(note.shape)

    @property
    def process(self) -> int:
        """Position in the replica of the process that owns the gradient."""
        note: Note = self.note
        return note.process

    @property
    def sparse(self) -> Sparse | None:
        """Set if the gradient is `tf.IndexedSlices`; None if it is a tensor."""
        note: Note = self.note
        return note.sparse

    def __tf_tensor__(self, dtype: Any = None, name: Any = None) -> Any:
        raise ElsewhereError(_not_here(f"rank {self.process} of the replica (smp.pp_rank)"))

    def _with(self, other: Any = 0.0) -> RemoteGradient:
        shape = other.shape if hasattr(other, "shape") else np.shape(other)
        both = tf.broadcast_static_shape(self.shape, tf.TensorShape(shape))
        if both.rank is None or both == self.shape:
            return self
        note: Note = self.note
        return self.of_note(note._replace(shape=tuple(size or 1 for size in both)), self.dtype)

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __pow__ = _with

    def __neg__(self) -> RemoteGradient:
        return self

    def __abs__(self) -> RemoteGradient:
        return self


Made = dict[tuple[Note, Any], RemoteGradient]
"""Placeholders by note and dtype."""


def pack(
    parts: Structure, values: Sequence[Tensor | OwnedBy], made: Made | None = None
) -> Gradient:
    """Assembles a gradient from its tensors' values; a `RemoteGradient` if another owns it.

    Args:
        parts: The gradient.
        values: The values of its tensors.
        made: Placeholders to use again, such as those of other microbatches; new ones are added.
    """
    keeper = next((value for value in values if isinstance(value, OwnedBy)), None)
    if keeper is None:
        return parts.pack(values)
    gradient = parts.template
    key = _note_of(gradient, keeper.process, keeper.shape), gradient.dtype
    made = {} if made is None else made
    if key not in made:
        made[key] = RemoteGradient.of_note(*key)
    return made[key]


def _note_of(gradient: Gradient, process: int, shape: tuple[int, ...] | None) -> Note:
    """See `RemoteGradient.of`."""
    sparse = None
    if isinstance(gradient, RemoteGradient):
        sparse = gradient.sparse
    elif isinstance(gradient, tf.IndexedSlices):
        sparse = Sparse(gradient.indices.dtype)
    if shape is None or (sparse is None and gradient.shape.is_fully_defined()):
        shape = tuple(size or 1 for size in gradient.shape)
    return Note(process, shape, sparse)


def is_elsewhere(gradient: Gradient) -> bool:
    """Whether `gradient` is the placeholder of a gradient owned by another process.

    Recognises slices by having no rows, because TensorFlow operations, such as a cast, turn an
    `RemoteGradient` into plain `tf.IndexedSlices`.
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
    """Prevents TensorFlow from converting slices derived from a `RemoteGradient` to zeros."""
    if is_elsewhere(value) and hasattr(value.indices, _OF_OTHERS):
        raise ElsewhereError(_not_here("another rank"))
    return NotImplemented


tf.register_tensor_conversion_function(tf.IndexedSlices, _refuse_without_rows, priority=50)
