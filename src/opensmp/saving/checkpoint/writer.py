"""Writes one checkpoint: each process its part, one of them the whole."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any

from opensmp.distributed.world import World
from opensmp.errors import CheckpointError
from opensmp.saving.checkpoint.background.async_write import not_saved
from opensmp.saving.checkpoint.background.staging import Staging
from opensmp.saving.checkpoint.bundle.tensor_bundle import data_path, write_bundle
from opensmp.saving.checkpoint.contents import Contents, Place
from opensmp.saving.checkpoint.directory.directory import Shelf
from opensmp.saving.checkpoint.shards import (
    Named,
    at_low_priority,
    merge_parts,
    on_host,
    write_part,
)
from opensmp.saving.collective_errors import Outcome, first_error, gathered, outcome_of

_WHAT = "smp.CheckpointManager.save"


def place_of(world: World) -> Place:
    """Where a process is among all."""
    return Place(world.dp_group.index(world.rank), world.mp_group.index(world.rank))


def snapshot(checkpoint: Any, world: World, *, to_host: bool = False) -> list[Named]:
    """The values that this process has to write, as they are now.

    All processes call it. The tensors share the memory of their variables on the host:
    TensorFlow copies it when a variable is changed while somebody else has a hold on it.

    Args:
        checkpoint: A `tf.train.Checkpoint`.
        world: This process and its neighbours.
        to_host: Whether values on GPUs are copied to the host now, and not when written.

    Raises:
        CheckpointError: The objects cannot be saved or read, or those of the processes differ.
    """
    contents: Contents | None = None
    try:
        contents = Contents(checkpoint, place_of(world))
        outcome = Outcome(contents.facts)
    except Exception as error:
        outcome = outcome_of(error)
    outcomes = gathered(outcome, range(world.size), _WHAT)
    raise_errors(outcomes)
    assert contents is not None
    share = contents.share([o.value for o in outcomes])
    values: list[Named] = []
    try:
        for value in share:
            tensor = value.read()
            if tensor is not None:
                tensor = on_host(tensor) if to_host else tensor
                values.append(Named(value.name, value.slice_spec, tensor))
        outcome = Outcome()
    except Exception as error:
        outcome = outcome_of(error)
    raise_errors(gathered(outcome, range(world.size), _WHAT))
    return values


def own_part(
    values: list[Named], shelf: Shelf, world: World, staging: Staging | None = None
) -> Outcome:
    """Writes the part of this process; its outcome has the prefixes of the files.

    Args:
        values: Its values.
        shelf: Where checkpoints are.
        world: This process and its neighbours.
        staging: Where large values are copied to first, for training goes on meanwhile. They are
            let go of as soon as they are copied, and written when the cores have time.
    """
    prefix = os.path.join(shelf.staging, f"part-{world.rank}")
    large = f"{prefix}-large"
    try:
        entries = staging.take(values) if staging is not None else []
        prefixes = write_part(prefix, values)
        if staging is not None and entries:
            shelf.take_spare(world.rank, data_path(large))
            at_low_priority(functools.partial(write_bundle, large, staging.memory, entries))
            prefixes.append(large)
        return Outcome(prefixes)
    except Exception as error:
        return outcome_of(error, shelf.directory)


def whole(
    outcomes: Sequence[Outcome],
    shelf: Shelf,
    number: int,
    max_to_keep: int | None,
    every_n_hours: float | None = None,
) -> list[Outcome]:
    """Makes the checkpoint of all parts and puts it in its place; rank 0 calls it.

    Args:
        outcomes: Those of all parts.
        shelf: Where checkpoints are.
        number: Number of the checkpoint.
        max_to_keep: How many are kept.
        every_n_hours: How many hours are between those that are kept for good.

    Returns:
        The outcomes, in that of rank 0 also how it went with the whole.
    """
    try:
        if first_error(outcomes) is None:
            prefixes = [prefix for outcome in outcomes for prefix in outcome.value]
            merge_parts(prefixes, os.path.join(shelf.staging, f"{shelf.name}-{number}"))
            shelf.commit(number, max_to_keep, every_n_hours)
        return list(outcomes)
    except Exception as error:
        return [outcome_of(error, shelf.directory), *outcomes[1:]]
    finally:
        shelf.discard()


def raise_errors(outcomes: Sequence[Outcome], path: str = "") -> None:
    """Raises one error for those of all processes.

    Args:
        outcomes: Those of all processes, by rank.
        path: Where the checkpoint was to be, if that is known.

    Raises:
        CheckpointError: Some process has failed.
    """
    error = first_error(outcomes)
    if error is not None:
        raise CheckpointError(not_saved(path, error))
