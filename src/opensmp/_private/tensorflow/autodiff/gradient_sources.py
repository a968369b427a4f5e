"""What a `tf.GradientTape` is asked for: which sources it refuses, and when for a Jacobian."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import tensorflow as tf

Tensor = Any

_REFUSAL = "_smp_no_source"
_CHECKS = "_smp_checks_sources"
_JACOBIANS = ("jacobian", "batch_jacobian")

_asked = threading.local()


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
    for name in ("gradient", *_JACOBIANS):
        setattr(owner, name, _looking(getattr(owner, name)))
    setattr(owner, _CHECKS, True)


class _Jacobian:
    """A Jacobian that is asked for, and with which error it is refused."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.error: Exception | None = None


def refuse_jacobian(refusal: Callable[[str], Exception]) -> None:
    """Raises an error if a tape computes a Jacobian now; it knows after `check_sources`.

    TensorFlow makes all rows of a Jacobian of the operations that compute one, by a loop or by
    rewriting each of them. There is no public question for it, and another error would be raised
    by TensorFlow in place of the one that it meets.

    Args:
        refusal: Takes "jacobian" or "batch_jacobian", and gives the error.
    """
    asked: _Jacobian | None = getattr(_asked, "jacobian", None)
    if asked is not None:
        asked.error = refusal(asked.name)
        raise asked.error


def _looking(original: Any) -> Any:
    @functools.wraps(original)
    def ask(self: Any, target: Any, *args: Any, **kwargs: Any) -> Any:
        sources = [*args[:1], kwargs.get("sources"), kwargs.get("source")]
        for source in tf.nest.flatten(sources):
            error = getattr(source, _REFUSAL, None)
            if error is not None:
                raise error
        if original.__name__ not in _JACOBIANS:
            return original(self, target, *args, **kwargs)
        before = getattr(_asked, "jacobian", None)
        asked = _asked.jacobian = _Jacobian(original.__name__)
        try:
            return original(self, target, *args, **kwargs)
        except ValueError:  # TensorFlow puts one of its own around any
            if asked.error is None:
                raise
            raise asked.error from None
        finally:
            _asked.jacobian = before

    return ask
