"""The split models inside a model: those that its steps call by themselves, in its place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from opensmp import _private
from opensmp.compiler.plan.plan import Plan
from opensmp.distributed.world import World

Model = Any
Tensor = Any

PART = "_smp_part"
"""Where a layer that is no model has the model that is split in its place."""


def nested_models(model: Model) -> list[Model]:
    """The DistributedModels among the layers of a model, at any depth, without the model itself.

    A layer that is no model stands there as the model that is split in its place.
    """
    return list({id(nested): nested for _, nested in _pairs(model)}.values())


def plans_by_layer(model: Model, world: World) -> dict[int, Plan]:
    """Id of each layer of a model that was called by itself since `smp.init` to its plan."""
    return {
        id(layer): nested._smp_partitions.plan
        for layer, nested in _pairs(model)
        if nested._smp_partitions.is_done(world) and nested._smp_partitions.plan is not None
    }


def plans_of_parts(model: Model) -> dict[str, Plan]:
    """Plans of the models in a model that have been called by themselves, by name."""
    found: dict[str, Plan] = {}
    for nested in nested_models(model):
        plan = nested._smp_partitions.plan
        if plan is not None:
            name, number = nested.name, 1
            while name in found:
                number += 1
                name = f"{nested.name}#{number}"
            found[name] = plan
    return found


class PartPlans(Mapping[str, Plan]):
    """The plans of a model that calls its parts and never itself: name of a part to its `Plan`.

    Attributes:
        model: Name of the model.

    Example:
        ```python
        gan.fit(images)
        print(gan.plan)  # a table for each part
        gan.plan["generator"].plot("generator.svg")
        ```
    """

    def __init__(self, model: str, plans: Mapping[str, Plan]) -> None:
        self.model = model
        self._plans = MappingProxyType(dict(plans))

    def __getitem__(self, name: str) -> Plan:
        return self._plans[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._plans)

    def __len__(self) -> int:
        return len(self._plans)

    @property
    def num_partitions(self) -> int:
        """Number of partitions; the same for all parts."""
        return next(iter(self._plans.values())).num_partitions

    def __str__(self) -> str:
        head = f"{self.model}: its steps call {', '.join(self._plans)}, each with a plan of its own"
        return "\n\n".join([head, *map(str, self._plans.values())])

    def __repr__(self) -> str:
        return f"PartPlans({self.model!r}, {list(self._plans)})"


def _pairs(model: Model) -> Iterator[tuple[Any, Model]]:
    for layer in _private.all_layers(model)[1:]:
        nested = vars(layer).get(PART, layer)
        if hasattr(type(nested), "_smp_run") and vars(nested) is not vars(model):
            yield layer, nested
