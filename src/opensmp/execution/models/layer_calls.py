"""Intercepts calls of Keras layers that a step function makes outside of a partitioned model."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf

from opensmp import _private
from opensmp.base.thread_values import ThreadValue
from opensmp.compiler.trace import partition_tags
from opensmp.execution.models.plain_model import calls_are_plain

Taker = Callable[[Any, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""Handles a call: takes a layer, its plain call and the arguments; returns the outputs."""

_takers: list[Taker] = []
_is_taking = ThreadValue(False)


def take_by(taker: Taker) -> None:
    """Sets the handler of layer calls in a step function, outside of a partitioned model."""
    _takers[:] = [taker]


@contextlib.contextmanager
def calls_taken() -> Iterator[None]:
    """Context for tracing a step function: passes layer calls to the handler.

    Calls inside a model that is being traced, symbolic calls and calls of other threads are
    excluded.
    """
    if _is_taking.get():
        yield
        return
    with _is_taking.set_to(True), _private.layer_calls_by(_call):
        yield


def calls_left() -> contextlib.AbstractContextManager[None]:
    """Context for inspecting a model: layer calls are not intercepted."""
    return _is_taking.set_to(False)


def _call(layer: Any, call: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
    if not _is_taking.get() or not _takers or is_inside(args, kwargs):
        return call(layer, *args, **kwargs)
    return _takers[0](layer, functools.partial(call, layer), args, kwargs)


def is_inside(args: tuple[Any, ...], kwargs: Any) -> bool:
    """Whether a call is not one of the step function itself: eager, within a model, or symbolic."""
    return tf.executing_eagerly() or is_inside_keras(args, kwargs)


def is_inside_keras(args: tuple[Any, ...], kwargs: Any) -> bool:
    """Whether a call must run as that of a plain layer: within a trace, stateless, or symbolic."""
    if (
        partition_tags.traced_graph() is not None
        or _private.in_stateless_scope()
        or calls_are_plain()
    ):
        return True
    return any(isinstance(leaf, keras.KerasTensor) for leaf in tf.nest.flatten((args, kwargs)))
