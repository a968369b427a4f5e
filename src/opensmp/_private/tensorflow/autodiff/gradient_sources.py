"""Hooks into `tf.GradientTape` that reject gradient sources and Jacobians."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from opensmp.base.thread_values import ThreadValue
from opensmp.base.types import Tensor

_REFUSAL = "_smp_no_source"
_CHECKS = "_smp_checks_sources"
_JACOBIANS = ("jacobian", "batch_jacobian")


def note_source(tensor: Tensor, error: Exception) -> None:
    """Makes tapes raise an error when asked for a gradient with respect to a tensor."""
    setattr(tensor, _REFUSAL, error)
    check_sources()


def check_sources() -> None:
    """Patches `tf.GradientTape` to check its sources, see `note_source`. Idempotent.

    A tape has no hook for this, and returns None for sources that it does not find.
    """
    owner = tf.GradientTape
    if getattr(owner, _CHECKS, False):
        return
    for name in ("gradient", *_JACOBIANS):
        setattr(owner, name, _looking(getattr(owner, name)))
    setattr(owner, _CHECKS, True)


class _Jacobian:
    """A Jacobian being computed, and the error with which it was refused."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.error: Exception | None = None


_asked: ThreadValue[_Jacobian | None] = ThreadValue(None)


def refuse_jacobian(refusal: Callable[[str], Exception]) -> None:
    """Raises an error if a tape is computing a Jacobian. Needs `check_sources` first.

    TensorFlow computes the rows of a Jacobian in a loop, or by vectorizing each operation. There is
    no public way to detect this, and TensorFlow would replace the raised error by one of its own.
    """
    asked = _asked.get()
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
        asked = _Jacobian(original.__name__)
        try:
            with _asked.set_to(asked):
                return original(self, target, *args, **kwargs)
        except ValueError:  # TensorFlow wraps any error in a ValueError
            if asked.error is None:
                raise
            raise asked.error from None

    return ask
