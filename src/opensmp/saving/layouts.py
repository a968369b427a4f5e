"""Whether the weights in a file are those of a model: found out before any is assigned."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import struct
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import h5py

from opensmp import _private
from opensmp.errors import SavingError

Model = Any
Shape = tuple[int, ...]

_SHOWN = 5
_INSIDE = "model.weights.h5"


class Pair(NamedTuple):
    """A weight of the model and one of the file; None where there is none."""

    mine: str | None
    my_shape: Shape | None
    theirs: str | None
    their_shape: Shape | None

    def __str__(self) -> str:
        mine = f"{self.mine} {self.my_shape}" if self.mine is not None else "nothing"
        theirs = f"{self.theirs} {self.their_shape}" if self.theirs is not None else "nothing"
        return f"the model has {mine}, the file has {theirs}"


def check(pairs: Sequence[Pair], path: str | os.PathLike[str], what: str) -> None:
    """Raises one error for all differences.

    Raises:
        SavingError: The weights are not those of the model; the first that differ are named.
    """
    bad = [pair for pair in pairs if pair.my_shape != pair.their_shape]
    if not bad:
        return
    shown = "".join(f"\n  {pair}" for pair in bad[:_SHOWN])
    more = f"\n  and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
    raise SavingError(
        f"{what}: {os.fspath(path)} has the weights of another model: {len(bad)} of {len(pairs)} "
        f"differ, and none was assigned.{shown}{more}\nExpected: a model that is built as the one "
        "that was saved."
    )


def of_weights_file(model: Model, path: str | os.PathLike[str]) -> list[Pair]:
    """Pairs for a `.weights.h5` or `.keras` file, without those of the optimizer."""
    stored = _stored(path)
    mine = _private.weights_layout(model)
    pairs = []
    for key in [*mine, *(key for key in stored if key not in mine)]:
        path_of, shape = mine.get(key, (None, None))
        pairs.append(Pair(path_of, shape, key if key in stored else None, stored.get(key)))
    return pairs


def has_optimizer(path: str | os.PathLike[str]) -> bool:
    """Whether a `.weights.h5` or `.keras` file has the state of an optimizer."""
    return any(key.startswith("optimizer/") for key in _stored(path, everything=True))


def _stored(path: str | os.PathLike[str], everything: bool = False) -> dict[str, Shape]:
    if zipfile.is_zipfile(path):
        with _member(path, _INSIDE) as file:
            return _shapes(file, everything)
    return _shapes(path, everything)


@contextlib.contextmanager
def _member(path: str | os.PathLike[str], name: str) -> Iterator[Any]:
    """A file in an archive, open to be read here and there; zipfile can go forwards only."""
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(name)
        if info.compress_type != zipfile.ZIP_STORED:
            yield io.BytesIO(archive.read(name))
            return
    with open(path, "rb") as file:
        file.seek(info.header_offset + _LENGTHS)
        lengths = struct.unpack("<HH", file.read(4))  # of the name and of the extra field
        yield _Window(file, info.header_offset + _HEADER + sum(lengths), info.file_size)


_LENGTHS, _HEADER = 26, 30  # in the header of a file in an archive, by the ZIP specification 4.3.7


class _Window(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, file: Any, begin: int, size: int) -> None:
        self._file, self._begin, self._size, self._at = file, begin, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = origin + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._begin + self._at)
        data = self._file.read(max(0, min(len(buffer), self._size - self._at)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def _shapes(source: Any, everything: bool) -> dict[str, Shape]:
    found: dict[str, Shape] = {}

    def note(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and (everything or not name.startswith("optimizer/")):
            found[name] = tuple(item.shape)

    with h5py.File(source, "r") as file:
        file.visititems(note)
    return found


def of_layers(model: Model, group: Any) -> list[Pair]:
    """Pairs for weights in HDF5 that go by the order of the layers, as Keras 2 wrote them.

    Args:
        model: A built model.
        group: The group with one group for each layer.
    """
    mine = [
        (variable.path, tuple(variable.shape))
        for layer in model.layers
        for variable in (*layer.trainable_weights, *layer.non_trainable_weights)
    ]
    theirs = [
        (name, tuple(group[layer][name].shape))
        for layer in attribute(group, "layer_names")
        for name in attribute(group[layer], "weight_names")
    ]
    return in_order(mine, theirs)


def in_order(mine: Sequence[tuple[str, Shape]], theirs: Sequence[tuple[str, Shape]]) -> list[Pair]:
    """Pairs of what has the same place in two lists."""
    pairs = itertools.zip_longest(mine, theirs, fillvalue=(None, None))
    return [Pair(*one, *other) for one, other in pairs]


def attribute(group: Any, name: str) -> list[str]:
    """A list of names in a group of HDF5, which Keras cuts into pieces if it is long."""
    attributes: Mapping[str, Any] = group.attrs
    if name in attributes:
        pieces = [attributes[name]]
    else:
        pieces = []
        while f"{name}{len(pieces)}" in attributes:
            pieces.append(attributes[f"{name}{len(pieces)}"])
    return [x.decode() if isinstance(x, bytes) else str(x) for piece in pieces for x in piece]
