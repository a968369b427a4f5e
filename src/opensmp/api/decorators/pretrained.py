"""`smp.pretrained_weights`: creates a model with the weights of a saved one."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import keras

from opensmp.errors import SavingError
from opensmp.saving.gather import together
from opensmp.saving.models.formats.formats import format_of
from opensmp.saving.models.load import load_into
from opensmp.saving.models.same_file import check_same_file

P = ParamSpec("P")
R = TypeVar("R")

_WHAT = "smp.pretrained_weights"


def pretrained_weights(
    path: str | os.PathLike[str], *, optimizer: bool = False
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Loads saved weights into the model that a function creates.

    Weights are copied from the file to the variables one at a time: no second model is created on
    any device. It may be placed above or below `smp.scope`; both orders give the same model.

    Args:
        path: A file that `smp.load_model` reads, of a model with the same architecture. It is
            opened when the decorated function is called.
        optimizer: Whether to restore the state and learning rate of the optimizer of a compiled
            model; otherwise the optimizer keeps its initial state.

    Returns:
        A decorator.

    Raises:
        SavingError: When the decorated function is called: the file is missing, damaged, or of
            another architecture; or the function did not return a built Keras model.

    Example:
        ```python
        @smp.scope()
        @smp.pretrained_weights("earlier.h5")
        def make_model():
            return keras.Sequential([keras.Input((8,)), keras.layers.Dense(1)])

        model = make_model()
        same = smp.pretrained_weights("earlier.h5")(make_model)()
        ```
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            kind = format_of(path, _WHAT)  # fail before the model is created
            made = function(*args, **kwargs)
            if not isinstance(made, keras.Model):
                raise SavingError(
                    f"{_WHAT}: expected a function that returns a keras.Model; "
                    f"{getattr(function, '__name__', function)!r} returned {type(made).__name__}."
                )
            if kind.value.weights_of is not None:
                raise SavingError(
                    f"{_WHAT}: {os.fspath(path)} is a configuration, not weights. Give the "
                    ".weights.h5 file beside it."
                )
            together(_WHAT, lambda: load_into(made, path, kind, _WHAT, state=optimizer))
            check_same_file(path, _WHAT)
            return made

        return wrapper

    return decorate
