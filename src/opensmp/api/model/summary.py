"""Partition and device of each layer, appended to `model.summary()`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from opensmp.compiler.plan.plan import Plan
from opensmp.distributed.world import World

_AGAIN = re.compile(r"#\d+(?=/|$)")
_NO_PARTS: Mapping[int, Plan] = MappingProxyType({})


class LayerPlace(NamedTuple):
    """Partitions of one layer.

    Attributes:
        name: Name of the layer, indented by its nesting depth.
        partitions: Partitions that run operations of the layer; empty if it has no operations.
    """

    name: str
    partitions: tuple[int, ...]


def partitions_text(
    model: Any,
    plan: Plan | None,
    world: World,
    expand_nested: bool = False,
    layer_range: Sequence[str] | None = None,
    parts: Mapping[int, Plan] = _NO_PARTS,
) -> str:
    """Table of a model's layers with their partitions and devices.

    Args:
        model: The model.
        plan: Its plan; None if it has not been called.
        world: Maps partitions to devices and ranks.
        expand_nested: Whether to list the layers of nested models.
        layer_range: Regular expressions for the names of the first and the last layer to list.
        parts: Plans of layers that were called on their own, by `id` of the layer.

    Example:
        ```python
        print(partitions_text(model, model.plan, world))
        ```
    """
    number = world.config.partitions
    if plan is None and not parts:
        return (
            f" Partitions: {number}. Which layer is in which is not known yet: that is decided "
            "from a first batch, by `fit`, in an smp.step function, or by calling the model."
        )
    places = list(layer_places(model, plan, expand_nested, layer_range, parts))
    rows = [("Layer", "Partition", "Device")]
    for place in places:
        partitions = ", ".join(map(str, place.partitions)) or "-"
        devices = ", ".join(_device(world, p) for p in place.partitions) or "-"
        rows.append((place.name, partitions, devices))
    name_width, number_width = (max(len(row[i]) for row in rows) for i in (0, 1))
    lines = [f" {a:<{name_width}}  {b:<{number_width}}  {c}" for a, b, c in rows]
    return "\n".join([f" Partitions: {number}", *lines])


def layer_places(
    model: Any,
    plan: Plan | None,
    expand_nested: bool = False,
    layer_range: Sequence[str] | None = None,
    parts: Mapping[int, Plan] = _NO_PARTS,
) -> Iterator[LayerPlace]:
    """Yields the partitions of each layer in the order of `model.layers`; see `partitions_text`."""
    layers = list(model.layers)
    if layer_range is not None:
        first, last = layer_range
        lower = [i for i, layer in enumerate(layers) if re.match(first, layer.name)]
        upper = [i for i, layer in enumerate(layers) if re.match(last, layer.name)]
        begin, end = min(lower), max(upper)
        if begin > end:
            begin, end = min(upper), max(lower)
        layers = layers[begin : end + 1]
    known = () if plan is None else ((plan, ()),)
    yield from _places(layers, known, 0, expand_nested, parts)


def _places(
    layers: Iterable[Any],
    around: Sequence[tuple[Plan, tuple[str, ...]]],
    depth: int,
    expand_nested: bool,
    parts: Mapping[int, Plan],
) -> Iterator[LayerPlace]:
    """Yields the partitions of layers and, if `expand_nested`, of layers nested in them.

    Args:
        layers: The layers.
        around: Pairs of a plan that may contain the layers, and the path of their parent in it.
        depth: Nesting depth.
        expand_nested: As in `partitions_text`.
        parts: As in `partitions_text`.
    """
    for layer in layers:
        known = [(plan, (*path, layer.name)) for plan, path in around]
        if id(layer) in parts:
            known.append((parts[id(layer)], ()))
        found = {p for plan, path in known for p in _partitions_below(plan, "/".join(path))}
        mark = "   " * depth + "└ " if depth else ""
        yield LayerPlace(mark + layer.name, tuple(sorted(found)))
        inside = getattr(layer, "layers", None)
        if expand_nested and inside:
            yield from _places(inside, known, depth + 1, expand_nested, parts)


def _partitions_below(plan: Plan, label: str) -> set[int]:
    """Partitions of all calls of layer `label` and of its sublayers; of all layers if empty."""
    found: set[int] = set()
    for call in plan.calls:
        name = _AGAIN.sub("", call.label)
        if not label or name == label or name.startswith(f"{label}/"):
            found.update(plan.partition_of[op] for op in call.operations)
    return found


def _device(world: World, partition: int) -> str:
    device = world.devices[partition]
    here = device.rpartition("device:")[2] or device
    if world.size == 1:
        return here
    rank = world.mp_group[world.owner(partition)]
    return f"rank {rank} {here}" if partition in world.my_partitions else f"rank {rank}"
