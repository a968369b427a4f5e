"""Restores one checkpoint: each process what it owns, and all of them or none."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import tensorflow as tf

from opensmp import _private
from opensmp.errors import CheckpointError
from opensmp.runtime.world import World
from opensmp.saving.contents import Place, of_replica
from opensmp.saving.files import Files
from opensmp.saving.matching import Matching, match
from opensmp.saving.outcomes import DAMAGED, Outcome, first_error, gathered, outcome_of
from opensmp.saving.parts import usable_threads

Tensor = Any

_WHAT = "smp.CheckpointManager.restore"


class DamagedError(CheckpointError):
    """The files of a checkpoint are damaged; nothing was restored."""


class _Read(NamedTuple):
    """What a process has read.

    Attributes:
        values: Values by key in the files.
        matching: How the checkpoint fits.
    """

    values: dict[str, Tensor]
    matching: Matching


def restore_from(
    prefix: str, checkpoint: Any, world: World, place: Place, *, partial: bool
) -> Matching:
    """Gives objects the values that they have in a checkpoint.

    First all processes read, then all assign, so that an error leaves everything as it was.

    Args:
        prefix: Path of the checkpoint.
        checkpoint: A `tf.train.Checkpoint` of the objects.
        world: This process and its neighbours.
        place: Where this process is among all.
        partial: Whether it is fine that variables have no value, or values no variable.

    Raises:
        DamagedError: The files are damaged.
        CheckpointError: The checkpoint does not fit the objects, or cannot be read.
    """
    ranks = range(world.size)
    read: _Read | None = None
    try:
        read = _read(prefix, checkpoint, world, place, partial)
        outcome = Outcome()
    except Exception as failure:
        outcome = outcome_of(failure)
    outcomes = gathered(outcome, ranks, _WHAT)
    error = first_error(outcomes)
    if error is not None:
        kinds = {o.kind for o in outcomes if o.error is not None}
        kind = DamagedError if kinds == {DAMAGED} else CheckpointError
        raise kind(f"The checkpoint {prefix} was not restored. {error}")
    assert read is not None
    _private.restore_where_values_are()
    with _private.values_at_hand(read.values):
        checkpoint.restore(prefix).expect_partial()
    if read.matching.seeds:
        names = ", ".join(read.matching.seeds[:3])
        warnings.warn(
            f"{prefix} has no values for {len(read.matching.seeds)} random seeds ({names}), which "
            "plain TensorFlow leaves out: dropout goes on with other numbers.",
            stacklevel=4,
        )
    return read.matching


def _read(prefix: str, checkpoint: Any, world: World, place: Place, partial: bool) -> _Read:
    files = Files(prefix)
    matching = match(checkpoint, files.object_graph, files.stored)
    fault = matching.fault(partial)
    if fault:
        raise CheckpointError(
            f"It does not fit the objects of the program.\n{fault}\nExpected: the same model and "
            "optimizer as when it was written"
            + ("." if partial else ", or restore(partial=True) to restore what fits.")
        )
    source = _keys_here(matching, files.stored, place)
    if not source and not matching.waiting:
        raise CheckpointError(
            "None of its values belongs to an object of the program. It has: "
            + ", ".join(sorted(files.stored)[:5])
            + ". Expected: the names that tf.train.Checkpoint was given when it was written."
        )
    values = files.read(list(dict.fromkeys(source.values())), usable_threads(world.local_size))
    # Each process checks a part of what has to wait: later there is no going back.
    files.check(matching.waiting[world.rank :: world.size])
    return _Read({key: values[name] for key, name in source.items()}, matching)


def _keys_here(matching: Matching, stored: Mapping[str, Any], place: Place) -> dict[str, str]:
    """Key of each value to restore here, to the key under which this replica has it."""
    keys = {}
    for key, owner in matching.matches:
        if key in stored and not _private.is_elsewhere(owner):
            own = of_replica(key, place.replica)
            keys[key] = own if own in stored else key
    return keys


def warn_of_damage(path: str, fault: str) -> None:
    """Tells that a checkpoint cannot be used."""
    warnings.warn(
        f"The checkpoint {path} is damaged and is left out: {fault}. The one before it is tried.",
        stacklevel=4,
    )


def is_eager(what: str) -> None:
    """Raises an error if a graph is being traced.

    Raises:
        CheckpointError: It is.
    """
    if not tf.executing_eagerly():
        raise CheckpointError(
            f"{what} was called while a tf.function is traced, where it would run once and not "
            "with each call. Call it outside of tf.function and smp.step."
        )
