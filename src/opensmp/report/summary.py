"""Which partition, and which device, each layer of a model is on: the end of `model.summary()`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from opensmp.plan.plan import Plan
from opensmp.runtime.world import World

_AGAIN = re.compile(r"#\d+(?=/|$)")


class LayerPlace(NamedTuple):
    """Where a layer is.

    Attributes:
        name: Its name, with a mark for each model around it.
        partitions: The partitions that have a part of it; none if it does nothing.
    """

    name: str
    partitions: tuple[int, ...]


def partitions_text(
    model: Any,
    plan: Plan | None,
    world: World,
    expand_nested: bool = False,
    layer_range: Sequence[str] | None = None,
) -> str:
    """The layers of a model with their partitions and devices, as text.

    Args:
        model: The model.
        plan: Its plan; None if there is none yet.
        world: The devices of the partitions, and whose they are.
        expand_nested: Whether to show the layers of models in the model.
        layer_range: Regular expressions of the names of the first and the last layer to show.

    Example:
        ```python
        print(partitions_text(model, model.plan, world))
        ```
    """
    number = world.config.partitions
    if plan is None:
        return (
            f" Partitions: {number}. Which layer is in which is not known yet: that is decided "
            "from a first batch, by `fit`, in an smp.step function, or by calling the model."
        )
    places = list(layer_places(model, plan, expand_nested, layer_range))
    rows = [("Layer", "Partition", "Device")]
    for place in places:
        partitions = ", ".join(map(str, place.partitions)) or "-"
        devices = ", ".join(_device(world, p) for p in place.partitions) or "-"
        rows.append((place.name, partitions, devices))
    name_width, number_width = (max(len(row[i]) for row in rows) for i in (0, 1))
    lines = [f" {a:<{name_width}}  {b:<{number_width}}  {c}" for a, b, c in rows]
    return "\n".join([f" Partitions: {number}", *lines])


def layer_places(
    model: Any, plan: Plan, expand_nested: bool = False, layer_range: Sequence[str] | None = None
) -> Iterator[LayerPlace]:
    """The partitions of each layer, in the order in which `model.layers` has them.

    Args:
        model: The model.
        plan: Its plan.
        expand_nested: Whether to go into models in the model.
        layer_range: As `partitions_text`.
    """
    layers = list(model.layers)
    if layer_range is not None:
        first, last = layer_range
        lower = [i for i, layer in enumerate(layers) if re.match(first, layer.name)]
        upper = [i for i, layer in enumerate(layers) if re.match(last, layer.name)]
        begin, end = min(lower), max(upper)
        if begin > end:
            begin, end = min(upper), max(lower)
        layers = layers[begin : end + 1]
    yield from _places(layers, plan, (), expand_nested)


def _places(
    layers: Iterable[Any], plan: Plan, around: tuple[str, ...], expand_nested: bool
) -> Iterator[LayerPlace]:
    for layer in layers:
        path = (*around, layer.name)
        mark = "   " * len(around) + "└ " if around else ""
        yield LayerPlace(mark + layer.name, _partitions_below(plan, "/".join(path)))
        inside = getattr(layer, "layers", None)
        if expand_nested and inside:
            yield from _places(inside, plan, path, expand_nested)


def _partitions_below(plan: Plan, label: str) -> tuple[int, ...]:
    """Partitions of all calls of a layer, and of the layers in it."""
    found: set[int] = set()
    for call in plan.calls:
        name = _AGAIN.sub("", call.label)
        if name == label or name.startswith(f"{label}/"):
            found.update(plan.partition_of[op] for op in call.operations)
    return tuple(sorted(found))


def _device(world: World, partition: int) -> str:
    device = world.devices[partition]
    here = device.rpartition("device:")[2] or device
    if world.size == 1:
        return here
    rank = world.mp_group[world.owner(partition)]
    return f"rank {rank} {here}" if partition in world.my_partitions else f"rank {rank}"
