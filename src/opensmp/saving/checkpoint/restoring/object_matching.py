"""Matches the objects in a checkpoint with those of the program, and lists their differences."""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from opensmp import _private
from opensmp.compiler.trace.variables import tf_dtype, variable_name
from opensmp.saving.checkpoint.contents import is_variable

_SHOWN = 5
_SAVE_COUNTER = "save_counter"  # created by tf.train.Checkpoint itself
_WEIGHTS = "_trainable_variables"  # where Keras optimizers track the model's weights


class _Role(enum.Enum):
    """Kind of an object in a checkpoint."""

    PART = "a part of a model, or of the program"
    SLOT = "an optimizer's own"
    WEIGHT = "a weight that an optimizer knows"


class Match(NamedTuple):
    """A value in the files, by its key, and the object that it belongs to."""

    key: str
    owner: Any


class Stored(NamedTuple):
    """Shape and dtype of a value in the files."""

    shape: tuple[int, ...]
    dtype: Any


class _Found(NamedTuple):
    """An object of the program.

    Attributes:
        path: Attribute path from the root to the object.
        owner: The object.
        fresh: The optimizer whose slot it is, if the files were written before that had slots.
    """

    path: str
    owner: Any
    fresh: Any = None


@dataclass(frozen=True)
class Matching:
    """Result of matching a checkpoint with the objects of the program.

    Attributes:
        matches: Values that have an object.
        different: Values whose shape or dtype differs from their variable, one line each.
        missing: Variables without a value, one line each.
        unused: Values without an object whose parent object is complete, one line each.
        waiting: Keys of values whose objects have not been created yet.
        hopeful: Whether some of the waiting values may belong to variables in `missing`.
        seeds: Random seeds without a value, one line each.
        fresh: Optimizers whose first update came after the checkpoint, so that it has no slots for
            them; their slots must have their initial values.
    """

    matches: tuple[Match, ...]
    different: tuple[str, ...]
    missing: tuple[str, ...]
    unused: tuple[str, ...]
    waiting: tuple[str, ...]
    hopeful: bool
    seeds: tuple[str, ...]
    fresh: tuple[Any, ...] = ()

    def fault(self, partial: bool) -> str | None:
        """Text about all mismatches; if `partial`, about shapes only. None if there are none."""
        parts = [("have other shapes or types", self.different)]
        if not partial:
            # While layers are unbuilt, a waiting value may still find its variable.
            parts.append(("are not in the checkpoint", () if self.hopeful else self.missing))
            parts.append(("are in the checkpoint, but not in the program", self.unused))
        lines = []
        for what, found in parts:
            if found:
                lines += [f"{len(found)} {what}:", *(f"  {line}" for line in found[:_SHOWN])]
                lines += ["  ..."] * (len(found) > _SHOWN)
        return "\n".join(lines) or None


def match(
    checkpoint: Any, object_graph: bytes, stored: Mapping[str, Stored], made: Any = None
) -> Matching:
    """Matches a checkpoint in files with the objects of a program.

    Objects correspond if the same attribute path leads to them, as in `tf.train.Checkpoint`. `made`
    is a model that has just created all its variables, although Keras does not mark it as built.
    """
    nodes = _private.checkpoint_nodes(object_graph)
    root, attached = _private.checkpoint_root(checkpoint)
    owner_of: dict[int, Any] = {0: root}
    objects: dict[int, _Found] = {id(root): _Found("", root)}
    # Nodes below unbuilt objects, by role.
    unbuilt: dict[_Role, set[int]] = {role: set() for role in _Role}
    hopeless: set[int] = set()  # nodes below complete objects
    queue: deque[tuple[int | None, Any, str, bool, _Role, Any]] = deque(
        [(0, root, "", False, _Role.PART, None)]
    )
    while queue:
        number, owner, path, waits, role, fresh = queue.popleft()
        waits = (waits or _is_unbuilt(owner)) and owner is not made
        if number is not None and _is_before_updates(owner, nodes, number):
            fresh = owner
        children = dict(tf.train.TrackableView.children(owner))
        if owner is root:
            children = {**children, **attached}
        of_node = {} if number is None else nodes[number].children
        for name, child in children.items():
            child_number = of_node.get(name)
            is_new = id(child) not in objects
            child_path = f"{path}/{name}" if path else name
            of_fresh = None if name == _WEIGHTS else fresh
            below = waits, _role(owner, name, role), of_fresh
            if is_new:
                objects[id(child)] = _Found(child_path, child, of_fresh)
            if child_number is not None and child_number not in owner_of:
                owner_of[child_number] = child
                queue.append((child_number, child, child_path, *below))
            elif is_new:
                queue.append((None, child, child_path, *below))
        for name, child_number in of_node.items():
            if name not in children and (owner is not root or isinstance(root, keras.Layer)):
                (unbuilt[_role(owner, name, role)] if waits else hopeless).add(child_number)
    return _collect(nodes, stored, owner_of, objects, unbuilt, hopeless)


def _collect(
    nodes: list[Any],
    stored: Mapping[str, Stored],
    owner_of: Mapping[int, Any],
    objects: Mapping[int, _Found],
    unbuilt: Mapping[_Role, set[int]],
    hopeless: set[int],
) -> Matching:
    """Builds the `Matching` from the results of the graph traversal."""
    matches: list[Match] = []
    different: list[str] = []
    for number, owner in owner_of.items():
        for key in nodes[number].keys.values():
            matches.append(Match(key, owner))
            if is_variable(owner) and key in stored:
                found = difference(owner, stored[key])
                if found:
                    different.append(f"{key}: {found}")
    matched = {id(owner) for number, owner in owner_of.items() if nodes[number].keys}
    missing: list[str] = []
    seeds: list[str] = []
    before_updates: dict[int, Any] = {}
    for path, owner, fresh in objects.values():
        if is_variable(owner) and id(owner) not in matched and path != _SAVE_COUNTER:
            if fresh is not None:
                before_updates[id(fresh)] = fresh
                continue
            line = f"{path}: {variable_name(owner)} with shape {tuple(owner.shape)}"
            is_seed = isinstance(owner, keras.Variable) and owner.name == "seed_generator_state"
            (seeds if is_seed else missing).append(line)
    waiting = {role: _keys_below(nodes, unbuilt[role], owner_of, stored) for role in _Role}
    # An optimizer only refers to the model's weights, so its copies do not make a value used.
    claimed = {*waiting[_Role.PART], *waiting[_Role.SLOT]}
    unused = [key for key in _keys_below(nodes, hopeless, owner_of, stored) if key not in claimed]
    return Matching(
        tuple(matches),
        tuple(different),
        tuple(missing),
        tuple(f"{key} with shape {stored[key].shape}" for key in unused),
        tuple(sorted({key for keys in waiting.values() for key in keys})),
        bool(waiting[_Role.PART] or waiting[_Role.WEIGHT]),
        tuple(seeds),
        tuple(before_updates.values()),
    )


def difference(variable: Any, stored: Stored) -> str | None:
    """How shape or dtype of a variable and its stored value differ; None if they do not."""
    shape, dtype = variable.shape, tf_dtype(variable)
    if shape.is_compatible_with(stored.shape) and dtype.base_dtype == stored.dtype.base_dtype:
        return None
    here = tuple(None if size is None else int(size) for size in shape)
    return (
        f"{stored.shape} {stored.dtype.name} in the checkpoint, {here} {dtype.name} in "
        f"{variable_name(variable)}"
    )


def _is_unbuilt(owner: Any) -> bool:
    return isinstance(owner, (keras.Layer, keras.optimizers.Optimizer)) and not owner.built


def _is_before_updates(owner: Any, nodes: list[Any], number: int) -> bool:
    """Whether an object is an optimizer that tracked no weights when the files were written."""
    if not isinstance(owner, keras.optimizers.Optimizer):
        return False
    children = nodes[number].children
    return _WEIGHTS not in children or not nodes[children[_WEIGHTS]].children


def _role(owner: Any, name: str, role: _Role) -> _Role:
    """Role of a child object, given its owner's role."""
    if isinstance(owner, keras.optimizers.Optimizer):
        return _Role.WEIGHT if name == _WEIGHTS else _Role.SLOT
    return role


def _keys_below(
    nodes: list[Any],
    numbers: set[int],
    owner_of: Mapping[int, Any],
    stored: Mapping[str, Stored],
) -> list[str]:
    """Sorted keys of values at and below nodes that no object matches."""
    seen: set[int] = set()
    stack = list(numbers)
    keys: list[str] = []
    while stack:
        number = stack.pop()
        if number in seen or number in owner_of:
            continue
        seen.add(number)
        keys += [key for key in nodes[number].keys.values() if key in stored]
        stack.extend(nodes[number].children.values())
    return sorted(keys)
