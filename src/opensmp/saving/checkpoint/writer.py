"""Writes one checkpoint: each process writes its shard, rank 0 assembles the checkpoint."""

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
from opensmp.saving.checkpoint.directory.directory import CheckpointDirectory
from opensmp.saving.checkpoint.shards import (
    Named,
    at_low_priority,
    merge_parts,
    on_host,
    write_part,
)
from opensmp.saving.collective_errors import (
    RankResult,
    attempt,
    first_error,
    gathered,
    result_of_error,
)

_WHAT = "smp.CheckpointManager.save"


def place_of(world: World) -> Place:
    """Position of this process in its replica and among replicas."""
    return Place(world.dp_group.index(world.rank), world.mp_group.index(world.rank))


def snapshot(checkpoint: Any, world: World, *, to_host: bool = False) -> list[Named]:
    """Collects the current values that this process must write. Collective over all processes.

    On the host, the tensors share memory with their variables: TensorFlow copies it when a variable
    is changed while other references to its buffer exist. With `to_host`, values are copied from
    GPUs now instead of during the write.
    """
    found = attempt(lambda: Contents(checkpoint, place_of(world)))
    contents: Contents | None = found.value
    facts = found._replace(value=contents and contents.facts)
    outcomes = gathered(facts, range(world.size), _WHAT)
    raise_errors(outcomes)
    assert contents is not None
    share = contents.share([o.value for o in outcomes])

    def read() -> list[Named]:
        tensors = ((value, value.read()) for value in share)
        return [
            Named(value.name, value.slice_spec, on_host(tensor) if to_host else tensor)
            for value, tensor in tensors
            if tensor is not None
        ]

    found = attempt(read)
    raise_errors(gathered(found._replace(value=None), range(world.size), _WHAT))
    values: list[Named] = found.value
    return values


def own_part(
    values: list[Named], shelf: CheckpointDirectory, world: World, staging: Staging | None = None
) -> RankResult:
    """Writes the shard of this process; the value of its outcome is the list of file prefixes.

    With staging memory, for writes during training, large values are removed from `values` and
    released as soon as they are copied, and the copies are written at low priority.
    """
    prefix = os.path.join(shelf.staging, f"part-{world.rank}")
    large = f"{prefix}-large"

    def write() -> list[str]:
        entries = staging.take(values) if staging is not None else []
        prefixes = write_part(prefix, values)
        if staging is not None and entries:
            shelf.take_spare(world.rank, data_path(large))
            at_low_priority(functools.partial(write_bundle, large, staging.memory, entries))
            prefixes.append(large)
        return prefixes

    return attempt(write, shelf.directory)


def whole(
    outcomes: Sequence[RankResult],
    shelf: CheckpointDirectory,
    number: int,
    max_to_keep: int | None,
    every_n_hours: float | None = None,
) -> list[RankResult]:
    """Merges all shards into the checkpoint and commits it; called by rank 0 only.

    Returns the outcomes, where that of rank 0 includes an error of the merge or commit.
    """
    try:
        if first_error(outcomes) is None:
            prefixes = [prefix for outcome in outcomes for prefix in outcome.value]
            merge_parts(prefixes, os.path.join(shelf.staging, f"{shelf.name}-{number}"))
            shelf.commit(number, max_to_keep, every_n_hours)
        return list(outcomes)
    except Exception as error:
        return [result_of_error(error, shelf.directory), *outcomes[1:]]
    finally:
        shelf.discard()


def raise_errors(outcomes: Sequence[RankResult], path: str = "") -> None:
    """Raises one `CheckpointError` for the errors of all processes; `path` is "" if unknown."""
    error = first_error(outcomes)
    if error is not None:
        raise CheckpointError(not_saved(path, error))
