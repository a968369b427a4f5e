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
    for name in ("gradient", "jacobian", "batch_jacobian"):
        setattr(owner, name, _looking(getattr(owner, name)))
    setattr(owner, _CHECKS, True)


def _looking(original: Any) -> Any:
    @functools.wraps(original)
    def ask(self: Any, target: Any, *args: Any, **kwargs: Any) -> Any:
        sources = [*args[:1], kwargs.get("sources"), kwargs.get("source")]
        for source in tf.nest.flatten(sources):
            error = getattr(source, _REFUSAL, None)
            if error is not None:
                raise error
        return original(self, target, *args, **kwargs)

    return ask
