"""Values that wait for objects not made yet: whether they fit is seen when these appear."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from opensmp import _private
from opensmp.errors import CheckpointError
from opensmp.saving.contents import is_variable
from opensmp.saving.matching import Stored, difference, match


class _Deferred(NamedTuple):
    """A checkpoint of which some values wait."""

    prefix: str
    object_graph: bytes
    stored: Mapping[str, Stored]
    partial: bool


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
    if waits:
        _deferred[checkpoint] = _Deferred(prefix, object_graph, stored, partial)
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
        if not matching.waiting:
            del _deferred[checkpoint]


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
    root, attached = _private.checkpoint_root(checkpoint)
    return any(
        thing is made
        for child in (root, *attached.values())
        for thing in tf.train.TrackableView(child).descendants()
    )


def _objects(checkpoint: Any) -> set[int]:
    """Ids of the objects that a `tf.train.Checkpoint` was given."""
    root, attached = _private.checkpoint_root(checkpoint)
    children = {**tf.train.TrackableView.children(root), **attached}
    return {id(child) for name, child in children.items() if name != "save_counter"}
