"""Checks that the weights in a file match a model, before any is assigned."""

from __future__ import annotations

import itertools
import os
import zipfile
from collections.abc import Sequence
from typing import Any, NamedTuple

from opensmp import _private
from opensmp.base.types import Model, PathLike
from opensmp.errors import SavingError
from opensmp.saving.models.inspection.archives import WEIGHTS, opened_member
from opensmp.saving.models.inspection.safe_hdf5 import Hdf5, Shape, opened

_SHOWN = 5


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


def check(pairs: Sequence[Pair], path: PathLike, what: str) -> None:
    """Raises one error for all differences."""
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


def of_weights_file(model: Model, path: PathLike, what: str) -> list[Pair]:
    """Pairs for a `.weights.h5` or `.keras` file, without optimizer state."""
    stored = _stored(path, what)
    mine = _private.weights_layout(model)
    pairs = []
    for key in [*mine, *(key for key in stored if key not in mine)]:
        path_of, shape = mine.get(key, (None, None))
        pairs.append(Pair(path_of, shape, key if key in stored else None, stored.get(key)))
    return pairs


def has_optimizer(path: PathLike, what: str) -> bool:
    """Whether a `.weights.h5` or `.keras` file has optimizer state."""
    return any(key.startswith("optimizer/") for key in _stored(path, what, everything=True))


def _stored(path: PathLike, what: str, everything: bool = False) -> dict[str, Shape]:
    if not zipfile.is_zipfile(path):
        return _shapes(path, path, what, everything)
    with opened_member(path, WEIGHTS) as member:
        return _shapes(member, path, what, everything)


def _shapes(source: Any, path: PathLike, what: str, everything: bool) -> dict[str, Shape]:
    with opened(source, path, what) as file:
        return {
            name: shape
            for name, shape in file.shapes().items()
            if everything or not name.startswith("optimizer/")
        }


def of_layers(model: Model, file: Hdf5, within: Any) -> list[Pair]:
    """Pairs for HDF5 weights that are stored in the order of layers, as in Keras 2."""
    mine = [
        (variable.path, tuple(variable.shape))
        for layer in model.layers
        for variable in (*layer.trainable_weights, *layer.non_trainable_weights)
    ]
    theirs = []
    for layer in file.names(within, "layer_names"):
        group = file.group(layer, within)
        for name in file.names(group, "weight_names"):
            theirs.append((name, tuple(file.dataset(name, group).shape)))
    return in_order(mine, theirs)


def in_order(mine: Sequence[tuple[str, Shape]], theirs: Sequence[tuple[str, Shape]]) -> list[Pair]:
    """Pairs the entries at the same position in two lists."""
    pairs = itertools.zip_longest(mine, theirs, fillvalue=(None, None))
    return [Pair(*one, *other) for one, other in pairs]
