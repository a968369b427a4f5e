"""Rejects plain Keras models that share layers with a model partitioned over several processes.

Their `fit`, `predict` etc. would compute with variables that have no value in this process. The
error names the call that wraps such a model as a DistributedModel.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Collection, Iterator
from typing import Any

import keras

from opensmp import _private
from opensmp.errors import ElsewhereError
from opensmp.execution.models.plain_model import calls_are_plain

_METHODS = {
    "make_train_function": "training",
    "make_test_function": "evaluating",
    "make_predict_function": "predicting with",
    "quantize": "quantizing",
}

_running: weakref.WeakSet[Any] = weakref.WeakSet()

_INSTALLED = "_smp_refuses_unwrapped"


def refuse_unwrapped_models() -> None:
    """Patches plain Keras models to reject variables owned by other processes. Idempotent."""
    if getattr(keras.Model, _INSTALLED, False):
        return
    for name, doing in _METHODS.items():
        setattr(keras.Model, name, _refusing(getattr(keras.Model, name), doing))
    setattr(keras.Model, _INSTALLED, True)


def trace_anew(moved: Collection[int]) -> None:
    """Makes plain models that have run trace again if their variables have moved.

    Compiled functions keep using the memory that the variables had before. `moved` contains the ids
    of the moved variables.
    """
    for model in list(_running):
        _private.forget_compiled_functions(model, moved)


def _refusing(method: Any, doing: str) -> Any:
    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not calls_are_plain():
            _check(self, doing)
        _running.add(self)
        return method(self, *args, **kwargs)

    return call


def _check(model: Any, doing: str) -> None:
    own = (v for layer in _plain_layers(model) for v in _private.own_variables(layer))
    elsewhere = [variable for variable in own if _is_missing(variable)]
    if not elsewhere:
        return
    first = _private.storage(elsewhere[0])
    raise ElsewhereError(
        f"{doing} model '{model.name}', a plain Keras model of layers that a DistributedModel has "
        f"placed: {len(elsewhere)} of its variables lie in other processes, such as "
        f"{_private.place_of(first)}. Expected: a model that is split as well, whose layers stay "
        f"where they are. Wrap it: smp.DistributedModel.from_keras({model.name})."
    )


def _plain_layers(layer: Any) -> Iterator[Any]:
    """A layer and its nested layers, except those of distributed models, which run on their own."""
    if hasattr(type(layer), "_smp_partitions"):
        return
    yield layer
    for inner in _private.layers_inside(layer):
        yield from _plain_layers(inner)


def _is_missing(variable: Any) -> bool:
    return _private.is_elsewhere(variable) and not _private.is_lent(variable)
