"""A subclass of `tf.IndexedSlices` that survives the boundary of a `tf.function`."""

from __future__ import annotations

from typing import Any

import tensorflow as tf


class NotedSlices(tf.IndexedSlices):
    """`tf.IndexedSlices` with a note, that keep their class when a `tf.function` returns them.

    TensorFlow turns the slices that a function returns into plain ones, unless their spec says
    otherwise.

    Args:
        values: Shape `[rows, ...]`.
        indices: Row indices, shape `[rows]`.
        dense_shape: Shape of the dense tensor; a vector.
        note: Any comparable and hashable value; part of the type.
    """

    _spec: Any

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls._spec = type(f"{cls.__name__}Spec", (_Spec,), {"value_type": property(lambda _: cls)})

    def __init__(self, values: Any, indices: Any, dense_shape: Any, note: Any) -> None:
        super().__init__(values, indices, dense_shape)
        self.note = note

    @property
    def _type_spec(self) -> Any:
        return self._spec(self.note, *super()._type_spec._serialize())


class _Spec(tf.IndexedSlicesSpec):
    def __init__(self, note: Any, *plain: Any) -> None:
        super().__init__(*plain)
        self._note = note

    def _serialize(self) -> tuple[Any, ...]:
        return (self._note, *super()._serialize())

    def _from_components(self, tensors: Any) -> NotedSlices:
        values, indices, dense_shape = tensors
        slices: NotedSlices = self.value_type(values, indices, dense_shape, self._note)
        return slices
