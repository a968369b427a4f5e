"""Flattens nested arguments and results into tensors and other leaves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from opensmp.base.types import Tensor


@dataclass(frozen=True, eq=False)
class Structure:
    """A nest of lists, tuples, dicts and composite tensors around some leaves.

    Attributes:
        template: The nest itself.
        leaves: Its flat leaves, with composite tensors expanded to their components.
        is_tensor: Whether each leaf is a tensor.
    """

    template: Any
    leaves: tuple[Any, ...]
    is_tensor: tuple[bool, ...]

    @classmethod
    def of(cls, nest: Any) -> Structure:
        """Flattens a nest; arrays and variables become tensors."""
        nest = tf.nest.map_structure(_as_tensor, nest)
        leaves = tuple(tf.nest.flatten(nest, expand_composites=True))
        return cls(nest, leaves, tuple(tf.is_tensor(leaf) for leaf in leaves))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The leaves that are tensors."""
        return tuple(
            leaf for leaf, is_tensor in zip(self.leaves, self.is_tensor, strict=True) if is_tensor
        )

    def pack(self, tensors: Sequence[Tensor]) -> Any:
        """Returns the same nest with its tensors replaced."""
        waiting = iter(tensors)
        leaves = [
            next(waiting) if is_tensor else leaf
            for leaf, is_tensor in zip(self.leaves, self.is_tensor, strict=True)
        ]
        return tf.nest.pack_sequence_as(self.template, leaves, expand_composites=True)

    def signature(self) -> str:
        """Returns a text that is equal for nests of equal structure, specs and other leaves."""
        specs = [
            (leaf.shape.as_list() if leaf.shape.rank is not None else None, leaf.dtype.name)
            if is_tensor
            else ("object", _identity(leaf))
            for leaf, is_tensor in zip(self.leaves, self.is_tensor, strict=True)
        ]
        nest = tf.nest.map_structure(lambda leaf: type(leaf).__name__, self.template)
        return f"{nest}{specs}"


def _as_tensor(leaf: Any) -> Any:
    if isinstance(leaf, keras.Variable):
        return tf.convert_to_tensor(leaf)
    if isinstance(leaf, (np.ndarray, np.generic, tf.Variable)):
        return tf.convert_to_tensor(leaf)
    return leaf


def _identity(leaf: Any) -> Any:
    return leaf if isinstance(leaf, (bool, int, float, str, bytes, type(None))) else id(leaf)
