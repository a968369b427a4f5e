"""Validates untrusted model files before they are loaded."""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from opensmp.errors import SavingError
from opensmp.saving.atomic import is_remote
from opensmp.saving.models.formats import Format
from opensmp.saving.models.inspection import archives
from opensmp.saving.models.inspection.damage import explained
from opensmp.saving.models.inspection.json_text import configuration_of, object_of
from opensmp.saving.models.inspection.safe_hdf5 import Shape, opened

PathLike = str | os.PathLike[str]

_HDF5 = (Format.H5, Format.H5_WEIGHTS, Format.WEIGHTS)


class Sizes(NamedTuple):
    """Number of array elements stored in a file.

    Attributes:
        largest: Elements of the largest array.
        total: Elements of all arrays.
    """

    largest: int
    total: int


def inspected(path: PathLike, kind: Format, what: str, *, whole: bool = False) -> Sizes | None:
    """Validates a whole file and refuses harmful contents.

    Args:
        path: The file or directory.
        kind: Its format.
        what: Name of the operation for messages.
        whole: Whether its configuration is used, not only its weights.

    Returns:
        The stored sizes; None for formats that TensorFlow reads, or remote files.

    Raises:
        SavingError: It is damaged, refers to values in other files, or expands to far more than its
            size.

    Example:
        ```python
        inspected("model.keras", Format.KERAS, "smp.load_model", whole=True)
        ```
    """
    if is_remote(os.fspath(path)):
        return None
    with explained(path, what):
        if kind is Format.KERAS:
            return _of_archive(path, what, whole)
        if kind is Format.KERAS_DIRECTORY:
            if whole:
                text = Path(path, archives.CONFIG).read_bytes()
                configuration_of(text, f"{archives.CONFIG} in {os.fspath(path)}", what)
            return _of_hdf5(Path(path, archives.WEIGHTS), what)
        return _of_hdf5(path, what) if kind in _HDF5 else None


def check_weights(path: PathLike, what: str) -> None:
    """Refuses harmful weights files, sharded or not; ignores files of other formats."""
    name = os.fspath(path)
    if is_remote(name) or not Path(name).is_file():
        return
    if name.endswith(".weights.json"):
        for shard in _shards(Path(name), what):
            inspected(shard, Format.WEIGHTS, what)
    if name.endswith(".keras") and zipfile.is_zipfile(name):
        inspected(name, Format.KERAS, what)
    elif name.endswith((".h5", ".hdf5")):
        inspected(name, Format.WEIGHTS, what)


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


def _of_archive(path: PathLike, what: str, whole: bool) -> Sizes:
    names = archives.check_archive(path, what)
    if whole:
        text = archives.read_member(path, archives.CONFIG, what)
        configuration_of(text, f"{archives.CONFIG} in {os.fspath(path)}", what)
    if archives.WEIGHTS not in names:
        return Sizes(0, 0)
    with (
        archives.opened_member(path, archives.WEIGHTS) as member,
        opened(member, path, what) as file,
    ):
        return _sizes(file.shapes().values())


def _of_hdf5(path: PathLike, what: str) -> Sizes:
    with opened(path, path, what) as file:
        return _sizes(file.shapes().values())


def _sizes(shapes: Iterable[Shape]) -> Sizes:
    counts = [math.prod(shape) for shape in shapes]
    return Sizes(max(counts, default=0), sum(counts))
