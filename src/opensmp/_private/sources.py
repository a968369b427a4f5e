"""Sources of gradients: tensors with respect to which a tape may not be asked."""

from __future__ import annotations

import functools
from typing import Any

import tensorflow as tf

Tensor = Any

_REFUSAL = "_smp_no_source"
_CHECKS = "_smp_checks_sources"


def note_source(tensor: Tensor, error: Exception) -> None:
    """Has tapes raise an error where they are asked for a gradient with respect to a tensor.

    Args:
        tensor: A tensor of a graph.
        error: What is raised.
    """
    setattr(tensor, _REFUSAL, error)
    check_sources()


def check_sources() -> None:
    """Has `tf.GradientTape` look at what it is asked for, see `note_source`. Idempotent.

    A tape knows no hook for it, and gives None for what it does not find.
    """
    owner = tf.GradientTape
    if getattr(owner, _CHECKS, False):
        return
    original = owner.gradient

    @functools.wraps(original)
    def gradient(self: Any, target: Any, sources: Any, *args: Any, **kwargs: Any) -> Any:
        for source in tf.nest.flatten(sources):
            error = getattr(source, _REFUSAL, None)
            if error is not None:
                raise error
        return original(self, target, sources, *args, **kwargs)

    setattr(owner, "gradient", gradient)  # noqa: B010
    setattr(owner, _CHECKS, True)
