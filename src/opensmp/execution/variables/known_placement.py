"""Registry of placed variables, shared by all models that use them.

A replica has the value of a placed variable only in the memory of one process. A model made later
from the same layers is planned with these placements fixed, and a new `smp.init` moves the values.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from opensmp.base.types import Variable
from opensmp.compiler.trace.variables import is_keras
from opensmp.distributed.world import World


class _Home(NamedTuple):
    """The placement of a variable."""

    variable: weakref.ref[Any]
    world: weakref.ref[World]
    partition: int


_homes: dict[int, _Home] = {}


def note_homes(world: World, variables: Iterable[Variable], homes: Mapping[int, int]) -> None:
    """Records the placement of the Keras variables among `variables`.

    `homes` maps the id of a variable to its partition.
    """
    for variable in variables:
        key = id(variable)
        if is_keras(variable) and key in homes:
            forget = weakref.ref(variable, lambda _, key=key: _homes.pop(key, None))  # type: ignore[misc]
            _homes[key] = _Home(forget, weakref.ref(world), homes[key])


def known_homes(world: World, variables: Iterable[Variable]) -> dict[int, int]:
    """Maps ids to partitions, for those variables that a model has placed since `smp.init`."""
    found = ((id(variable), _home(variable)) for variable in variables)
    return {key: home.partition for key, home in found if home and home.world() is world}


def placed_before(world: World, variables: Iterable[Variable]) -> list[Variable]:
    """The variables whose placement dates from before the last `smp.init`."""
    found = ((variable, _home(variable)) for variable in variables)
    return [variable for variable, home in found if home and home.world() is not world]


def _home(variable: Variable) -> _Home | None:
    home = _homes.get(id(variable))
    return home if home is not None and home.variable() is variable else None
