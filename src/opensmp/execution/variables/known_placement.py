"""Where variables lie that some model has placed: a fact that all models which share them keep.

The value of a placed variable is in the memory of one process of a replica and nowhere else. A
model made later of the same layers is planned around that, and a new `smp.init` moves the value.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from opensmp.compiler.trace.variables import is_keras
from opensmp.distributed.world import World

Variable = Any


class _Home(NamedTuple):
    """Where a variable lies.

    Attributes:
        variable: The variable.
        world: What `smp.init` has made when it was placed.
        partition: The partition.
    """

    variable: weakref.ref[Any]
    world: weakref.ref[World]
    partition: int


_homes: dict[int, _Home] = {}


def note_homes(world: World, variables: Iterable[Variable], homes: Mapping[int, int]) -> None:
    """Notes where variables lie from now on.

    Args:
        world: Devices and configuration.
        variables: Variables of a model; those that are not Keras' are left out.
        homes: Id of variable to partition.
    """
    for variable in variables:
        key = id(variable)
        if is_keras(variable) and key in homes:
            forget = weakref.ref(variable, lambda _, key=key: _homes.pop(key, None))  # type: ignore[misc]
            _homes[key] = _Home(forget, weakref.ref(world), homes[key])


def known_homes(world: World, variables: Iterable[Variable]) -> dict[int, int]:
    """Id to partition of those variables that a model has placed since `smp.init`.

    Args:
        world: Devices and configuration.
        variables: Any variables.
    """
    found = ((id(variable), _home(variable)) for variable in variables)
    return {key: home.partition for key, home in found if home and home.world() is world}


def placed_before(world: World, variables: Iterable[Variable]) -> list[Variable]:
    """Those variables that lie where they were put before the last `smp.init`.

    Args:
        world: Devices and configuration.
        variables: Any variables.
    """
    found = ((variable, _home(variable)) for variable in variables)
    return [variable for variable, home in found if home and home.world() is not world]


def _home(variable: Variable) -> _Home | None:
    home = _homes.get(id(variable))
    return home if home is not None and home.variable() is variable else None
