"""`smp.scope`: creates a model on the devices where it will be trained."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar, overload

import keras
import tensorflow as tf

from opensmp.api.model.model import DistributedModel
from opensmp.distributed import world
from opensmp.errors import ConfigError

P = ParamSpec("P")
R = TypeVar("R")

Where = Any


class Scope(contextlib.AbstractContextManager["Scope"]):
    """The result of `smp.scope`: a decorator and a context manager."""

    def __init__(self, where: Where) -> None:
        _check(where)
        self._where = where
        self._entered: list[contextlib.ExitStack] = []

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        """Wraps a function so that it runs in the scope and a model it returns becomes distributed.

        Args:
            function: The function to run; it may return a model or any other value.
        """

        @functools.wraps(function)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            with Scope(self._where):
                made = function(*args, **kwargs)
            if self._is_split() and isinstance(made, keras.Model):
                made = DistributedModel.from_keras(made)
            return made

        return wrapper

    def __enter__(self) -> Scope:
        stack = contextlib.ExitStack()
        context = self._context()
        if context is not None:
            stack.enter_context(context)
        self._entered.append(stack)
        return self

    def __exit__(self, *error: Any) -> None:
        self._entered.pop().__exit__(*error)

    def _is_split(self) -> bool:
        """Whether models created in this scope become `DistributedModel`s."""
        return self._where is None and world.is_initialized() and not tf.distribute.has_strategy()

    def _context(self) -> Any:
        where = self._where
        if isinstance(where, tf.distribute.Strategy):
            return where.scope()
        if isinstance(where, str):
            return tf.device(where)
        if where is None:
            if tf.distribute.has_strategy():
                return None
            if world.is_initialized():
                return tf.device("CPU:0")  # they move to the partitions' devices at the first call
            where = [device.name for device in tf.config.list_logical_devices("GPU")]
            if len(where) < 2:
                return None
        return _mirrored(where).scope() if len(where) > 1 else tf.device(where[0])


@overload
def scope(where: Callable[P, R]) -> Callable[P, R]: ...


@overload
def scope(where: str | Sequence[str] | tf.distribute.Strategy | None = None) -> Scope: ...


def scope(where: Any = None) -> Any:
    """Runs a function that creates a model on the devices where the model will be trained.

    Without an argument the device is chosen automatically: after `smp.init` the model is created on
    the host and becomes a `smp.DistributedModel`; otherwise, with several GPUs, it is created in
    the scope of a `tf.distribute.MirroredStrategy`; otherwise on the default device. Inside the
    scope of an active strategy, `smp.scope()` has no effect.

    Args:
        where: None; a `tf.distribute` strategy; a device name; or several device names, on each of
            which `MirroredStrategy` keeps a replica.

    Returns:
        A decorator that is also a context manager. `@smp.scope` without parentheses works.

    Raises:
        ConfigError: `where` has another type, or names a device that does not exist.

    Example:
        ```python
        @smp.scope()
        def make_model():
            return keras.Sequential([keras.Input((8,)), keras.layers.Dense(1)])

        model = make_model()
        other = smp.scope("CPU:0")(make_model)()
        with smp.scope(tf.distribute.MirroredStrategy()):
            third = make_model()
        ```
    """
    if callable(where) and not isinstance(where, tf.distribute.Strategy):
        return Scope(None)(where)
    return Scope(where)


def _mirrored(devices: Sequence[str]) -> Any:
    # On the CPUs of one process, collective operations of several strategies interfere with each
    # other; a reduction on one device uses none.
    on_cpu = all("CPU" in name.upper() for name in devices)
    ops = tf.distribute.ReductionToOneDevice() if on_cpu else None
    return tf.distribute.MirroredStrategy(list(devices), cross_device_ops=ops)


def _check(where: Any) -> None:
    if where is None or isinstance(where, (str, tf.distribute.Strategy)):
        names = [where] if isinstance(where, str) else []
    elif isinstance(where, Sequence) and where and all(isinstance(name, str) for name in where):
        names = list(where)
    else:
        raise ConfigError(
            "smp.scope: expected nothing, a tf.distribute strategy, the name of a device such as "
            f"'GPU:0', or a list of such names; received {where!r} of type {type(where).__name__}."
        )
    if not names:
        return
    there = [device.name for device in tf.config.list_logical_devices()]
    missing = [name for name in names if not any(_is_same(name, each) for each in there)]
    if missing:
        raise ConfigError(
            f"smp.scope: {', '.join(missing)} is not a device of this process; it has "
            f"{', '.join(name.removeprefix('/device:') for name in there)}."
        )


def _is_same(name: str, device: str) -> bool:
    short = name.upper().split("DEVICE:")[-1].strip("/")
    return device.upper().endswith(short if ":" in short else f"{short}:0")
