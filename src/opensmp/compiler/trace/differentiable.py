"""Through which tensors gradients can flow."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

Tensor = Any


def is_differentiable(tensor: Tensor) -> bool:
    """Whether gradients can flow through a tensor of this dtype."""
    return bool(tensor.dtype.is_floating or tensor.dtype.is_complex or tensor.dtype == tf.variant)


def is_differentiable_number(tensor: Tensor) -> bool:
    """The same, for tensors of numbers alone: a `tf.variant` stands for a list of tensors."""
    return is_differentiable(tensor) and tensor.dtype != tf.variant
