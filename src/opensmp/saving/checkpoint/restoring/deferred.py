"""Values that wait for objects not made yet: whether they fit is seen when these appear."""

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
    """A checkpoint of which some values wait."""

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
    """Notes a checkpoint that has just been restored; earlier ones of its objects are forgotten.

    Args:
        checkpoint: The `tf.train.Checkpoint`.
        status: What its `restore` returned.
        prefix: Path of the files.
        object_graph: The graph of the objects in the files.
        stored: Shape and type of each value in the files.
        waits: Whether there are values whose objects have not been made yet.
        partial: Whether it is fine that variables have no value, or values no variable.
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
    """Compares what waits with the variables of a model that have just been made.

    It depends on shapes alone, so that all processes come to the same result, whichever of the
    variables they own. Until it is restored from a checkpoint that fits, the model cannot be
    called: it would go on with values that nobody wants.

    Args:
        made: The model.

    Raises:
        CheckpointError: They do not fit; no value was assigned.
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
    """Compares what waits with an optimizer that has just got all its variables.

    Slots of another kind of optimizer would be left out without a word, as nothing asks for them.

    Args:
        optimizer: The optimizer; it has not updated anything yet.

    Raises:
        CheckpointError: They do not fit.
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
    """Compares one value with the variable that has just been made for it.

    Raises:
        CheckpointError: They do not fit.
    """
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
    """Whether an object belongs to a `tf.train.Checkpoint`."""
    return any(thing is made for thing in _descendants(checkpoint))


def _descendants(checkpoint: Any) -> Iterator[Any]:
    root, attached = _private.checkpoint_root(checkpoint)
    for child in (root, *attached.values()):
        yield from tf.train.TrackableView(child).descendants()


def _has_optimizer_to_build(checkpoint: Any) -> bool:
    """Whether an optimizer will make variables that the files may have no values for."""
    return any(
        isinstance(thing, keras.optimizers.Optimizer) and not thing.built
        for thing in _descendants(checkpoint)
    )


def _objects(checkpoint: Any) -> set[int]:
    """Ids of the objects that a `tf.train.Checkpoint` was given."""
    root, attached = _private.checkpoint_root(checkpoint)
    children = {**tf.train.TrackableView.children(root), **attached}
    return {id(child) for name, child in children.items() if name != "save_counter"}
