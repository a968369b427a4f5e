"""`smp.pretrained_weights`: a model is made with the weights of an earlier one."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import keras

from opensmp.errors import SavingError
from opensmp.saving.gather import together
from opensmp.saving.models.formats import Format, format_of
from opensmp.saving.models.load import load_into
from opensmp.saving.models.same_file import check_same_file

P = ParamSpec("P")
R = TypeVar("R")

_WHAT = "smp.pretrained_weights"


def pretrained_weights(
    path: str | os.PathLike[str], *, optimizer: bool = False
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Gives the model that a function makes the weights that were saved before.

    They go from the file to the variables one after the other: no second model is made, on no
    device. It may stand above or below `smp.scope`: both orders give the same model.

    Args:
        path: What `smp.load_model` reads, of the same architecture. It is looked for when the
            function is called.
        optimizer: Whether the optimizer of a compiled model goes on with its state, and with the
            learning rate that was saved; otherwise it starts anew.

    Returns:
        A decorator.

    Raises:
        SavingError: When the function is called: the file is missing, damaged, or of another
            architecture; or the function did not make a built Keras model.

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
            kind = format_of(path, _WHAT)  # before the work of making a model
            made = function(*args, **kwargs)
            if not isinstance(made, keras.Model):
                raise SavingError(
                    f"{_WHAT}: expected a function that returns a keras.Model; "
                    f"{getattr(function, '__name__', function)!r} returned {type(made).__name__}."
                )
            if kind is Format.JSON:
                raise SavingError(
                    f"{_WHAT}: {os.fspath(path)} is a configuration, not weights. Give the "
                    ".weights.h5 file beside it."
                )
            together(_WHAT, lambda: load_into(made, path, kind, _WHAT, state=optimizer))
            check_same_file(path, _WHAT)
            return made

        return wrapper

    return decorate
