"""Determines through which tensors gradients can flow."""

from __future__ import annotations

import tensorflow as tf

from opensmp.base.types import Tensor


def is_differentiable(tensor: Tensor) -> bool:
    """Returns whether gradients can flow through a tensor of this dtype."""
    return bool(tensor.dtype.is_floating or tensor.dtype.is_complex or tensor.dtype == tf.variant)


def is_differentiable_number(tensor: Tensor) -> bool:
    """Does the same as `is_differentiable`, but excludes `tf.variant` (lists of tensors)."""
    return is_differentiable(tensor) and tensor.dtype != tf.variant
