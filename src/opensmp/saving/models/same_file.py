"""Verifies that all processes have read the same file or equal copies."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from opensmp.base.types import PathLike
from opensmp.distributed import world
from opensmp.distributed.collectives import objects
from opensmp.errors import SavingError
from opensmp.saving.atomic import is_remote
from opensmp.saving.models.formats.formats import format_for

_PIECE_BYTES = 1 << 20


def check_same_file(path: PathLike, what: str) -> None:
    """Compares checksums of the files that the processes have read. Collective."""
    if not world.is_initialized() or world.current(what).size == 1 or is_remote(os.fspath(path)):
        return
    ranks = range(world.current(what).size)
    digests = objects.allgather_objects(digest(path), ranks, what)
    other = [rank for rank in ranks if digests[rank] != digests[0]]
    if other:
        raise SavingError(
            f"{what}: {os.fspath(path)} is not the same file in all processes: rank "
            f"{', '.join(map(str, other))} read other contents than rank 0. Expected: one file "
            "that all reach, or equal copies."
        )


def digest(path: PathLike) -> str:
    """SHA-256 of the names and contents of the files that a path stands for."""
    target = Path(path)
    if target.is_dir():
        files = sorted(file for file in target.rglob("*") if file.is_file())
    elif target.is_file():
        files = [target]
        kind = format_for(os.fspath(path))
        if kind is not None and kind.weights_of is not None:
            beside = Path(kind.weights_of(os.fspath(path)))
            files += [beside] if beside.is_file() else []
    else:
        files = sorted(target.parent.glob(f"{target.name}.*"))
    found = hashlib.sha256()
    for file in files:
        found.update(os.fsencode(file.name))
        with file.open("rb") as source:
            while piece := source.read(_PIECE_BYTES):
                found.update(piece)
    return found.hexdigest()
