"""Checks values whose restore is deferred until their variables are created."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from opensmp import _private
from opensmp.errors import CheckpointError
from opensmp.execution.models.hooks import check_when_partitioned
from opensmp.saving.checkpoint.contents import is_variable
from opensmp.saving.checkpoint.restoring.object_matching import Stored, difference, match


class _Deferred(NamedTuple):
    """A restored checkpoint with deferred values."""

    prefix: str
    object_graph: bytes
    stored: Mapping[str, Stored]
    partial: bool
    checked: set[int]  # ids of optimizers


_deferred: weakref.WeakKeyDictionary[Any, _Deferred] = weakref.WeakKeyDictionary()


def note(
    checkpoint: Any,
    status: Any,
    prefix: str,
    object_graph: bytes,
    stored: Mapping[str, Stored],
    *,
    waits: bool,
    partial: bool,
) -> None:
    """Registers a restored checkpoint; earlier registrations of its objects are dropped.

    `waits` says whether some values have no object yet.
    """
    restored = _objects(checkpoint)
    for earlier in list(_deferred):
        if _objects(earlier) & restored:
            del _deferred[earlier]
    if waits or _has_optimizer_to_build(checkpoint):
        _deferred[checkpoint] = _Deferred(prefix, object_graph, stored, partial, set())
        check_when_partitioned(check)
        _private.before_updates(check_optimizer)
        _private.before_late_restores(status, functools.partial(_check_one, prefix, stored))


def check(made: Any) -> None:
    """Compares deferred values with the variables of a model that have just been created.

    The result depends on shapes only, so that all processes agree, whichever variables they own.
    After a mismatch the model cannot be called until a matching checkpoint is restored, since it
    would continue with wrong values.
    """
    for checkpoint, deferred in list(_deferred.items()):
        if not reaches(checkpoint, made):
            continue
        matching = match(checkpoint, deferred.object_graph, deferred.stored, made)
        fault = matching.fault(deferred.partial)
        if fault:
            raise CheckpointError(
                f"The checkpoint {deferred.prefix}, which was to be restored when the variables of "
                f"'{made.name}' are made, does not fit them. No value was assigned.\n{fault}\n"
                "Expected: the same model and optimizer as when it was written. Restore another "
                "checkpoint"
                + ("." if deferred.partial else ", or this one with restore(partial=True).")
            )
        if not matching.waiting and not _has_optimizer_to_build(checkpoint):
            del _deferred[checkpoint]


def check_optimizer(optimizer: Any) -> None:
    """Compares deferred values with an optimizer that has just created all its variables.

    Without this check the slots of a different optimizer would be ignored silently.
    """
    for checkpoint, deferred in list(_deferred.items()):
        known = id(optimizer) in deferred.checked or deferred.partial
        if known or not reaches(checkpoint, optimizer):
            continue
        fault = match(checkpoint, deferred.object_graph, deferred.stored).fault(partial=False)
        if fault:
            raise CheckpointError(
                f"The checkpoint {deferred.prefix}, which was restored before all variables were "
                f"made, does not fit those of the optimizer '{optimizer.name}', which have been "
                f"made now. It has updated nothing.\n{fault}\nExpected: the same model and "
                "optimizer as when it was written. Restore another checkpoint, or this one with "
                "restore(partial=True)."
            )
        deferred.checked.add(id(optimizer))


def _check_one(prefix: str, stored: Mapping[str, Stored], keys: Sequence[str], owner: Any) -> None:
    """Compares one value with the variable just created for it; raises `CheckpointError`."""
    for key in keys:
        if is_variable(owner) and key in stored:
            found = difference(owner, stored[key])
            if found:
                raise CheckpointError(
                    f"The checkpoint {prefix}, which was restored before all variables were made, "
                    f"does not fit one that has been made now.\n  {key}: {found}\nExpected: the "
                    "same model and optimizer as when it was written."
                )


def reaches(checkpoint: Any, made: Any) -> bool:
    """Whether an object is part of a `tf.train.Checkpoint`."""
    return any(thing is made for thing in _descendants(checkpoint))


def _descendants(checkpoint: Any) -> Iterator[Any]:
    root, attached = _private.checkpoint_root(checkpoint)
    for child in (root, *attached.values()):
        yield from tf.train.TrackableView(child).descendants()


def _has_optimizer_to_build(checkpoint: Any) -> bool:
    """Whether an unbuilt optimizer may create variables for which the files have no values."""
    return any(
        isinstance(thing, keras.optimizers.Optimizer) and not thing.built
        for thing in _descendants(checkpoint)
    )


def _objects(checkpoint: Any) -> set[int]:
    """Ids of the objects passed to a `tf.train.Checkpoint`."""
    root, attached = _private.checkpoint_root(checkpoint)
    children = {**tf.train.TrackableView.children(root), **attached}
    return {id(child) for name, child in children.items() if name != "save_counter"}
