"""Restores one checkpoint: each process restores the values that it owns; all succeed or none."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from opensmp import _private
from opensmp.base.types import Tensor
from opensmp.distributed.world import World
from opensmp.errors import CheckpointError
from opensmp.saving.checkpoint.contents import Place
from opensmp.saving.checkpoint.restoring import deferred
from opensmp.saving.checkpoint.restoring.iterators import Iterators
from opensmp.saving.checkpoint.restoring.object_matching import Matching, Stored, match
from opensmp.saving.checkpoint.restoring.reader import Files
from opensmp.saving.checkpoint.shards import usable_threads
from opensmp.saving.collective_errors import (
    DAMAGED,
    DamagedError,
    RankResult,
    attempt,
    first_error,
    gathered,
)

_WHAT = "smp.CheckpointManager.restore"


class _Read(NamedTuple):
    """Data that a process has read; values of variables and states of iterators are by key."""

    files: Files
    values: dict[str, Tensor]
    iterators: Iterators
    states: dict[str, Tensor]
    matching: Matching


def restore_from(
    prefix: str, checkpoint: Any, world: World, place: Place, *, partial: bool
) -> Matching:
    """Restores the values of a checkpoint's objects. Collective over all processes.

    All processes read before any assigns, so that an error leaves everything unchanged.

    Raises:
        DamagedError: The files are damaged.
        CheckpointError: The checkpoint does not match the objects, or cannot be read.
    """
    ranks = range(world.size)
    found = attempt(lambda: _read(prefix, checkpoint, world, place, partial))
    _raise_first(gathered(found._replace(value=None), ranks, _WHAT), prefix)
    read: _Read = found.value
    # Only iterators can refuse their values, which cannot be checked in advance.
    outcome = read.iterators.restore(read.states)
    try:
        _raise_first(gathered(outcome, ranks, _WHAT), prefix)
    except CheckpointError:
        read.iterators.undo()
        raise
    at_hand: dict[str, Tensor | None] = {**read.values, **dict.fromkeys(read.iterators.keys)}
    read.values.clear()  # so that each value is freed as soon as it is assigned
    _private.restore_where_values_are()
    with _private.values_at_hand(at_hand):
        status = checkpoint.restore(read.files.path).expect_partial()
    _private.keep_with_restore(status, read.files)
    deferred.note(
        checkpoint,
        status,
        prefix,
        read.files.object_graph,
        read.files.stored,
        waits=bool(read.matching.waiting),
        partial=partial,
    )
    if read.iterators.left_out:
        warnings.warn(f"{prefix}: {read.iterators.left_out}", stacklevel=4)
    if read.matching.seeds:
        names = ", ".join(read.matching.seeds[:3])
        warnings.warn(
            f"{prefix} has no values for {len(read.matching.seeds)} random seeds ({names}), which "
            "plain TensorFlow leaves out: dropout goes on with other numbers.",
            stacklevel=4,
        )
    return read.matching


def _read(prefix: str, checkpoint: Any, world: World, place: Place, partial: bool) -> _Read:
    """Reads and validates everything that this process restores; assigns nothing."""
    files = Files(prefix)
    matching = match(checkpoint, files.object_graph, files.stored)
    fault = matching.fault(partial)
    if fault:
        raise CheckpointError(
            f"It does not fit the objects of the program.\n{fault}\nExpected: the same model and "
            "optimizer as when it was written"
            + ("." if partial else ", or restore(partial=True) to restore what fits.")
        )
    _check_updates(matching, partial)
    keys = _keys_here(matching, files.stored)
    iterators = Iterators(matching.matches, files.stored, place.replica, len(world.dp_group))
    if not keys and not iterators.keys and not matching.waiting:
        raise CheckpointError(
            "None of its values belongs to an object of the program. It has: "
            + ", ".join(sorted(files.stored)[:5])
            + ". Expected: the names that tf.train.Checkpoint was given when it was written."
        )
    values = files.read([*keys, *iterators.sources], usable_threads(world.local_size))
    # Each process verifies a share of the deferred values, since assigned values cannot be reverted
    # when a deferred one turns out to be damaged.
    files.check(matching.waiting[world.rank :: world.size])
    states = {key: values.pop(key) for key in iterators.sources}
    return _Read(files, values, iterators, states, matching)


def _check_updates(matching: Matching, partial: bool) -> None:
    """Raises `CheckpointError` for an optimizer with updates if the files predate its first one.

    Otherwise its slots would keep the values that these updates gave them.
    """
    for optimizer in () if partial else matching.fresh:
        updates = optimizer.iterations
        if not _private.is_elsewhere(updates) and int(updates) > 0:
            raise CheckpointError(
                f"It was written before the first update of the optimizer '{optimizer.name}', "
                "when that had made no slots, and has no values for them. In this program the "
                f"optimizer has made {int(updates)} updates. Expected: an optimizer without "
                "updates, so restore before training or make a new one; or restore(partial=True), "
                "which keeps the slots as they are."
            )


def _keys_here(matching: Matching, stored: Mapping[str, Stored]) -> list[str]:
    """Keys of the values to restore in this process, without iterator states."""
    return list(
        dict.fromkeys(
            key
            for key, owner in matching.matches
            if key in stored
            and not _private.is_elsewhere(owner)
            and not isinstance(owner, tf.data.Iterator)
        )
    )


def _raise_first(outcomes: Sequence[RankResult], prefix: str) -> None:
    error = first_error(outcomes)
    if error is not None:
        kinds = {o.kind for o in outcomes if o.error is not None}
        kind = DamagedError if kinds == {DAMAGED} else CheckpointError
        raise kind(f"The checkpoint {prefix} was not restored. {error}")


def warn_of_damage(path: str, fault: str) -> None:
    """Warns that a damaged checkpoint is skipped."""
    warnings.warn(
        f"The checkpoint {path} is damaged and is left out: {fault}. The one before it is tried.",
        stacklevel=4,
    )


def is_eager(what: str) -> None:
    """Raises `CheckpointError` if a graph is being traced."""
    if not tf.executing_eagerly():
        raise CheckpointError(
            f"{what} was called while a tf.function is traced, where it would run once and not "
            "with each call. Call it outside of tf.function and smp.step."
        )
