"""Writes one checkpoint: each process its part, one of them the whole."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from opensmp.errors import CheckpointError
from opensmp.runtime.world import World
from opensmp.saving.contents import Contents, Place
from opensmp.saving.outcomes import Outcome, first_error, gathered, outcome_of
from opensmp.saving.parts import Named, merge_parts, usable_threads, write_part
from opensmp.saving.shelf import Shelf

_WHAT = "smp.CheckpointManager.save"


def place_of(world: World) -> Place:
    """Where a process is among all."""
    return Place(world.dp_group.index(world.rank), world.mp_group.index(world.rank))


def snapshot(checkpoint: Any, world: World) -> list[Named]:
    """The values that this process has to write, as they are now.

    All processes call it. The tensors share the memory of their variables on the host:
    TensorFlow copies it when a variable is changed while somebody else has a hold on it.

    Args:
        checkpoint: A `tf.train.Checkpoint`.
        world: This process and its neighbours.

    Raises:
        CheckpointError: The objects cannot be saved, or those of the processes differ.
    """
    contents: Contents | None = None
    try:
        contents = Contents(checkpoint, place_of(world))
        outcome = Outcome(contents.facts)
    except Exception as error:
        outcome = outcome_of(error)
    outcomes = gathered(outcome, range(world.size), _WHAT)
    _raise_first(outcomes, "")
    assert contents is not None
    share = contents.share([o.value for o in outcomes])
    read = [(value, value.read()) for value in share]
    return [Named(v.name, v.slice_spec, tensor) for v, tensor in read if tensor is not None]


def own_part(values: Sequence[Named], shelf: Shelf, world: World) -> Outcome:
    """Writes the part of this process; its outcome has the prefixes of the files."""
    prefix = os.path.join(shelf.staging, f"part-{world.rank}")
    try:
        return Outcome(write_part(prefix, values, usable_threads(world.local_size)))
    except Exception as error:
        return outcome_of(error)


def whole(
    outcomes: Sequence[Outcome], shelf: Shelf, number: int, max_to_keep: int | None
) -> Outcome:
    """Makes the checkpoint of all parts and puts it in its place; one process calls it.

    Args:
        outcomes: Those of all parts.
        shelf: Where checkpoints are.
        number: Number of the checkpoint.
        max_to_keep: How many are kept.
    """
    try:
        if first_error(outcomes) is None:
            prefixes = [prefix for outcome in outcomes for prefix in outcome.value]
            merge_parts(prefixes, os.path.join(shelf.staging, f"{shelf.name}-{number}"))
            shelf.commit(number, max_to_keep)
        return Outcome()
    except Exception as error:
        return outcome_of(error)
    finally:
        shelf.discard()


def raise_errors(outcomes: Sequence[Outcome], path: str) -> None:
    """Raises one error for those of all processes.

    Raises:
        CheckpointError: Some process has failed.
    """
    _raise_first(outcomes, f" to {path}")


def _raise_first(outcomes: Sequence[Outcome], where: str) -> None:
    error = first_error(outcomes)
    if error is not None:
        raise CheckpointError(
            f"The checkpoint was not saved{where}, earlier ones are as they were. {error}"
        )
