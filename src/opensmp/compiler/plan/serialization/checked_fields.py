"""Validates the settings and costs in a plan file; accepted values are safe to compute with."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from opensmp.base.message_text import shown
from opensmp.compiler.plan.settings import PlanSettings
from opensmp.compiler.plan.unit_graph import CoarseGraph, CutTensor, Machine, SharedVariable
from opensmp.compiler.trace.layer_calls import LayerCall
from opensmp.config.keys import KEYS
from opensmp.config.pipelines import PIPELINES
from opensmp.config.recompute import NONE

SECONDS = ("forward_seconds", "backward_seconds")
BYTES = ("parameter_bytes", "state_bytes", "residual_bytes")
FLOPS = ("forward_flops", "backward_flops")
RECOMPUTED_BYTES = ("selective_bytes", "full_bytes")
RECOMPUTED_SECONDS = ("selective_seconds",)
"""Arrays with one number per unit, as `SECONDS` and `BYTES`; a file may omit these."""

# Sums and products of such numbers stay far below the limits of int64 and float64.
_MOST_SECONDS = 1e9
_MOST_BYTES = 2**50
_MOST_FLOPS = 1e30
_MOST_TOTAL_BYTES = 2**62

_KEY_OF = {
    "microbatches": "microbatches",
    "pipeline": "pipeline",
    "optimize": "optimize",
    "contiguous": "contiguous",
    "active_microbatches": "active_microbatches",
    "pieces": "pieces_per_partition",
    "recompute": "recompute",
    "offload": "offload",
}
_MAY_BE_NONE = ("active_microbatches", "memory_bytes", "narrow_flops_per_second")
_MAY_BE_NOTHING = ("operation_seconds", "transfer_seconds")


# --- settings -----------------------------------------------------------------------------------


def read_settings(data: Mapping[str, Any], faults: list[str]) -> PlanSettings:
    """Reads the settings that a plan was made for; returns the defaults if there are faults."""
    machine = data.get("machine", {})
    known = [field.name for field in fields(PlanSettings) if field.name != "own"]
    if not isinstance(machine, Mapping) or not data.keys() <= set(known):
        faults.append(
            f"settings: expected an object with {', '.join(known)}; received {shown(data)}"
        )
        return PlanSettings()
    count = len(faults)
    for name, value in data.items():
        if name == "machine" or (value is None and name in _MAY_BE_NONE):
            continue
        kind = KEYS[_KEY_OF[name]].kind
        try:
            kind.check(value)
            if name == "pipeline" and value not in PIPELINES:
                raise ValueError  # an order of a user's own is not that of a plan
        except ValueError:
            faults.append(f"settings: {name} is {shown(value, 60)}; expected {kind.accepted}")
    check_machine(machine, faults)
    if len(faults) > count:
        return PlanSettings()
    checked = {key: KEYS[key].kind.check(data.get(key, NONE)) for key in ("recompute", "offload")}
    return PlanSettings(**{**data, "machine": Machine(**machine), **checked})


def check_machine(machine: Mapping[str, Any], faults: list[str]) -> None:
    """Appends the faults in the fields of a `Machine` to `faults`; fields may be missing."""
    known = [field.name for field in fields(Machine)]
    for name, value in machine.items():
        if name not in known:
            faults.append(
                f"settings: machine has {shown(name, 60)}; expected an object with "
                f"{', '.join(known)}"
            )
        elif value is None and name in _MAY_BE_NONE:
            continue
        elif name == "memory_bytes":
            if not _is_whole(value, 1, _MOST_TOTAL_BYTES):
                faults.append(
                    f"settings: machine.memory_bytes is {shown(value, 60)}; expected an integer "
                    ">= 1, or null for no limit"
                )
        elif not _is_number(value, _MOST_FLOPS) or not (
            value >= 1 / _MOST_FLOPS or (value == 0 and name in _MAY_BE_NOTHING)
        ):
            faults.append(f"settings: machine.{name} is {shown(value, 60)}; expected a number > 0")


# --- costs --------------------------------------------------------------------------------------


def read_costs(
    data: Mapping[str, Any],
    calls: Iterable[LayerCall],
    settings: PlanSettings,
    faults: list[str],
) -> CoarseGraph | None:
    """Reads the units of a plan and their costs; returns None if there are faults."""
    found: list[str] = []
    names: Any = data.get("names")
    if not _are_texts(names):
        found.append(f"names: expected a list of texts; received {shown(names, 60)}")
        names = []
    count = len(names)
    layers: Any = data.get("layers")
    if not _are_texts(layers) or len(layers) != count:
        found.append(f"layers: expected {count} texts, one per unit; received {shown(layers, 60)}")
    arrays = {
        **{name: _array(data, name, count, _MOST_SECONDS, found) for name in SECONDS},
        **{name: _array(data, name, count, _MOST_BYTES, found, whole=True) for name in BYTES},
        **{name: _array(data, name, count, _MOST_FLOPS, found) for name in FLOPS if name in data},
        **{
            name: _array(data, name, count, _MOST_BYTES, found, whole=True)
            for name in RECOMPUTED_BYTES
            if name in data
        },
        **{
            name: _array(data, name, count, _MOST_SECONDS, found)
            for name in RECOMPUTED_SECONDS
            if name in data
        },
    }
    operations = _operations(data.get("operations"), calls, count, found)
    tensors = _tensors(data.get("tensors"), count, found)
    shared = _shared(data.get("shared"), count, found)
    if not found:
        total = sum(sum(arrays[name].tolist()) for name in BYTES)
        total += sum((len(t.consumers) + 1) * (t.forward_bytes + t.backward_bytes) for t in tensors)
        total += sum(len(v.units) * (v.parameter_bytes + v.gradient_bytes) for v in shared)
        if total * settings.microbatches > _MOST_TOTAL_BYTES:
            found.append(f"all units take {total} bytes, which is more than can be counted")
    if found:
        listed = "; ".join(found[:5]) + (f"; and {len(found) - 5} more" if len(found) > 5 else "")
        faults.append(f"costs: this part is broken; take it out, or write a new file ({listed})")
        return None
    return CoarseGraph(
        names=tuple(names),
        layers=tuple(layers or ()),
        operations=operations,
        tensors=tensors,
        shared=shared,
        **arrays,
    )


def _array(
    data: Mapping[str, Any],
    name: str,
    count: int,
    most: float,
    faults: list[str],
    *,
    whole: bool = False,
) -> Any:
    """Reads an array of `count` numbers from 0 to `most`; returns an empty one if it is invalid."""
    values = data.get(name)
    fits = isinstance(values, list) and len(values) == count
    if fits and whole:
        fits = all(_is_whole(value, 0, int(most)) for value in values or ())
    elif fits:
        fits = all(_is_number(value, most) and value >= 0 for value in values or ())
    if not fits:
        kind = "integers" if whole else "numbers"
        faults.append(
            f"{name}: expected {count} {kind} from 0 to {most:g}, one per unit; received "
            f"{shown(values, 60)}"
        )
        return np.zeros(0)
    return np.array(values, np.int64 if whole else np.float64)


def _operations(
    units: Any, calls: Iterable[LayerCall], count: int, faults: list[str]
) -> tuple[tuple[str, ...], ...]:
    """Reads the operations of each unit from ranges [first, last] of operation numbers."""
    names = [name for call in calls for name in call.operations]
    found: list[tuple[str, ...]] = []
    left = len(names)  # bounds the expansion of ranges by the number of operations
    for runs in units if isinstance(units, list) else [None]:
        if not isinstance(runs, list) or not all(_is_run(run, len(names)) for run in runs):
            faults.append(
                "operations: expected a list of [first, last] per unit, numbers of operations "
                f"from 0 to {len(names) - 1}; received {shown(runs, 60)}"
            )
            return ()
        left -= sum(last - first + 1 for first, last in runs)
        if left < 0:
            faults.append("operations: an operation is in more than one unit")
            return ()
        found.append(tuple(names[i] for first, last in runs for i in range(first, last + 1)))
    if found and len(found) != count:
        faults.append(f"operations: expected {count} lists, one per unit; received {len(found)}")
    return tuple(found)


def _is_run(run: Any, count: int) -> bool:
    return (
        isinstance(run, list)
        and len(run) == 2
        and all(_is_whole(number, 0, count - 1) for number in run)
        and run[0] <= run[1]
    )


def _tensors(rows: Any, count: int, faults: list[str]) -> tuple[CutTensor, ...]:
    """Reads the tensors between units; stops at the first fault."""
    found = []
    listed: list[Any] = rows if isinstance(rows, list) else [None]
    for row in listed:
        fits = isinstance(row, list) and len(row) in (4, 5)
        if not fits or not (
            _is_whole(row[0], 0, count - 1)
            and _are_units(row[1], row[0] + 1, count)
            and _are_sizes_and_name(row[2:])
        ):
            faults.append(
                "tensors: expected a list of [unit, later units, bytes, bytes, name]; received "
                f"{shown(row, 60)}"
            )
            break
        found.append(CutTensor(row[0], tuple(row[1]), *row[2:]))
    return tuple(found)


def _shared(rows: Any, count: int, faults: list[str]) -> tuple[SharedVariable, ...]:
    """Reads the shared variables; stops at the first fault."""
    found = []
    listed: list[Any] = rows if isinstance(rows, list) else [None]
    for row in listed:
        fits = isinstance(row, list) and len(row) in (3, 4)
        if not fits or not (_are_units(row[0], 0, count) and _are_sizes_and_name(row[1:])):
            faults.append(
                f"shared: expected a list of [units, bytes, bytes, name]; received {shown(row, 60)}"
            )
            break
        found.append(SharedVariable(tuple(row[0]), *row[1:]))
    return tuple(found)


def _are_units(values: Any, first: int, count: int) -> bool:
    if not isinstance(values, list) or not values:
        return False
    least = first
    for value in values:  # an explicit loop, since a plan may have hundreds of thousands of lists
        if type(value) is not int or not least <= value < count:
            return False
        least = value
    return True


def _are_sizes_and_name(values: Sequence[Any]) -> bool:
    return (
        _is_whole(values[0], 0, _MOST_BYTES)
        and _is_whole(values[1], 0, _MOST_BYTES)
        and _are_texts(values[2:])
    )


def _are_texts(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def _is_whole(value: Any, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def _is_number(value: Any, most: float) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return -most <= value <= most and math.isfinite(value)
