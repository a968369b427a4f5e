"""The partitioned models inside a model, which its steps call instead of the model itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from opensmp import _private
from opensmp.base.types import Model
from opensmp.compiler.plan.plan import Plan
from opensmp.distributed.world import World

PART = "_smp_part"
"""Attribute of a layer that is not a model: the model that is partitioned in its place."""


def nested_models(model: Model) -> list[Model]:
    """The DistributedModels among the layers of a model, at any depth, without the model itself.

    A layer that is not a model is represented by the model that is partitioned in its place.
    """
    return list({id(nested): nested for _, nested in _pairs(model)}.values())


def plans_by_layer(model: Model, world: World) -> dict[int, Plan]:
    """Maps the id of each nested layer that was called on its own since `smp.init` to its plan."""
    return {
        id(layer): nested._smp_partitions.plan
        for layer, nested in _pairs(model)
        if nested._smp_partitions.is_done(world) and nested._smp_partitions.plan is not None
    }


def plans_of_parts(model: Model) -> dict[str, Plan]:
    """Maps names to plans, for the nested models that have been called on their own."""
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
    """Plans of a model whose steps call only its parts: maps the name of a part to its `Plan`.

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
