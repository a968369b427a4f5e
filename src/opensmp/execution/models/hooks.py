"""Functions to call when a model has been partitioned: the user's hooks, and internal checks."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from opensmp.errors import StepError

Hook = TypeVar("Hook", bound=Callable[[], Any])

_waiting: list[Callable[[], Any]] = []
_checks: list[Callable[[Any], None]] = []


def register_post_partition_hook(hook: Hook) -> Hook:
    """Decorator: calls the function once, after partitioning and before the first pass runs.

    At that time all variables of the model exist and are placed on their devices, so the function
    may load weights or restore a checkpoint. It runs outside of any graph.

    Args:
        hook: A function without arguments.

    Returns:
        The function, unchanged.

    Raises:
        StepError: `hook` is not callable, or not without arguments.

    Example:
        ```python
        @smp.register_post_partition_hook
        def load():
            model.load_weights("start.weights.h5")
        ```
    """
    if not callable(hook):
        raise StepError(
            "smp.register_post_partition_hook: expected a function without arguments, received "
            f"{hook!r} of type {type(hook).__name__}."
        )
    try:
        inspect.signature(hook).bind()
    except TypeError as error:
        raise StepError(
            "smp.register_post_partition_hook: expected a function without arguments, received "
            f"{hook!r}: {error}. Give its arguments default values, or let it read variables from "
            "around it."
        ) from error
    except ValueError:  # some functions written in C have no signature
        pass
    _waiting.append(hook)
    return hook


def run_post_partition_hooks() -> None:
    """Calls the pending hooks in order of registration, each once."""
    while _waiting:
        _waiting.pop(0)()


@contextlib.contextmanager
def set_aside() -> Iterator[None]:
    """Context in which the pending hooks wait, whatever is partitioned."""
    waiting = list(_waiting)
    _waiting.clear()
    try:
        yield
    finally:
        _waiting[:] = [*waiting, *_waiting]


def clear() -> None:
    """Discards the pending hooks."""
    _waiting.clear()


def check_when_partitioned(check: Callable[[Any], None]) -> None:
    """Registers a check for each model that is partitioned from now on. Idempotent."""
    if check not in _checks:
        _checks.append(check)


def run_checks(model: Any) -> None:
    """Calls the checks of `check_when_partitioned` in order of registration."""
    for check in _checks:
        check(model)
