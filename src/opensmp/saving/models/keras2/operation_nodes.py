"""Corrects operations that are not layers, such as masks, in Keras 3 `.h5` configurations."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

from opensmp import _private

Config = dict[str, Any]


def name_operations(config: Config, custom: Collection[str] = ()) -> bool:
    """Adds the modules by which Keras finds operations, in place; returns whether there were any.

    `Masking`, `Embedding(mask_zero=True)`, `x + y`, `x[:, 0]` and `keras.ops` add operations to the
    layers of a Functional model. Keras writes them to `.h5` files with their class name only, and
    looks for layers of that name when it reads them. In `.keras` files, which it can read, their
    module is stored as well; everything else is equal.
    """
    modules = _private.operation_modules()
    changed = False
    pending: list[Any] = [config]
    while pending:
        node = pending.pop()
        if isinstance(node, list):
            pending += node
        elif isinstance(node, dict):
            kind = node.get("class_name")
            if _is_operation(node) and kind in modules and kind not in custom:
                node["module"] = modules[kind]
                node["registered_name"] = kind
                if kind == "GetItem":
                    _write_out_ellipses(node)
                changed = True
            pending += node.values()
    return changed


def _is_operation(node: Config) -> bool:
    """Whether a node has the form of an operation; `Add` and others are also layers."""
    inner, calls = node.get("config"), node.get("inbound_nodes")
    if not isinstance(node.get("class_name"), str) or "module" in node:
        return False
    if not isinstance(inner, dict) or "trainable" in inner:  # every layer has it
        return False
    if not isinstance(calls, list) or not calls:
        return False
    return all(isinstance(call, dict) and "args" in call for call in calls)


def _write_out_ellipses(node: Config) -> None:
    """Expands an ellipsis in an index to full slices.

    Keras deserializes it twice from a `.h5` file, and fails the second time.
    """
    for call in node["inbound_nodes"]:
        arguments = call["args"]
        if len(arguments) != 2 or not isinstance(arguments[0], dict):
            continue
        shape = arguments[0].get("config", {}).get("shape")
        key = arguments[1] if isinstance(arguments[1], list) else [arguments[1]]
        at = [index for index, part in enumerate(key) if _is_ellipsis(part)]
        if shape is None or len(at) != 1:
            continue
        others = sum(part is not None for part in key) - 1  # None is a new axis
        full = [copy.deepcopy(_FULL) for _ in range(max(0, len(shape) - others))]
        arguments[1] = [*key[: at[0]], *full, *key[at[0] + 1 :]]


def _is_ellipsis(part: Any) -> bool:
    return isinstance(part, dict) and part.get("class_name") == "__ellipsis__"


_FULL = {"class_name": "__slice__", "config": {"start": None, "stop": None, "step": None}}
