"""Registry of all DistributedModels of the program, to find those that contain a layer."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from opensmp import _private
from opensmp.base.types import Model
from opensmp.compiler.plan.plan import Plan
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


def plans(here: World) -> list[Plan]:
    """The plans of all models that have been partitioned since `smp.init`."""
    found = (model._smp_partitions.plan for model in _models if model._smp_partitions.is_done(here))
    # Views of a model share its plan.
    return list({id(plan): plan for plan in found if plan is not None}.values())


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
