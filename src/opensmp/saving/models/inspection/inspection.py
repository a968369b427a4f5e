"""Validates untrusted model files before they are loaded."""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from opensmp.base.types import PathLike
from opensmp.errors import SavingError
from opensmp.saving.atomic import is_remote
from opensmp.saving.models.inspection import archives
from opensmp.saving.models.inspection.damage import explained
from opensmp.saving.models.inspection.json_text import configuration_of, object_of
from opensmp.saving.models.inspection.safe_hdf5 import Shape, opened


class Sizes(NamedTuple):
    """Number of array elements stored in a file: of the largest array, and of all."""

    largest: int
    total: int


def of_archive(path: PathLike, what: str, whole: bool) -> Sizes:
    """Validates a `.keras` file, and its configuration too if `whole`."""
    names = archives.check_archive(path, what)
    if whole:
        text = archives.read_member(path, archives.CONFIG, what)
        _check_configuration(text, archives.CONFIG, path, what)
    if archives.WEIGHTS not in names:
        return Sizes(0, 0)
    with (
        archives.opened_member(path, archives.WEIGHTS) as member,
        opened(member, path, what) as file,
    ):
        return _sizes(file.shapes().values())


def of_directory(path: PathLike, what: str, whole: bool) -> Sizes:
    """Validates a `.keras` directory, and its configuration too if `whole`."""
    if whole:
        _check_configuration(Path(path, archives.CONFIG).read_bytes(), archives.CONFIG, path, what)
    return of_hdf5(Path(path, archives.WEIGHTS), what, whole)


def of_hdf5(path: PathLike, what: str, whole: bool) -> Sizes:
    """Validates an HDF5 file."""
    with opened(path, path, what) as file:
        return _sizes(file.shapes().values())


def check_weights(path: PathLike, what: str) -> None:
    """Refuses harmful weights files, sharded or not; ignores files of other formats."""
    name = os.fspath(path)
    if is_remote(name) or not Path(name).is_file():
        return
    if name.endswith(".weights.json"):
        for shard in _shards(Path(name), what):
            _check(of_hdf5, shard, what)
    if name.endswith(".keras") and zipfile.is_zipfile(name):
        _check(of_archive, name, what)
    elif name.endswith((".h5", ".hdf5")):
        _check(of_hdf5, name, what)


def _check(inspect: Callable[[PathLike, str, bool], Sizes], path: PathLike, what: str) -> None:
    with explained(path, what):
        inspect(path, what, False)


def _shards(path: Path, what: str) -> list[Path]:
    """The files that an index of shards names; they must be in its directory."""
    with explained(path, what):
        contents = object_of(path.read_bytes(), os.fspath(path), what)
        pending, names = [contents.get("weight_map")], set()
        while pending:
            value = pending.pop()
            if isinstance(value, str):
                names.add(value)
            elif isinstance(value, (list, dict)):
                pending += value.values() if isinstance(value, dict) else value
        for name in sorted(names):
            if Path(name).name != name:
                raise SavingError(
                    f"{what}: {path} is not read: it names {name!r} as a file of its weights, and "
                    "those are beside it. Ask for another one, from somebody you trust."
                )
        return [path.parent / name for name in sorted(names)]


def _check_configuration(text: bytes, part: str, path: PathLike, what: str) -> None:
    configuration_of(text, f"{part} in {os.fspath(path)}", what)


def _sizes(shapes: Iterable[Shape]) -> Sizes:
    counts = [math.prod(shape) for shape in shapes]
    return Sizes(max(counts, default=0), sum(counts))
