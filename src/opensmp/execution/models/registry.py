"""All DistributedModels of the program, and which of them hold a layer."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from opensmp import _private
from opensmp.distributed.world import World

Model = Any

_models: weakref.WeakSet[Any] = weakref.WeakSet()


def add(model: Model) -> None:
    """Makes a DistributedModel known."""
    _models.add(model)


def some_wait_for_partitions(here: World) -> bool:
    """Whether there are models that have not been called since `smp.init`."""
    return any(not model._smp_partitions.is_done(here) for model in _models)


def holders_of(layer: Any) -> Callable[[], list[Model]]:
    """What gives the DistributedModels that hold a layer, at any depth; it is not kept alive."""
    reference = weakref.ref(layer)

    def holders() -> list[Model]:
        held = reference()
        return [
            model
            for model in list(_models)
            if any(each is held for each in _private.all_layers(model)[1:])
        ]

    return holders
