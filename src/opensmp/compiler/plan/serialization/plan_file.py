"""Reads and writes plans as JSON files.

A file has these sections:

- `layers`: the placement, and the only section to edit. As in `Plan.layers`, it maps a layer's
  label to its partition or, for a layer whose own operations are cut, its pieces to their
  partitions. Of the entries that contain an operation the innermost applies, so a line
  `"encoder/block_3/attention": 1` may be added below `"encoder/block_3": 0`; `"*"` applies to
  operations in no other entry.
- `model`, `partitions`, `settings`: the inputs of the plan.
- `operations`: all layer calls in order, with the operations of each piece. They identify the
  model that the plan belongs to. Partitions of operations are stored in `layers` only.
- `predicted`: predicted costs, for people; they are not read back.
- `costs`: the units of the plan, so that a loaded plan can be printed, explained and drawn
  without the model. This section is optional.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from opensmp.base.message_text import did_you_mean, numbered, shown
from opensmp.base.strict_json import NotJson, parse_json
from opensmp.compiler.plan.plan import Plan
from opensmp.compiler.plan.serialization.checked_fields import (
    BYTES,
    FLOPS,
    RECOMPUTED_BYTES,
    RECOMPUTED_SECONDS,
    SECONDS,
    read_costs,
    read_settings,
)
from opensmp.compiler.plan.unit_graph import CoarseGraph
from opensmp.compiler.trace.layer_calls import MODEL, LayerCall, Piece
from opensmp.config import offload, recompute
from opensmp.config.keys import KEYS
from opensmp.errors import PlanError

FORMAT = "opensmp plan"
VERSION = 1

_MOST_BYTES = 256 << 20  # limit of the file size; the largest models need a few MB
_LONGEST_LABEL = 10_000
_DEEPEST_LABEL = 200  # nesting of layers
_MAKE_NEW = (
    "Mend the file, or write a new one with `opensmp plan ... --output` or model.plan.save(path)."
)


# --- writing ---------------------------------------------------------------------------------


def to_json(plan: Plan) -> dict[str, Any]:
    """Returns a plan as JSON values."""
    settings = asdict(replace(plan.settings, own=None))
    data: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "model": plan.model,
        "partitions": plan.num_partitions,
        "layers": {
            label: dict(entry) if isinstance(entry, Mapping) else entry
            for label, entry in plan.layers.items()
        },
        "settings": {
            **{key: value for key, value in settings.items() if key != "own"},
            "recompute": recompute.as_dict(plan.settings.recompute),
            "offload": offload.as_dict(plan.settings.offload),
        },
    }
    if plan.has_costs:
        prediction = plan.prediction
        data["predicted"] = {
            "step_seconds": prediction.step_seconds,
            "stage_seconds": list(prediction.stage_seconds),
            "peak_bytes": list(prediction.peak_bytes),
            "cut_bytes": prediction.cut_bytes,
        }
    data["operations"] = {
        call.label: {piece.name: list(piece.operations) for piece in call.pieces}
        for call in plan.calls
    }
    if plan.has_costs:
        data["costs"] = _costs_to_json(plan.costs, plan.calls)
    return data


def save(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Writes a plan to the file `path`: `layers` and settings indented, large sections compact."""
    data = to_json(plan)
    parts = []
    for key, value in data.items():
        if key in ("operations", "costs"):  # one line per entry, since there may be thousands
            rows = [f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()]
            text = "{\n" + ",\n".join(rows) + "\n  }" if rows else "{}"
        else:
            text = json.dumps(value, indent=2).replace("\n", "\n  ")
        parts.append(f"  {json.dumps(key)}: {text}")
    Path(path).write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


def _costs_to_json(graph: CoarseGraph, calls: Iterable[LayerCall]) -> dict[str, Any]:
    """Returns the units as JSON values, with their operations as ranges of operation numbers."""
    names = [name for call in calls for name in call.operations]
    index = {name: i for i, name in enumerate(names)}
    return {
        "names": list(graph.names),
        "layers": list(graph.layers),
        "operations": [
            _runs(sorted(index[name] for name in operations if name in index))
            for operations in graph.operations
        ],
        **{name: getattr(graph, name).tolist() for name in (*SECONDS, *BYTES)},
        **{
            name: getattr(graph, name).tolist()
            for name in (*FLOPS, *RECOMPUTED_BYTES, *RECOMPUTED_SECONDS)
            if getattr(graph, name) is not None
        },
        "tensors": [[t.producer, list(t.consumers), *t[2:]] for t in graph.tensors],
        "shared": [[list(variable.units), *variable[1:]] for variable in graph.shared],
    }


def _runs(numbers: Iterable[int]) -> list[list[int]]:
    """Compresses ascending numbers to [first, last] of each run."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return runs


# --- reading ---------------------------------------------------------------------------------


def load(path: str | os.PathLike[str]) -> Plan:
    """Reads a plan from a file."""
    name = os.fspath(path)
    try:
        text = _text(path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise PlanError(
            f"Plan file {shown(name, 200)} cannot be read: {reason}. Give the path of a file "
            "written by `opensmp plan ... --output` or model.plan.save(path)."
        ) from error
    try:
        data = parse_json(text)
    except ValueError as error:
        what = "is no JSON" if isinstance(error, NotJson) else "cannot be used"
        raise PlanError(f"Plan file '{name}' {what}: {error}. {_MAKE_NEW}") from error
    return from_json(data, name)


def _text(path: str | os.PathLike[str]) -> str:
    """Returns a file's text; raises `OSError` or `ValueError` if it is not a readable text file."""
    found = os.stat(path)
    # Reading a pipe or a device may never end.
    if stat.S_ISDIR(found.st_mode):
        raise ValueError("it is a directory")
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("it is no regular file")
    if found.st_size > _MOST_BYTES:
        raise ValueError(f"it has {found.st_size} bytes, more than a plan has")
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None


def from_json(data: Any, source: str = "") -> Plan:
    """Builds a plan from JSON values."""
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        received = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise PlanError(
            f"Plan file '{source}' is no plan: expected a JSON object with \"format\": "
            f'"{FORMAT}", received {shown(received)}. {_MAKE_NEW}'
        )
    version = data.get("version")
    if type(version) is not int or version != VERSION:
        raise PlanError(
            f"Plan file '{source}' has version {shown(version)} of the format; this "
            f"opensmp reads version {VERSION}. Write a new one with `opensmp plan`, or use the "
            "opensmp it was written with."
        )
    faults: list[str] = []
    model = _expect(data, "model", str, "", faults)
    partitions = _expect(data, "partitions", int, 1, faults)
    try:
        KEYS["partitions"].kind.check(partitions)
    except ValueError:
        accepted = KEYS["partitions"].kind.accepted
        faults.append(f"partitions: received {shown(partitions)}; expected {accepted}")
    calls = _read_calls(_expect(data, "operations", dict, {}, faults), faults)
    layers = _expect(data, "layers", dict, {}, faults)
    partition_of: dict[str, int] = {}
    if not faults:
        partition_of = _read_layers(layers, calls, partitions, faults)
    settings = read_settings(_expect(data, "settings", dict, {}, faults), faults)
    graph = None
    if "costs" in data and not faults:
        costs = _expect(data, "costs", dict, {}, faults)
        graph = read_costs(costs, calls, settings, faults)
    if faults:
        count = "one fault" if len(faults) == 1 else f"{len(faults)} faults"
        lines = [f"Plan file '{source}' has {count}.", *numbered(faults), _MAKE_NEW]
        raise PlanError("\n".join(lines))
    return Plan(model, partitions, partition_of, calls, settings, source, graph)


def _expect(data: Mapping[str, Any], key: str, kind: type, default: Any, faults: list[str]) -> Any:
    value = data.get(key)
    if isinstance(value, kind) and not isinstance(value, bool):
        return value
    received = f"received {shown(value, 60)}" if key in data else "it is missing"
    expected = {str: "a text", int: "an integer", dict: "an object"}[kind]
    faults.append(f"{key}: expected {expected}; {received}")
    return default


def _read_calls(operations: Mapping[str, Any], faults: list[str]) -> tuple[LayerCall, ...]:
    """Reads the section `operations` and returns the valid layer calls."""
    calls = []
    seen: dict[str, str] = {}
    for label, pieces in operations.items():
        if not isinstance(pieces, dict) or not all(map(_is_names, pieces.values())):
            faults.append(
                f"operations: expected an object of lists of names for {shown(label)}; received "
                f"{shown(pieces, 60)}"
            )
            continue
        if len(label) > _LONGEST_LABEL or label.count("/") > _DEEPEST_LABEL:
            faults.append(f"operations: no layer is nested as deeply as {shown(label)}")
            continue
        if not all(label.split("/")):
            faults.append(f"operations: the name of a layer is empty in {shown(label)}")
            continue
        call = LayerCall(label, tuple(Piece(name, tuple(ops)) for name, ops in pieces.items()))
        for name in call.operations:
            if name in seen:
                faults.append(
                    f"operations: {shown(name)} is in {shown(seen[name])} and in {shown(label)}"
                )
            seen[name] = label
        calls.append(call)
    return tuple(calls)


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, str) for v in value)


def _read_layers(
    layers: Mapping[str, Any], calls: Iterable[LayerCall], partitions: int, faults: list[str]
) -> dict[str, int]:
    """Returns the partition of each operation, from the innermost entry that contains it."""
    pieces_of = {call.label: {piece.name for piece in call.pieces} for call in calls}
    for label, entry in layers.items():
        if label not in pieces_of:
            near = _near(label, pieces_of, faults)
            faults.append(f"layers: {shown(label)} is no layer of the plan{near}")
        for piece, partition in entry.items() if isinstance(entry, dict) else [("", entry)]:
            where = shown(label)
            if isinstance(entry, dict):
                where += f", piece {shown(piece)},"
            whole = isinstance(partition, int) and not isinstance(partition, bool)
            if not whole or not 0 <= partition < partitions:
                faults.append(
                    f"layers: {where} has partition {shown(partition, 60)}; expected an integer "
                    f"from 0 to {partitions - 1}"
                )
            if isinstance(entry, dict) and piece not in pieces_of.get(label, {piece}):
                near = _near(piece, pieces_of[label], faults)
                faults.append(f"layers: {where} is no piece of that layer{near}")
    if faults:
        return {}
    partition_of: dict[str, int] = {}
    uncovered = []
    for call in calls:
        entry = layers.get(call.label)
        for piece in call.pieces:
            place: int | None = entry.get(piece.name) if isinstance(entry, dict) else entry
            if place is None:
                place = _around(call.label, layers)
            if place is None:
                uncovered.append(call.label)
            else:
                partition_of.update(dict.fromkeys(piece.operations, place))
    for label in dict.fromkeys(uncovered):
        faults.append(
            f"layers: no entry contains the operations of {shown(label)}; add one for it, or "
            f'"{MODEL}" for all that has none'
        )
    return partition_of


def _around(label: str, layers: Mapping[str, Any]) -> int | None:
    """Returns the entry of the innermost enclosing layer, or that of the model if there is none."""
    while label := label.rpartition("/")[0]:
        if isinstance(layers.get(label), int):
            return int(layers[label])
    default = layers.get(MODEL)
    return default if isinstance(default, int) else None


def _near(name: str, known: Iterable[str], faults: list[str]) -> str:
    question = did_you_mean(name, known, faults)
    return f"; {question}" if question else ""
