"""Optimizer state that is divided over the replicas of a model: who updates which variable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from opensmp.base.types import Gradient


class Shards(Protocol):
    """Divides the updates of variables over replicas that have the same variables."""

    position: int

    def divide(self, variables: Sequence[Any]) -> None:
        """Gives each variable that has none a replica that updates it, with `set_updater`."""

    def share(self, variables: Sequence[Any]) -> None:
        """Copies each variable from the replica that updates it to the others."""

    def clip(
        self, gradients: list[Gradient], places: list[int], num_all: int, clip_norm: Any
    ) -> list[Gradient]:
        """Implements `global_clipnorm` for gradients that only their updaters have.

        The arguments are those of the function that `clip_with` takes.
        """


_shards: Shards | None = None
_UPDATER = "_smp_updater"
_SHARD = "_smp_shard"
_SLOT = "_smp_slot"


def shard_with(shards: Shards | None) -> None:
    """Sets who divides the updates of optimizers; None: each replica updates all variables.

    What was divided by another one before counts as not divided.
    """
    global _shards
    _shards = shards


def shards_now() -> Shards | None:
    """What `shard_with` has set."""
    return _shards


def set_updater(variable: Any, position: int) -> None:
    """Records the position of the replica that updates a variable and holds its slots."""
    setattr(getattr(variable, "_value", variable), _UPDATER, (_shards, position))


def updater_of(variable: Any) -> int | None:
    """The position of the replica that updates a variable; None if all replicas do."""
    shards, position = getattr(getattr(variable, "_value", variable), _UPDATER, (None, None))
    return position if shards is not None and shards is _shards else None


def is_left_to_another(variable: Any) -> bool:
    """Whether another replica updates a variable, and has its slots."""
    updater = updater_of(variable)
    return updater is not None and _shards is not None and updater != _shards.position


def mark_slot(slot: Any) -> None:
    """Records that an optimizer's variable belongs to one trained variable."""
    setattr(getattr(slot, "_value", slot), _SLOT, True)


def is_slot(variable: Any) -> bool:
    """Whether a variable of an optimizer belongs to one trained variable."""
    return hasattr(getattr(variable, "_value", variable), _SLOT)


def set_shard(slot: Any, is_shard: bool) -> None:
    """Sets whether only one replica has the value of a slot; the same in all of them."""
    stored = getattr(slot, "_value", slot)
    if is_shard:
        setattr(stored, _SHARD, True)
    elif hasattr(stored, _SHARD):
        delattr(stored, _SHARD)


def is_shard(variable: Any) -> bool:
    """Whether only one replica has the value of a variable: an optimizer's slot, divided."""
    return hasattr(getattr(variable, "_value", variable), _SHARD)
