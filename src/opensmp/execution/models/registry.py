"""Registry of all DistributedModels of the program, to find those that contain a layer."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from opensmp import _private
from opensmp.base.types import Model
from opensmp.distributed.world import World

_models: weakref.WeakSet[Any] = weakref.WeakSet()


def add(model: Model) -> None:
    """Registers a DistributedModel, without keeping it alive."""
    _models.add(model)


def layer_names() -> set[str]:
    """Returns the names of all layers of all DistributedModels."""
    return {layer.name for model in list(_models) for layer in _private.all_layers(model)}


def some_wait_for_partitions(here: World) -> bool:
    """Whether some model has not been called since `smp.init`."""
    return any(not model._smp_partitions.is_done(here) for model in _models)


def holders_of(layer: Any) -> Callable[[], list[Model]]:
    """Returns a function that lists the DistributedModels containing a layer, at any depth.

    The function does not keep the layer alive.
    """
    reference = weakref.ref(layer)

    def holders() -> list[Model]:
        held = reference()
        return [
            model
            for model in list(_models)
            if any(each is held for each in _private.all_layers(model)[1:])
        ]

    return holders
